"""Hierarchical, autoregressive and causal forms: compositions of the flat one, proved exact."""

from dataclasses import replace

import numpy as np
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from factordisc import (
    Density,
    Factorisation,
    FactorisedDiscriminator,
    Partition,
    Ratio,
    independent,
    markov,
    shared,
)

CLAIM = problems.Claim
NOTHING_LEFT = "p equals q"


@st.composite
def claims(draw, names):
    """Draws an assumption about some of the names."""
    order = draw(st.permutations(names))
    number = draw(st.integers(1, len(names)))
    chosen, rest = order[:number], order[number:]
    conditional = draw(st.integers(0, min(2, len(rest))))
    if number == 1 or draw(st.booleans()):
        return CLAIM((tuple(chosen),), tuple(rest[:conditional]))
    cut = draw(st.integers(1, number - 1))
    groups = (tuple(chosen[:cut]), tuple(chosen[cut:]))
    return CLAIM(groups, tuple(rest[:conditional]), draw(st.sampled_from(["p", "q"])))


@given(data=st.data(), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=150)
def test_random_trees_and_orders_under_random_assumptions_give_the_log_ratio(data, seed):
    number = data.draw(st.integers(2, 6))
    names = data.draw(st.permutations([f"x{i}" for i in range(number)]))
    cardinalities = {name: 2 + (i % 2) for i, name in enumerate(names)}
    wanted = data.draw(st.lists(claims(names), max_size=3))
    problem, held = problems.DiscreteTables.obeying(wanted, cardinalities, seed)
    assuming = [claim.assumption for claim in held]
    tree = problems.random_tree(names, data.draw)
    for make in (
        lambda: Factorisation.hierarchical(tree, assuming),
        lambda: Factorisation.autoregressive(names, assuming),
    ):
        try:
            factorisation = make()
        except ValueError as error:
            assert NOTHING_LEFT in str(error)  # noqa: PT017 - allowed, not expected
            x = problem.cells()
            assert_close(problem.log_ratio(x), 0 * problem.log_ratio(x), rtol=0, atol=1e-10)
        else:
            assert factorisation.parts == tuple(names)
            problems.assert_exact(factorisation, problem)


