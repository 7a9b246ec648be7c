"""The algebra against problems whose log densities are known exactly."""

from dataclasses import replace as changed

import hypothesis.strategies as st
import problems
import pytest
import torch
from hypothesis import assume, given, settings
from torch.testing import assert_close

from factordisc import (
    Density,
    Factorisation,
    FactorisedDiscriminator,
    Logistic,
    Partition,
    Ratio,
    generator_loss,
    independent,
    shared,
)

# The same examples in every run: a failure here is never a matter of luck.
few = settings(max_examples=40, deadline=None, derandomize=True)
many = settings(max_examples=200, deadline=None, derandomize=True)


def p(*parts):
    return Density("p", parts)


def q(*parts):
    return Density("q", parts)


A = Ratio("a", 1, p("a"), q("a"))
B = Ratio("b", 1, p("b"), q("b"))
P = Ratio("p_dependency", 1, p("a", "b"), (p("a"), p("b")))
Q = Ratio("q_dependency", -1, q("a", "b"), (q("a"), q("b")))


# --- problems that satisfy random assumptions ---


@st.composite
def claims_over(draw, names):
    labels = [0, 1, 2, "given", "out"] if draw(st.booleans()) else [0, 0, "given", "out"]
    labels = draw(st.lists(st.sampled_from(labels), min_size=len(names), max_size=len(names)))
    by_label = {label: [] for label in labels}
    for name, label in zip(names, labels, strict=True):
        by_label[label].append(name)
    groups = tuple(tuple(by_label[i]) for i in (0, 1, 2) if i in by_label)
    conditions = tuple(by_label.get("given", ()))
    if not groups:
        return problems.Claim((names[:1],))
    if len(groups) == 1:
        return problems.Claim(groups, conditions)
    return problems.Claim(groups, conditions, draw(st.sampled_from("pq")))


