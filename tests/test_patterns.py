"""Factorisations from patterns: every pattern is used, every clash is named."""

import numpy as np
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import refuses
from torch import nn

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Partition,
    independent,
    markov,
    shared,
)

ABCD = ["a", "b", "c", "d"]
from_patterns = Factorisation.from_patterns


def groups_of(tree):
    """The parts of every group of a tree, of the whole tree first."""
    if not isinstance(tree, dict):
        return [list(tree)]
    inner = [groups_of(unit) for unit in tree.values()]
    return [[part for groups in inner for part in groups[0]], *(g for gs in inner for g in gs)]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_laminar_family_is_the_hierarchy_of_its_patterns(data):
    names = [f"x{i}" for i in range(data.draw(st.integers(2, 7)))]
    tree = problems.random_tree(names, data.draw)
    patterns = [data.draw(st.permutations(group)) for group in groups_of(tree)]
    patterns += [(name,) for name in data.draw(st.sets(st.sampled_from(names)))]
    patterns = [tuple(p) if len(p) > 1 else p[0] for p in data.draw(st.permutations(patterns))]
    assert from_patterns(names, patterns) == Factorisation.hierarchical(tree)


def test_prefixes_are_the_autoregressive_form():
    names = [f"x{i}" for i in range(6)]
    cut = [tuple(names[:i]) for i in range(2, 6)]
    assert from_patterns(names, ["joint", *cut]) == Factorisation.autoregressive(names)


def test_single_parts_and_whole_samples_are_the_flat_form():
    assert from_patterns(ABCD, ["joint"]) == Factorisation.flat(ABCD)
    assert from_patterns(ABCD, [*ABCD, tuple(reversed(ABCD))]) == Factorisation.flat(ABCD)


def test_groups_are_called_by_their_parts():
    names = [t.name for t in from_patterns(ABCD, ["joint", ("c", "a")]).terms]
    assert "a+c/p_dependency" in names


@st.composite
def decomposable(draw):
    """Cliques, each of which meets those before it within one; and what that says of p."""
    names = iter(f"x{i}" for i in range(7))
    cliques = [[next(names) for _ in range(draw(st.integers(2, 3)))]]
    claims = []
    for _ in range(draw(st.integers(1, 2))):
        through = draw(st.sets(st.sampled_from(draw(st.sampled_from(cliques))), min_size=1))
        new = [next(names) for _ in range(draw(st.integers(1, 2)))]
        seen = dict.fromkeys(name for clique in cliques for name in clique)
        rest = [name for name in seen if name not in through]
        if not rest or any(set(clique) <= through for clique in cliques):
            continue  # the new clique would hold an old one, which is laminar
        claims.append(independent(tuple(new), tuple(rest), given=sorted(through), under="p"))
        cliques.append([*sorted(through), *new])
    return cliques, claims


@given(drawn=decomposable(), data=st.data(), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=80)
def test_overlapping_patterns_of_a_decomposable_model_give_the_log_ratio(drawn, data, seed):
    cliques, claims = drawn
    names = data.draw(st.permutations(sorted({n for clique in cliques for n in clique})))
    rng = np.random.default_rng(seed)
    # p is a product of a table per clique, and so obeys the claims; q is any table
    table = np.ones((2,) * len(names))
    for clique in cliques:
        shape = [2 if name in clique else 1 for name in names]
        table = table * rng.uniform(0.2, 1, size=2 ** len(clique)).reshape(shape)
    q = rng.uniform(0.2, 1, size=table.shape)
    tables = {"p": table / table.sum(), "q": q / q.sum()}
    problem = problems.DiscreteTables(tuple(names), tables)
    patterns = [tuple(data.draw(st.permutations(c))) for c in data.draw(st.permutations(cliques))]
    factorisation = from_patterns(names, patterns, claims)
    problems.assert_exact(factorisation, problem)
    trained = {d.parts for t in factorisation.terms for d in t.numerator if d.source == "p"}
    for clique in cliques:
        assert any(set(clique) == set(parts) for parts in trained)
    for parts in factorisation.required_observations():
        assert any(set(parts) <= set(pattern) for pattern in patterns)