@given(
    steps=st.integers(2, 6),
    order=st.integers(1, 3),
    sources=st.sets(st.sampled_from(["p", "q"]), min_size=1),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_windows_of_markov_chains_give_the_log_ratio(steps, order, sources, seed):
    rng = np.random.default_rng(seed)
    names = tuple(f"x{i}" for i in range(steps))
    tables = {
        s: problems.chain_table(rng, 2, steps, order if s in sources else steps)
        for s in ("p", "q")
    }
    problem = problems.DiscreteTables(names, tables)
    assuming = [markov(order, under=source) for source in sorted(sources)]
    factorisation = Factorisation.autoregressive(names, assuming)
    # rounding is relative to the logarithm of rare cells
    problems.assert_exact(factorisation, problem, atol=1e-9)
    for term in factorisation.terms:
        if term.numerator[0].source in sources and len(term.denominator) > 1:
            assert len(term.parts) <= order + 1
    problems.assert_exact(
        Factorisation.hierarchical({"a": names[:1], "b": names[1:]}, assuming), problem
    )


def test_two_claims_that_together_make_two_parts_independent_are_one_relation():
    # x0 and x1 are independent given x3 and x3 is independent of both, hence without x3 too
    names = [f"x{i}" for i in range(5)]
    claims = [
        shared("x0"),
        independent("x0", ("x1", "x2", "x4"), given="x3", under="p"),
        independent(("x0", "x1", "x4"), ("x3", "x2"), under="p"),
    ]
    terms = Factorisation.autoregressive(names, claims).terms
    # each part of x1:x4 has a marginal, though x0 has none: the sum needs what the claims imply
    assert [t.name for t in terms if len(t.parts) == 1] == ["x4", "x3", "x2", "x1"]
    with pytest.raises(ValueError, match="missing"):
        Factorisation(names, terms, claims[:2])


def test_degenerate_forms_are_the_flat_one():
    names = ["a", "b", "c"]
    flat = Factorisation.flat(names)
    assert Factorisation.hierarchical(names) == flat
    assert Factorisation.hierarchical({name: [name] for name in names}) == flat
    assert Factorisation.hierarchical({"all": names}) == flat
    assert Factorisation.autoregressive(["a", "b"]) == Factorisation.flat(["a", "b"])
    assert Factorisation.joint(names).refine("joint", flat) == flat
    assert Factorisation.causal(names) == Factorisation.joint(names)


TREE = {"left": {"eye": ["a", "b"], "brow": ["c", "d"]}, "right": ["e", "f"], "chin": ["g"]}


def test_refining_by_hand_is_the_hierarchy():
    top = Factorisation.flat(["left", "right", "g"])
    left = Factorisation.flat(["eye", "brow"]).refine("eye", Factorisation.flat(["a", "b"]))
    left = left.refine("brow", Factorisation.flat(["c", "d"]))
    by_hand = top.refine("left", left).refine("right", Factorisation.flat(["e", "f"]))
    hierarchy = Factorisation.hierarchical(TREE)
    assert by_hand == hierarchy
    assert {t.name for t in by_hand.terms} == {t.name for t in hierarchy.terms}


def test_terms_are_called_by_the_path_of_their_group():
    names = [term.name for term in Factorisation.hierarchical(TREE).terms]
    dependencies = {"", "left/", "left/eye/", "left/brow/", "right/"}
    expected = {f"{path}{s}_dependency" for path in dependencies for s in "pq"}
    assert set(names) == expected | set("abcdefg")
    chain = Factorisation.autoregressive(["x1", "x2", "x3", "x4"])
    groups = {"", "x1:x2/", "x1:x3/"}
    expected = {f"{group}{s}_dependency" for group in groups for s in "pq"}
    assert {term.name for term in chain.terms} == expected | {"x1", "x2", "x3", "x4"}


def test_assumptions_refine_with_their_parts():
    top = Factorisation.flat(["m", "s"], assuming=[independent("m", "s", under="p")])
    refined = top.refine("m", Factorisation.flat(["a", "b"], assuming=[shared("a")]))
    assert [str(a) for a in refined.assuming] == [
        "independent(('a', 'b'), 's', under='p')",
        "shared('a')",
    ]
    claim = independent(("a", "b"), "s", under="p")
    tree = {"m": ["a", "b"], "s": ["s"]}
    assert refined == Factorisation.hierarchical(tree, assuming=[claim, shared("a")])


def test_refining_keeps_what_an_assumption_is_given():
    claims = [independent("s", "t", given="m", under="p"), shared("s", given="m")]
    top = Factorisation.flat(["m", "s", "t"], assuming=claims)
    refined = top.refine("m", Factorisation.flat(["a", "b"]))
    assert [str(a) for a in refined.assuming] == [
        "independent('s', 't', given=['a', 'b'], under='p')",
        "shared('s', given=['a', 'b'])",
    ]


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_refining_keeps_the_sign_of_what_it_refines(sign):
    top = Factorisation.hierarchical({"l": ["a", "b"], "r": ["c"]})
    p, q = Density("p", ("a", "b")), Density("q", ("a", "b"))
    extra = [Ratio("probe", sign, [p], [q])]
    extra += [Ratio("back", -sign, [p], [q])] if sign else []
    flat = Factorisation.flat(["a", "b"]).terms
    other = Factorisation(["a", "b"], [replace(t, name=f"inner_{t.name}") for t in flat])
    refined = Factorisation(top.parts, [*top.terms, *extra]).refine("probe", other)
    inner = {term.name: term.sign for term in refined.terms[len(top.terms) :]}
    inner.pop("back", None)
    assert list(inner.values()) == [sign, sign, sign, -sign]


def test_an_assumption_within_a_group_splits_the_groups_dependency():
    tree = {"left": ["a", "b", "c"], "right": ["d"]}
    claim = independent("a", ("b", "c"), under="p")
    names = [term.name for term in Factorisation.hierarchical(tree, assuming=[claim]).terms]
    assert "left/b+c/p_dependency" in names
    assert "left/p_dependency" not in names


def test_a_hierarchy_combines_groups_where_flat_combines_parts():
    names = [f"x{i}" for i in range(8)]
    tree = {f"g{i}": names[2 * i : 2 * i + 2] for i in range(4)}
    blocks = [len(term.denominator) for term in Factorisation.hierarchical(tree).terms]
    assert max(blocks) == 4
    assert max(len(term.denominator) for term in Factorisation.flat(names).terms) == 8


def test_prefixes_are_trained_but_not_summed():
    chain = Factorisation.causal(["x1", "x2", "x3"], prefixes=[1, 2])
    assert [(t.name, t.sign, t.parts) for t in chain.terms] == [
        ("joint", 1, ("x1", "x2", "x3")),
        ("x1", 0, ("x1",)),
        ("x1:x2", 0, ("x1", "x2")),
    ]


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_form_without_one_of_its_terms_is_refused(data):
    names = [f"x{i}" for i in range(data.draw(st.integers(3, 6)))]
    form = data.draw(
        st.sampled_from(
            [
                Factorisation.hierarchical(problems.random_tree(names, data.draw)),
                Factorisation.autoregressive(names),
                Factorisation.autoregressive(names, assuming=[markov(1, under="p")]),
            ]
        )
    )
    dropped = data.draw(st.sampled_from(form.terms))
    terms = [term for term in form.terms if term is not dropped]
    with pytest.raises(ValueError, match="missing: "):
        Factorisation(names, terms, form.assuming)


def test_a_window_too_small_for_the_chain_is_refused():
    names = ["x1", "x2", "x3", "x4"]
    short = Factorisation.autoregressive(names, assuming=[markov(1, under="p")])
    with pytest.raises(ValueError, match="missing: "):
        Factorisation(names, short.terms, [markov(2, under="p")])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Factorisation.hierarchical("ab"), TypeError, "A tree is a mapping"),
        (lambda: Factorisation.hierarchical({"g": 3}), TypeError, "but got 3"),
        (lambda: Factorisation.hierarchical({"g": []}), ValueError, "Group 'g' expects at least"),
        (
            lambda: Factorisation.hierarchical({"a": ["b", "c"], "g": ["a", "d"]}),
            ValueError,
            "Group 'a' has the name of a part",
        ),
        (
            lambda: Factorisation.hierarchical({"g": ["a", "b"], "h": ["b", "c"]}),
            ValueError,
            "different names",
        ),
        (lambda: Factorisation.hierarchical({"g/h": ["a", "b"]}), ValueError, "'/' separates"),
        (lambda: markov(0, under="p"), ValueError, "`order` of markov is an integer"),
        (lambda: markov(2, under="r"), ValueError, r"one of \('p', 'q'\), but got 'r'"),
        (
            lambda: Factorisation.causal(["a", "b"], prefixes=[2]),
            ValueError,
            "numbers of steps from 1 to 1, but got 2",
        ),
        (
            lambda: Factorisation.flat(["a", "b"]).refine("c", Factorisation.flat(["d", "e"])),
            ValueError,
            "no marginal of 'c'",
        ),
        (
            lambda: Factorisation.flat(["a", "b"], assuming=[shared("a")]).refine(
                "a", Factorisation.flat(["d", "e"])
            ),
            ValueError,
            "no marginal of 'a'",
        ),
        (
            lambda: Factorisation.autoregressive(
                ["a", "b", "c"], assuming=[markov(1, under="p")]
            ).refine("a", Factorisation.flat(["d", "e"])),
            ValueError,
            "cannot be refined under markov",
        ),
    ],
)
def test_what_is_no_form_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_part_that_is_refined_in_a_chain_of_another_group_leaves_the_chain_alone():
    # The chain is among its own parts: nothing is assumed of the other group's order.
    chain = Factorisation.autoregressive(["x", "y", "z"], assuming=[markov(1, under="p")])
    both = Factorisation.flat(["s", "t"]).refine("t", chain)
    assert both.parts == ("s", "x", "y", "z")

    # These two terms cancel if s is the chain's first step, and only then.
    def p(*parts):
        return Density("p", parts)

    cancel = [
        Ratio("one", 1, [p("s", "x", "y"), p("z")], [p("s", "x", "y", "z")]),
        Ratio("two", 1, [p("y", "z")], [p("y"), p("z")]),
    ]
    with pytest.raises(ValueError, match="missing"):
        Factorisation(both.parts, [*both.terms, *cancel], both.assuming)
    Factorisation(both.parts, [*both.terms, *cancel], [markov(1, under="p")])


