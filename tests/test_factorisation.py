"""Factorisation: what the forms are made of, and what it refuses."""

from dataclasses import replace as changed

import pytest
from problems import A, B, P, Q, p, q, refuses

from factordisc import (
    Density,
    Factorisation,
    Ratio,
    independent,
    shared,
)


def content(factorisation):
    return [(term.name, term.sign, str(term)) for term in factorisation.terms]


def test_flat_is_equation_3():
    assert content(Factorisation.flat(["a", "b"])) == [
        ("a", 1, "log p(a) − log q(a)"),
        ("b", 1, "log p(b) − log q(b)"),
        ("p_dependency", 1, "log p(a, b) − log p(a) − log p(b)"),
        ("q_dependency", -1, "log q(a, b) − log q(a) − log q(b)"),
    ]


def test_a_shared_part_has_no_marginal():
    factorisation = Factorisation.flat(["scene", "map"], assuming=[shared("scene")])
    assert [t.name for t in factorisation.terms] == ["map", "p_dependency", "q_dependency"]


def test_a_known_conditional_leaves_the_flat_form_of_the_others():
    assuming = [shared("m", given=["a", "v"])]
    terms = Factorisation.flat(["m", "a", "v"], assuming=assuming).terms
    assert [term.parts for term in terms] == [("a",), ("v",), ("a", "v"), ("a", "v")]
    (joint,) = Factorisation.joint(["m", "a", "v"], assuming=assuming).terms
    assert str(joint) == "log p(a, v) − log q(a, v)"


def test_shared_parts_leave_one_after_the_other():
    chain = [shared("c", given=["a", "b"]), shared("b", given="a")]
    assert [t.name for t in Factorisation.flat(["a", "b", "c"], assuming=chain).terms] == ["a"]


@pytest.mark.parametrize(
    ("source", "assumption", "expected"),
    [
        ("p", independent("a", "b", "c", under="p"), []),
        ("p", independent("a", ("b", "c"), under="p"), [("b+c/p_dependency", 1)]),
        ("q", independent("a", ("b", "c"), under="q"), [("b+c/q_dependency", -1)]),
        (
            "p",
            independent("a", "b", given="c", under="p"),
            [("a+c/p_dependency", 1), ("b+c/p_dependency", 1)],
        ),
        ("p", independent("a", "b", under="p"), [("p_dependency", 1)]),
        ("p", independent("a", "b", "c", under="q"), [("p_dependency", 1)]),
    ],
    ids=str,
)
def test_independence_splits_a_dependency(source, assumption, expected):
    terms = Factorisation.flat(["a", "b", "c"], assuming=[assumption]).terms
    dependencies = [(t.name, t.sign) for t in terms if t.name.endswith(f"{source}_dependency")]
    assert dependencies == expected


def test_independence_given_several_parts_takes_away_their_dependency():
    assuming = [independent("a", "b", given=["c", "d"], under="p")]
    terms = Factorisation.flat(["a", "b", "c", "d"], assuming=assuming).terms
    assert [(t.parts, t.sign) for t in terms if t.name.endswith("p_dependency")] == [
        (("a", "c", "d"), 1),
        (("b", "c", "d"), 1),
        (("c", "d"), -1),
    ]


def test_a_dependency_that_counts_twice_is_two_terms():
    assuming = [independent("a", "b", "c", given=["d", "e"], under="p")]
    terms = Factorisation.flat(list("abcde"), assuming=assuming).terms
    names = [t.name for t in terms if t.parts == ("d", "e")]
    assert names == ["d+e/p_dependency", "d+e/p_dependency_2"]


def test_a_dependency_is_split_again_by_the_next_assumption():
    assuming = [independent("a", ("b", "c"), under="p"), independent("b", "c", under="p")]
    terms = Factorisation.flat(["a", "b", "c"], assuming=assuming).terms
    assert [t.name for t in terms] == ["a", "b", "c", "q_dependency"]


def test_equality_ignores_the_names_and_the_order_of_terms():
    flat = Factorisation.flat(["a", "b"])
    others = [changed(t, name=f"my_{t.name}") for t in reversed(flat.terms) if t != P]
    swapped = changed(P, numerator=p("b", "a"), denominator=(p("b"), p("a")))
    same = Factorisation(["a", "b"], [swapped, *others])
    assert same == flat
    assert hash(same) == hash(flat)
    assert flat != Factorisation.joint(["a", "b"])
    assert flat != Factorisation.flat(["b", "a"])
    assert flat != Factorisation(["a", "b"], [*flat.terms, Ratio("probe", 0, p("a"), q("a"))])
    assert flat != "flat"


def test_densities_stand_in_the_order_of_the_parts():
    term = Ratio("p_dependency", 1, p("b", "a"), (p("b"), p("a")))
    factorisation = Factorisation(["a", "b"], [A, B, term, Q])
    assert str(factorisation.terms[2]) == "log p(a, b) − log p(a) − log p(b)"
    assert factorisation.terms[2].parts == ("a", "b")


def test_required_observations_are_the_largest_sets_in_order():
    def required(*assuming):
        return Factorisation.flat(["a", "b", "c"], assuming=assuming).required_observations()

    assert required() == (("a", "b", "c"),)
    assert required(independent("b", "c", "a", under="p")) == (("a",), ("b",), ("c",))
    assert required(independent(("c", "b"), "a", under="p")) == (("a",), ("b", "c"))
    assert required(independent("a", "b", given="c", under="p")) == (("a", "c"), ("b", "c"))
    assert required(shared("a", given=["b", "c"])) == (("b", "c"),)