@pytest.mark.parametrize("order", [1, 2])
def test_windows_of_a_markov_chain_are_patterns_that_overlap(order):
    names = [f"x{i}" for i in range(5)]
    windows = [tuple(names[i : i + order + 1]) for i in range(5 - order)]
    chain = from_patterns(names, windows[::-1], assuming=[markov(order, under="p")])
    rng = np.random.default_rng(0)
    table = {s: problems.chain_table(rng, 2, 5, order if s == "p" else 4) for s in "pq"}
    problems.assert_exact(chain, problems.DiscreteTables(tuple(names), table))
    assert set(chain.required_observations()) == set(windows)
    if order == 2:
        with pytest.raises(ValueError, match=r"independent\('x3', 'x0'.* given=\['x1', 'x2'\]"):
            from_patterns(names, windows)


def test_a_pattern_within_overlapping_ones_is_a_group():
    parts = ["a", "b", "c", "d", "e"]
    claim = independent(("a", "b"), "e", given=["c", "d"], under="p")
    patterns = [("a", "b", "c", "d"), ("c", "d", "e"), ("a", "b"), ("c", "d")]
    terms = {t.name: t for t in from_patterns(parts, patterns, [claim]).terms}
    assert {"a+b/p_dependency", "c+d/p_dependency", "a+b+c+d/p_dependency"} <= set(terms)
    blocks = [density.parts for density in terms["c+d+e/p_dependency"].denominator]
    assert blocks == [("c", "d"), ("e",)]
    assert terms["q_dependency"].denominator[0].parts == ("a", "b")


def test_overlapping_patterns_can_be_a_group_among_others():
    claim = independent("a", "c", given="b", under="p")
    form = from_patterns(ABCD, ["joint", ("a", "b"), ("b", "c")], [claim])
    names = {t.name for t in form.terms}
    inner = {"a+b+c/a+b/p_dependency", "a+b+c/b+c/p_dependency", "a+b+c/q_dependency"}
    assert names == {*ABCD, "p_dependency", "q_dependency", *inner}


def test_assumptions_remove_terms_as_in_every_form():
    scene = from_patterns(["scene", "map"], ["joint", "map"], assuming=[shared("scene")])
    assert scene == Factorisation.flat(["scene", "map"], assuming=[shared("scene")])
    claim = independent(("a", "b"), ("c", "d"), under="p")
    apart = from_patterns(ABCD, [("a", "b"), ("c", "d")], [claim])
    tree = {"left": ["a", "b"], "right": ["c", "d"]}
    assert apart == Factorisation.hierarchical(tree, [claim])
    known = from_patterns(["m", "a", "v"], [("a", "v")], [shared("m", given=["a", "v"])])
    assert known.required_observations() == (("a", "v"),)