def test_a_chain_under_one_source_says_nothing_of_the_other():
    names = ["x1", "x2", "x3"]
    chains = [markov(1, under="p"), markov(1, under="q")]
    both = Factorisation.autoregressive(names, assuming=chains)
    for chain in chains:
        with pytest.raises(ValueError, match="missing: "):
            Factorisation(names, both.terms, [chain])


def test_a_part_that_is_known_given_the_others_leaves_the_tree():
    tree = {"x": ["m", "a"], "y": ["v", "w"]}
    claim = shared("m", given=["a", "v", "w"])
    form = Factorisation.hierarchical(tree, assuming=[claim])
    expected = Factorisation.hierarchical({"x": ["a"], "y": ["v", "w"]})
    assert {(t.name, t.parts) for t in form.terms} == {(t.name, t.parts) for t in expected.terms}
    within = Factorisation.hierarchical(tree, assuming=[shared("m", given="a")])
    assert "x/p_dependency" not in [term.name for term in within.terms]


class Windows(nn.Module):
    """One network for all windows of a chain, told which step it looks at."""

    def __init__(self, width, steps):
        super().__init__()
        self.steps = nn.Embedding(steps, 1)
        self.linear = nn.Linear(width, 1)
        self.calls = []

    def forward(self, window, step):
        self.calls.append(len(window))
        return self.linear(window.flatten(1)) + self.steps(step)