def test_str_is_the_equation_and_the_assumptions():
    factorisation = Factorisation.flat(["scene", "map"], assuming=[shared("scene")])
    assert str(factorisation).splitlines() == [
        "log p(scene, map) − log q(scene, map) =",
        "  + map           log p(map) − log q(map)                        from (map)",
        "  + p_dependency  log p(scene, map) − log p(scene) − log p(map)  from (scene, map)",
        "  − q_dependency  log q(scene, map) − log q(scene) − log q(map)  from the generator",
        "assuming shared('scene')",
    ]
    assert repr(factorisation) == (
        "<Factorisation of scene, map into map, p_dependency, q_dependency>"
    )


def form_over(*parts, assuming=()):
    return lambda: Factorisation.flat(parts, assuming)


def sum_of(*terms):
    return lambda: Factorisation(["a", "b"], terms)


EQ4 = Factorisation.flat(["scene", "map"], assuming=[shared("scene")])
EQUAL = [shared("a"), shared("b", given="a")]


@pytest.mark.parametrize(
    ("match", "make", "error"),
    [
        # Names of parts.
        refuses(r"two parts with different names, but got \('a',\)", form_over("a")),
        refuses(r"two parts with different names, but got \('a', 'a'\)", form_over("a", "a")),
        refuses("a sequence of part names, got 'ab'", lambda: Factorisation("ab", []), TypeError),
        refuses("A part name is a string, but got 1 of type int", form_over("a", 1), TypeError),
        refuses("A part name is a non-empty string, but got ''", form_over("a", "")),
        refuses(r"'a\.b' cannot name a part: '\.' separates the levels", form_over("a.b", "c")),
        refuses("'a/b' cannot name a part: '/' separates a group", form_over("a/b", "c")),
        refuses("'joint' cannot name a part: it is the name of a term", form_over("joint", "c")),
        refuses("'p_dependency' cannot name a part", form_over("p_dependency", "c")),
        refuses("'q_dependency' cannot name a part", form_over("q_dependency", "c")),
        refuses("'keys' cannot name a part: it is an attribute of nn.M", form_over("keys", "c")),
        # Assumptions about other parts, or with nothing left.
        refuses(
            r"shared\('z'\) names 'z', but the parts are \('a', 'b'\)",
            form_over("a", "b", assuming=[shared("z")]),
        ),
        refuses(
            r"independent\('a', 'z', under='p'\) names 'z'",
            form_over("a", "b", assuming=[independent("a", "z", under="p")]),
        ),
        refuses(
            r"expects a list of assumptions, such as \[shared\('a'\)\]",
            form_over("a", "b", assuming=shared("a")),
            TypeError,
        ),
        refuses("but got 'a'", form_over("a", "b", assuming=["a"]), TypeError),
        refuses(
            r"Under shared\('a', 'b'\) p equals q: nothing is left to discriminate\. Drop an",
            form_over("a", "b", assuming=[shared("a", "b")]),
        ),
        refuses(
            r"Under shared\('a'\), shared\('b', given=\['a'\]\) p equals q",
            form_over("a", "b", assuming=EQUAL),
        ),
        refuses(
            r"Under shared\('a', 'b'\) p equals q",
            lambda: Factorisation(["a", "b"], [changed(A, sign=0)], [shared("a", "b")]),
        ),
        # Sums of terms.
        refuses("2 terms are called 'a'. Give each its own name", sum_of(A, A, B, P, Q)),
        refuses("`terms` expects Ratios, but got 'a'", sum_of("a"), TypeError),
        refuses(
            r"Term 't' names part 'z', but the parts are \('a', 'b'\)",
            sum_of(Ratio("t", 1, p("z"), q("z"))),
        ),
        refuses(
            r"Term 't' expects a source, one of \('p', 'q'\), but got 'r'",
            sum_of(Ratio("t", 1, p("a"), Density("r", ["a"]))),
        ),
        refuses(
            r"not log p\(a, b\) − log q\(a, b\); missing: log p\(a\) − log q\(a\)\. "
            r"Add a marginal discriminator for 'a', or pass assuming=\[shared\('a'\)\]\.$",
            sum_of(B, P, Q),
        ),
        refuses(
            r"; missing: log p\(scene\) − log q\(scene\)\. Add a marginal discriminator for "
            r"'scene', or pass assuming=\[shared\('scene'\)\]\.$",
            lambda: Factorisation(["scene", "map"], EQ4.terms),
        ),
        refuses(
            r"missing: log p\(a, b\) − log p\(a\) − log p\(b\)\. Add the p-dependency of "
            r"\('a', 'b'\), or pass assuming=\[independent\('a', 'b', under='p'\)\]\.$",
            sum_of(A, B, Q),
        ),
        refuses(
            r"missing: log q\(a\) \+ log q\(b\) − log q\(a, b\)\. Add the q-dependency of "
            r"\('a', 'b'\), or pass assuming=\[independent\('a', 'b', under='q'\)\]\.$",
            sum_of(A, B, P),
        ),
        refuses(r"Add the p-dependency of \('a', 'b'\), .* discriminator for 'a'", sum_of(B, Q)),
        refuses(
            r"missing: log q\(a\) − log p\(a\)\. Add or remove terms until nothing is missing, "
            "or state in `assuming` the relation that makes it zero",
            sum_of(A, changed(A, name="t"), B, P, Q),
        ),
        refuses(r"missing: 2 log p\(a\) − 2 log q\(a\)\.", sum_of(changed(A, sign=-1), B, P, Q)),
    ],
)
def test_errors_say_what_is_wrong(match, make, error):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("form", [Factorisation.flat, Factorisation.joint])
def test_every_form_checks_what_it_is_given(form):
    with pytest.raises(ValueError, match="'joint' cannot name a part"):
        form(["joint", "a"])
    with pytest.raises(ValueError, match="p equals q"):
        form(["a", "b"], assuming=EQUAL[::-1])
