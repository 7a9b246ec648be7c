"""The algebra: exact terms give the log ratio, and a wrong sum is always refused."""

from dataclasses import replace as changed

import hypothesis.strategies as st
import problems
import pytest
import torch
from hypothesis import assume, given, settings
from problems import A, B, P, Q, p, q
from torch.testing import assert_close

from factordisc import (
    Factorisation,
    FactorisedDiscriminator,
    Logistic,
    Partition,
    Ratio,
    generator_loss,
    independent,
    markov,
    shared,
)

# The same examples in every run: a failure here is never a matter of luck.
few = settings(max_examples=40, deadline=None, derandomize=True)
many = settings(max_examples=200, deadline=None, derandomize=True)


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


@many
@given(st.data())
def test_every_form_gives_the_log_ratio_of_tables_under_their_assumptions(data):
    problem, assuming = data.draw(discrete())
    partition = data.draw(partitions_of(dict.fromkeys(problem.names, 1)))
    parts = data.draw(st.permutations(problem.names))
    for form in (Factorisation.flat, Factorisation.joint, Factorisation.remainder):
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


def test_a_relation_that_only_a_long_search_finds_is_found():
    names = [f"x{i}" for i in range(7)]
    assuming = [
        independent(("x2", "x0", "x4", "x6"), ("x5", "x1"), under="q"),
        independent(("x0", "x6", "x3", "x5", "x4"), "x2", under="q"),
        independent("x6", ("x5", "x2", "x3", "x1"), under="q"),
        markov(order=1, under="q"),
    ]
    # so x1 is independent of all others under q
    zero = Ratio("zero", 1, q(*names), (q("x1"), q(*(n for n in names if n != "x1"))))
    terms = Factorisation.flat(names, assuming).terms
    assert Factorisation(names, [*terms, zero], assuming).terms[-1].name == "zero"


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