@pytest.mark.parametrize(
    ("match", "make", "error"),
    [
        refuses(
            r"\('b', 'c'\) and \('a', 'b'\) overlap.*"
            r"independent\('c', 'a', given=\['b'\], under='p'\)",
            lambda: from_patterns(["a", "b", "c"], ["joint", ("a", "b"), ("b", "c")]),
        ),
        refuses(
            # that p is so says nothing of q, and the other way round
            r"independent\('c', 'a', given=\['b'\], under='p'",
            lambda: from_patterns(
                ["a", "b", "c"],
                [("a", "b"), ("b", "c")],
                [independent("a", "c", given="b", under="q")],
            ),
        ),
        refuses(
            r"independent\('d', \('a', 'b'\), given=\['c'\]",
            lambda: from_patterns(
                ABCD,
                [("a", "b"), ("b", "c"), ("c", "d")],
                [independent("a", "c", given="b", under="p")],
            ),
        ),
        refuses(
            "overlap in a circle",
            lambda: from_patterns(["a", "b", "c"], [("a", "b"), ("b", "c"), ("a", "c")]),
        ),
        refuses(
            r"\('b', 'c'\) and \('c', 'd'\) overlap",
            lambda: from_patterns(
                ABCD,
                [("a", "b", "c"), ("c", "d"), ("b", "c")],
                [independent(("a", "b"), "d", given="c", under="p")],
            ),
        ),
        refuses(
            r"No pattern holds \('a', 'b', 'c', 'd'\) together, which term 'p_dependency'.*"
            r"independent\(\('a', 'b'\), 'c', 'd', under='p'\)",
            lambda: from_patterns(ABCD, [("a", "b"), "c", "d"]),
        ),
        refuses(
            r"No pattern holds 'c', which term 'c' needs.*shared\('c'\)",
            lambda: from_patterns(
                ["a", "b", "c"],
                [("a", "b")],
                [independent(("a", "b"), "c", under="p")],
            ),
        ),
        refuses("names 'x', but the parts are", lambda: from_patterns(ABCD, [("a", "x")])),
        refuses("at least one pattern", lambda: from_patterns(ABCD, [])),
        refuses("each once", lambda: from_patterns(ABCD, [("a", "a")])),
        refuses("a list of patterns", lambda: from_patterns(ABCD, "joint"), TypeError),
        refuses("a tuple of names", lambda: from_patterns(ABCD, [["a", "b"]]), TypeError),
    ],
)
def test_what_cannot_be_learned_is_refused_with_what_would_mend_it(match, make, error):
    with pytest.raises(error, match=match):
        make()


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *parts):
        return sum(part.double() for part in parts) * self.scale


@given(data=st.data(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_observations_of_every_pattern_reach_the_terms_that_they_can_train(data, seed):
    """Parts are codes 1000 * pattern + row, so that a drawn row tells where it comes from."""
    names = [f"x{i}" for i in range(data.draw(st.integers(3, 6)))]
    groups = groups_of(problems.random_tree(names, data.draw))
    patterns = [tuple(group) for group in groups] + [(name,) for name in names]
    factorisation = from_patterns(names, dict.fromkeys(patterns))
    partition = Partition.fields(*names)
    # the loader yields some of the patterns: whole samples, groups, single parts, in any mix
    seen = data.draw(st.lists(st.sampled_from(patterns), min_size=1, unique=True))
    codes = {pattern: 1000 * (i + 1) + torch.arange(20) for i, pattern in enumerate(seen)}
    datasets = {
        pattern if len(pattern) > 1 else pattern[0]: torch.utils.data.TensorDataset(
            *[codes[pattern] for _ in pattern]
        )
        for pattern in seen
    }
    rng = torch.Generator().manual_seed(seed)
    loader = ObservationLoader(datasets, partition, batch_size=8, pool=False, rng=rng)
    real = next(iter(loader))
    fake = tuple(-torch.arange(1, 9) for _ in names)
    networks = {term.name: Sum() for term in factorisation.terms}
    d = FactorisedDiscriminator(partition, factorisation, networks)
    criterion = DiscriminatorLoss(d, DependencySampler(partition, rng=rng))
    rows = criterion.rows(real, fake)
    for term in factorisation.terms:
        densities = (*term.numerator, *term.denominator)
        needed = [d.parts for d in densities if d.source == "p"]
        served = all(any(set(parts) <= set(pattern) for pattern in seen) for parts in needed)
        assert float(rows[term.name].weight) == float(served)
        for side, batch in (
            ("numerator", rows[term.name].numerator),
            ("denominator", rows[term.name].denominator),
        ):
            parts = partition.restrict(term.parts).split(batch)
            taken = []
            for density in getattr(term, side):
                block = torch.stack([parts[name] for name in density.parts])
                assert (block == block[0]).all()  # one observation
                if served:
                    assert (block > 0).all() == (density.source == "p")
                taken.append(block[0])
            blocks = torch.stack(taken)
            for one in range(len(blocks)):
                for other in range(one):
                    assert not (blocks[one] == blocks[other]).any() or not served
    loss = criterion.cost(rows)
    loss.backward()
    assert all(network.scale.grad is not None for network in networks.values())
