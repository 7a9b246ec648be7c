"""What a factorisation looks like: LaTeX that compiles, and a picture that says everything."""

import re
import sys

import matplotlib
import pytest
from matplotlib.mathtext import MathTextParser
from matplotlib.patches import FancyBboxPatch

from factordisc import Density, Factorisation, Ratio, independent, markov

matplotlib.use("agg")

from matplotlib import pyplot as plt

NAMES = ["a", "b", "c", "d"]
HIERARCHY = Factorisation.hierarchical({"left": ["a", "b"], "right": ["c", "d"]})
FORMS = {
    "flat": Factorisation.flat(NAMES),
    "hierarchical": HIERARCHY,
    "markov": Factorisation.autoregressive(NAMES, [markov(1, under="p")]),
    "causal": Factorisation.causal(NAMES, prefixes=[2]),
    "patterns": Factorisation.from_patterns(
        NAMES,
        [("a", "c"), ("c", "d"), "b"],
        [
            independent("a", "d", given="c", under="p"),
            independent(("a", "c", "d"), "b", under="p"),
        ],
    ),
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_line_of_the_latex_compiles(form):
    lines = form.to_latex().splitlines()
    assert lines[0] == r"\begin{aligned}"
    assert lines[-1] == r"\end{aligned}"
    assert len(lines) == 3 + sum(term.sign != 0 for term in form.terms)
    assert [line.endswith(r" \\") for line in lines[2:-1]] == [True] * (len(lines) - 4) + [False]
    for line in lines[1:-1]:
        formula = re.sub(r"&| \\\\$", "", line)
        MathTextParser("agg").parse(f"${formula}$")
    assert [line[0] for line in lines[2:-1]] == ["="] + [
        {1: "+", -1: "-"}[term.sign] for term in form.terms[1:] if term.sign
    ]


@pytest.mark.parametrize("character", "_%{}$^~ ")
def test_names_with_special_characters_compile(character):
    latex = Factorisation.joint([f"a{character}b", "c"]).to_latex()
    line = latex.splitlines()[1]
    MathTextParser("agg").parse(f"${line}$")
    assert f"a{character}b" not in line


def test_characters_that_only_latex_knows_are_escaped():
    line = Factorisation.joint(["a#b&c", "d\\e"]).to_latex().splitlines()[1]
    assert r"\mathrm{a\#b\&c},\mathrm{d\backslash e}" in line


def test_a_sum_that_starts_with_a_minus_says_so():
    def p(*parts):
        return Density("p", parts)

    q = Density("q", ("a", "b"))
    upside_down = Ratio("joint", -1, [q], [p("a", "b")])
    latex = Factorisation(["a", "b"], [upside_down]).to_latex()
    assert r"= -{}& \log \frac{q(\mathrm{a},\mathrm{b})}{p(\mathrm{a},\mathrm{b})}" in latex


def words(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_picture_shows_every_part_term_and_what_trains_it(form):
    axes = form.draw()
    axes.figure.canvas.draw()
    shown = words(axes)
    assert shown[:4] == list(form.parts)
    for term in form.terms:
        sign = {1: "+", -1: "−", 0: "0"}[term.sign]
        assert f"{sign} {term.name}" in shown
    needed = {
        str(parts).replace("'", "").replace(",)", ")") for parts in form.required_observations()
    }
    assert needed <= set(shown)
    generator = sum(t.numerator[0].source == "q" for t in form.terms)
    assert shown.count("the generator") == generator


def test_blocks_are_drawn_where_their_parts_are():
    axes = HIERARCHY.draw()
    term = next(t for t in HIERARCHY.terms if t.name == "p_dependency")
    y = -1.0 - HIERARCHY.terms.index(term)
    boxes = [p.get_extents() for p in axes.patches if isinstance(p, FancyBboxPatch)]
    spans = [
        [round(v) for v in axes.transData.inverted().transform(box)[:, 0]]
        for box in boxes
        if abs(axes.transData.inverted().transform(box)[:, 1].mean() - y) < 1e-6
    ]
    # the frame around all, then the two groups
    assert spans == [[0, 3], [0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("form", "brackets"),
    [("flat", 1), ("hierarchical", 3), ("markov", 3), ("causal", 1), ("patterns", 2)],
)
def test_the_tree_has_a_bracket_per_group(form, brackets):
    axes = FORMS[form].draw()
    horizontal = [
        segment
        for collection in axes.collections
        for segment in collection.get_segments()
        if segment[0][1] == segment[1][1]
    ]
    assert len(horizontal) == brackets


def test_it_draws_into_given_axes():
    _, axes = plt.subplots()
    assert HIERARCHY.draw(axes) is axes
    assert len(plt.get_fignums()) == 1


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        HIERARCHY.draw()


def test_terms_that_are_not_summed_are_pale():
    frames = [p for p in FORMS["causal"].draw().patches if isinstance(p, FancyBboxPatch)]
    assert [frame.get_alpha() == 1 for frame in frames] == [True, False]