def test_markov_windows_are_one_call_of_a_network_that_is_told_the_step():
    steps, order = 6, 2
    names = [str(i + 1) for i in range(steps)]
    chain = Factorisation.autoregressive(names, [markov(order, under=s) for s in ("p", "q")])
    kinds = {}
    networks, inputs = {}, {}
    for term in chain.terms:
        kind = (len(term.parts), len(term.denominator), term.numerator[0].source)
        networks[term.name] = kinds.setdefault(kind, Windows(3 * len(term.parts), steps).double())
        last = int(term.parts[-1]) - 1
        inputs[term.name] = lambda x, last=last: (x, torch.full((len(x),), last))
    d = FactorisedDiscriminator(Partition.steps(steps), chain, networks, inputs=inputs)
    x = torch.randn(5, steps, 3, dtype=torch.float64)
    total = d(x)
    # marginals of all steps together; the first, shorter window; all other windows together
    calls = {kind: network.calls for kind, network in kinds.items()}
    assert calls[1, 1, "p"] == [5 * steps]
    assert calls[2, 2, "p"] == calls[2, 2, "q"] == [5]
    assert calls[3, 2, "p"] == calls[3, 2, "q"] == [5 * (steps - 2)]
    expected = 0
    for i in range(steps):
        expected = expected + kinds[1, 1, "p"](x[:, i], torch.full((5,), i))[:, 0]
        for source, sign in (("p", 1), ("q", -1)):
            first = max(0, i - order)
            if i:
                window = kinds[i - first + 1, 2, source]
                expected = expected + sign * window(x[:, first : i + 1], torch.full((5,), i))[:, 0]
    assert_close(total, expected)


