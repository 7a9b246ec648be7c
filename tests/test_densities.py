"""Densities, ratios and assumptions: what can be said, and what is refused."""

import pytest
from problems import p, q, refuses

from factordisc import Density, Ratio, independent, markov, shared


def term_of(*arguments):
    return lambda: Ratio(*arguments)


def test_what_is_said_is_printed_as_it_is_written():
    assert str(Density("p", "a")) == "p(a)"
    assert Density("p", ["a", "b"]).parts == ("a", "b")
    dependency = Ratio("d", 1, p("a", "b"), (p("a"), p("b")))
    assert dependency.parts == ("a", "b")
    assert str(dependency) == "log p(a, b) − log p(a) − log p(b)"
    assumptions = [
        shared("a", given=["b", "c"]),
        independent("a", ("b", "c"), given=["d"], under="q"),
        markov(order=2, under="p"),
    ]
    for assumption in assumptions:
        assert eval(str(assumption)) == assumption


@pytest.mark.parametrize(
    ("match", "make", "error"),
    [
        # Assumptions.
        refuses("shared expects the name of at least one part", lambda: shared()),
        refuses(r"shared expects every part once, .*'a', 'a'", lambda: shared("a", "a")),
        refuses("shared expects the names of parts, but got 1", lambda: shared(1), TypeError),
        refuses("disjoint groups of parts, but 'a' is in two", lambda: shared("a", given=["a"])),
        refuses("argument: 'under'", lambda: independent("a", "b"), TypeError),
        refuses(
            r"`under` of independent expects a source, one of \('p', 'q'\), but got 'r'",
            lambda: independent("a", "b", under="r"),
        ),
        refuses(r"two blocks of parts, but got \('a',\)", lambda: independent("a", under="p")),
        refuses("at least two blocks of parts", lambda: independent("a", (), under="p")),
        refuses(
            "independent expects disjoint groups of parts, but 'b' is in two",
            lambda: independent(("a", "b"), ("b", "c"), under="p"),
        ),
        refuses("but 'a' is in two", lambda: independent("a", "b", given="a", under="p")),
        # Densities and ratios.
        refuses("A Density expects at least one part", lambda: p()),
        refuses("The parts of a Density expects every part once", lambda: p("a", "a")),
        refuses("a Density expects the names of parts, but got 1", lambda: p(1), TypeError),
        refuses("'t' expects a sign of 1, -1 or 0, got 2", term_of("t", 2, p("a"), q("a"))),
        refuses("'t' expects a sign of 1, -1 or 0, got True", term_of("t", True, p("a"), q("a"))),
        refuses("A term name is a string", term_of(None, 1, p("a"), q("a")), TypeError),
        refuses(r"'t\.u' cannot name a term: '\.'", term_of("t.u", 1, p("a"), q("a"))),
        refuses("'keys' cannot name a term", term_of("keys", 1, p("a"), q("a"))),
        refuses("The numerator of term 't' exp", term_of("t", 1, ["a"], q("a")), TypeError),
        refuses(
            r"numerator covers \('a', 'b'\) and the denominator \('a',\)",
            term_of("t", 1, p("a", "b"), q("a")),
        ),
        refuses(r"covers \(\) and the denominator \(\)", term_of("t", 1, (), ())),
        refuses(
            "The denominator of term 't' covers 'a' more than once",
            term_of("t", 1, p("a", "b"), (q("a", "b"), q("a"))),
        ),
        refuses(
            "The numerator of term 't' covers 'a' more than once, but a side is a density of one",
            term_of("t", 1, (p("a"), q("a")), q("a")),
        ),
    ],
)
def test_what_cannot_be_said_is_refused(match, make, error):
    with pytest.raises(error, match=match):
        make()