@st.composite
def discrete(draw, at_least=0):
    """A table and the assumptions that it truly satisfies, in random order."""
    number = draw(st.integers(2, 6))
    names = tuple("abcdef"[:number])
    cardinalities = {name: draw(st.integers(2, 3)) if number < 5 else 2 for name in names}
    claims = draw(st.lists(claims_over(names), min_size=at_least, max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    problem, obeyed = problems.DiscreteTables.obeying(claims, cardinalities, seed)
    assume(len(obeyed) >= at_least)
    return problem, draw(st.permutations([claim.assumption for claim in obeyed]))


@st.composite
def partitions_of(draw, sizes):
    """A partition into parts of these sizes, in any order and of any kind."""
    names = draw(st.permutations(list(sizes)))
    kind = draw(st.sampled_from(["slices", "indices", "fields"]))
    if kind == "slices":
        return Partition({name: sizes[name] for name in names})
    if kind == "fields":
        return Partition.fields(*names)
    entries = iter(draw(st.permutations(range(sum(sizes.values())))))
    return Partition.indices({name: [next(entries) for _ in range(sizes[name])] for name in names})


def flat_or_reject(parts, assuming):
    try:
        return Factorisation.flat(parts, assuming)
    except ValueError as error:
        assume("p equals q" not in str(error))
        raise


def check_sum(factorisation, problem, partition, x):
    networks = problems.exact_networks(factorisation, problem, partition)
    d = FactorisedDiscriminator(partition, factorisation, networks)
    # An identity, not an estimate: only rounding in float64 separates the two sides.
    assert_close(d(partition.join(x)), problem.log_ratio(x), rtol=0, atol=1e-10)


# --- right sums ---


@many
@given(st.data())
def test_every_form_gives_the_log_ratio_of_tables_under_their_assumptions(data):
    problem, assuming = data.draw(discrete())
    partition = data.draw(partitions_of(dict.fromkeys(problem.names, 1)))
    parts = data.draw(st.permutations(problem.names))
    for form in (Factorisation.flat, Factorisation.joint):
        try:
            factorisation = form(parts, assuming)
        except ValueError as error:
            assert "p equals q" in str(error)  # noqa: PT017 - whether it raises is drawn
            assert problem.log_ratio(problem.cells()).abs().max() < 1e-10
        else:
            check_sum(factorisation, problem, partition, problem.cells())


@few
@given(st.data())
def test_every_form_gives_the_log_ratio_of_gaussians(data):
    number = data.draw(st.integers(2, 6))
    sizes = {name: data.draw(st.integers(1, 2)) for name in "abcdef"[:number]}
    seed = data.draw(st.integers(0, 2**32 - 1))
    problem = problems.CorrelatedGaussians(sizes, seed)
    partition = data.draw(partitions_of(sizes))
    for form in (Factorisation.flat, Factorisation.joint):
        check_sum(form(list(sizes)), problem, partition, problem.sample("q", 16, seed))


@few
@given(st.data())
def test_float32_loses_no_more_than_rounding(data):
    problem, assuming = data.draw(discrete())
    partition = Partition(dict.fromkeys(problem.names, 1))
    factorisation = flat_or_reject(problem.names, assuming)
    networks = problems.exact_networks(factorisation, problem, partition, torch.float32)
    d = FactorisedDiscriminator(partition, factorisation, networks)
    x = problem.cells()
    total = d(partition.join(x))
    assert total.dtype == torch.float32
    # T rounded terms and T - 1 rounded partial sums, each off by half an ulp (2^-24) of at most
    # the sum of magnitudes; doubled for the second-order remainder and the tables' own 1e-13.
    magnitude = sum(problem.log_term(t, x).abs() for t in factorisation.terms).max().item()
    bound = 2 * len(factorisation.terms) * 2 * 2**-24 * magnitude
    assert_close(total.double(), problem.log_ratio(x), rtol=0, atol=bound + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_overflow_nothing(dtype):
    problem = problems.CorrelatedGaussians({"a": 1, "b": 2}, seed=0)
    partition = Partition({"a": 1, "b": 2})
    x = problem.sample("p", 400, seed=0)
    for name in x:  # from the centre to where the ratio is about 1e4 on either side
        x[name] *= torch.logspace(-1, 2.5, 400, dtype=torch.float64)[:, None]
    log_p, log_q = (problem.log_density(s, problem.names, x) for s in ("p", "q"))
    exact = log_p - log_q
    assert exact.min() < -1e4
    assert exact.max() > 1e4
    factorisation = Factorisation.flat(["a", "b"])
    networks = problems.exact_networks(factorisation, problem, partition, dtype)
    d = FactorisedDiscriminator(partition, factorisation, networks)
    total = d(partition.join(x)).requires_grad_()
    truth = (log_p - torch.logaddexp(log_p, log_q)).exp()
    # In float32 a sum of terms around 20 is off by some 1e-5 where the sigmoid is not flat.
    atol = 1e-10 if dtype == torch.float64 else 1e-4
    assert_close(total.sigmoid().double(), truth, rtol=0, atol=atol)
    losses = [generator_loss(total, kind) for kind in ("non-saturating", "minimax", "kl")]
    losses.append(Logistic().loss(total, total))
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, total)
        assert loss.isfinite()
        assert gradient.isfinite().all()


# --- wrong sums ---


def check_refused_if_wrong(problem, terms, assuming):
    """A change may leave the sum right (a term that is zero here): then there is no verdict."""
    x = problem.cells()
    assume((problem.log_sum(terms, x) - problem.log_ratio(x)).abs().max() > 1e-8)
    with pytest.raises(ValueError, match="missing"):
        Factorisation(problem.names, terms, assuming)


@st.composite
def flat_forms(draw):
    problem, assuming = draw(discrete())
    terms = list(flat_or_reject(problem.names, assuming).terms)
    return problem, assuming, terms, draw(st.integers(0, len(terms) - 1))


def flipped(density):
    return changed(density, source={"p": "q", "q": "p"}[density.source])


CHANGES = {
    "dropped term": lambda term: [],
    "flipped sign": lambda term: [changed(term, sign=-term.sign)],
    "duplicated term": lambda term: [term, changed(term, name="again")],
    "not summed": lambda term: [changed(term, sign=0)],
    "other source above": lambda term: [changed(term, numerator=[*map(flipped, term.numerator)])],
    "other source below": lambda term: [
        changed(term, denominator=[*term.denominator[1:], flipped(term.denominator[0])])
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@few
@given(drawn=flat_forms())
def test_a_changed_term_is_refused(change, drawn):
    problem, assuming, terms, i = drawn
    check_refused_if_wrong(
        problem, terms[:i] + CHANGES[change](terms[i]) + terms[i + 1 :], assuming
    )


@many
@given(discrete(at_least=1), st.integers(0, 2**32 - 1))
def test_a_forgotten_assumption_is_refused(drawn, seed):
    problem, assuming = drawn
    terms = flat_or_reject(problem.names, assuming).terms
    cardinalities = dict(zip(problem.names, problem.tables["p"].shape, strict=True))
    check_refused_if_wrong(problems.DiscreteTables.random(cardinalities, seed), terms, ())


# --- which terms the forms have ---


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


def test_the_proof_uses_every_relation_and_not_only_the_first_that_applies():
    # a, b are independent under p too: they are under q, and p(a, b) = q(a, b).
    blocks = independent(("a", "b"), "c", under="q")
    assuming = [blocks, shared("a", "b"), independent("a", "b", under="q")]
    terms = Factorisation.flat(["a", "b", "c"], assuming).terms
    zero = Ratio("zero", 1, p("a", "b"), (p("a"), p("b")))
    assert Factorisation(["a", "b", "c"], [*terms, zero], assuming).terms == (*terms, zero)


def test_assumptions_that_meet_in_many_ways_are_no_obstacle():
    names = [f"x{i}" for i in range(9)]
    assuming = [shared(names[0], given=names[1:])]
    for name in names:
        assuming.append(independent(name, [n for n in names if n != name], under="q"))
    terms = Factorisation.flat(names, assuming).terms
    assert [term.name for term in terms] == [*names[1:], "p_dependency"]


# --- what a factorisation is ---


def test_terms_that_are_not_summed_need_no_proof():
    probe = Ratio("probe", 0, p("a"), q("a"))
    factorisation = Factorisation(["a", "b"], [A, B, P, Q, probe])
    assert factorisation.terms[-1].sign == 0
    assert "  0 probe " in str(factorisation)
    problem = problems.DiscreteTables.random({"a": 2, "b": 3}, seed=0)
    check_sum(factorisation, problem, Partition({"a": 1, "b": 1}), problem.cells())


def test_a_term_that_is_not_summed_does_not_count():
    with pytest.raises(ValueError, match="missing"):
        Factorisation(["a", "b"], [changed(A, sign=0), B, P, Q])


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


# --- errors ---


def refuses(match, make, error=ValueError):
    return pytest.param(match, make, error, id=match[:40])


def form_over(*parts, assuming=()):
    return lambda: Factorisation.flat(parts, assuming)


def term_of(*arguments):
    return lambda: Ratio(*arguments)


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