# --- terms that are given others ---


def test_the_remainder_of_a_group_and_of_groups():
    names = [t.name for t in Factorisation.remainder(["a", "b", "c"]).terms]
    assert names == ["a", "b", "c", "remainder"]
    top = Factorisation.flat(["l", "r"]).refine("l", Factorisation.remainder(["a", "b"]))
    inner = {t.name: t for t in top.terms}["l/remainder"]
    assert inner.given == ("a", "b")
    assert inner.parts == ("a", "b")
    other = Factorisation.remainder(["l", "r"]).refine("l", Factorisation.flat(["a", "b"]))
    whole = {t.name: t for t in other.terms}["remainder"]
    assert whole.given == ("a", "b", "l/p_dependency", "l/q_dependency", "r")
    assert whole.parts == ("a", "b", "r")


def test_assumptions_shorten_a_remainder():
    conditional = Factorisation.remainder(["scene", "map"], assuming=[shared("scene")])
    assert [t.name for t in conditional.terms] == ["map", "remainder"]
    assert conditional.terms[1].given == ("map",)
    known = Factorisation.remainder(["m", "a", "v"], [shared("m", given=["a", "v"])])
    assert known.terms[-1].parts == ("a", "v")


def test_terms_are_equal_only_if_they_are_given_the_same():
    remainder = Factorisation.remainder(["a", "b"])
    renamed = [replace(t, name={"remainder": "rest"}.get(t.name, t.name)) for t in remainder.terms]
    assert Factorisation(["a", "b"], renamed) == remainder
    joint = [replace(t, sign=0) if t.name != "remainder" else t for t in remainder.terms]
    joint[-1] = replace(joint[-1], given=())
    assert Factorisation(["a", "b"], joint) != remainder


def test_a_remainder_is_written_with_what_it_is_given():
    latex = Factorisation.remainder(["a", "b"]).to_latex()
    last = latex.splitlines()[-2]
    assert last.count(r"\frac") == 3
    assert last.count(r" - \log") == 2


A, Q = Density("p", ("a",)), Density("q", ("a",))
WHOLE = [Density("p", ("a", "b"))], [Density("q", ("a", "b"))]


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ([Ratio("t", 1, *WHOLE, ["z"])], r"cannot be given 'z': there is no such term"),
        (
            [Ratio("a", 1, [A], [Q], ["t"]), Ratio("t", 1, *WHOLE, ["a"])],
            r"'a' cannot be given 't': it is given terms itself",
        ),
        (
            [Ratio("a", 0, [A], [Q]), Ratio("t", 1, *WHOLE, ["a"])],
            r"'t' cannot be given 'a': it is not part of the sum",
        ),
        (
            [Ratio("t", 1, *WHOLE), Ratio("a", 1, [A], [Q], ["t"])],
            r"'a' cannot be given 't': it is about \('a', 'b'\), but 'a' about \('a',\)",
        ),
        ([Ratio("t", 1, *WHOLE, ["t"])], "cannot be given 't': it is given terms itself"),
    ],
)
def test_what_a_term_cannot_be_given_is_refused(terms, says):
    with pytest.raises(ValueError, match=says):
        Factorisation(["a", "b"], terms)


def test_a_sum_with_a_term_given_too_little_is_refused():
    flat = Factorisation.flat(["a", "b"]).terms
    with pytest.raises(ValueError, match=r"missing: log q\(b\) − log p\(b\)|missing: −log p\(b\)"):
        Factorisation(["a", "b"], [*flat[:2], Ratio("rest", 1, *WHOLE, ["a"])])
