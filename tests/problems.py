"""Problems with known answers: the exact log density of every subset of the parts, in float64.

An observation is a mapping from the names of the parts to tensors of shape (N, size), as
`Partition.split` gives it; ``partition.join`` makes a batch of it.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from factordisc import Density, Ratio, independent, shared


def p(*parts):
    return Density("p", parts)


def q(*parts):
    return Density("q", parts)


A = Ratio("a", 1, p("a"), q("a"))
B = Ratio("b", 1, p("b"), q("b"))
P = Ratio("p_dependency", 1, p("a", "b"), (p("a"), p("b")))
Q = Ratio("q_dependency", -1, q("a", "b"), (q("a"), q("b")))


def refuses(match, make, error=ValueError):
    """A case of a test that calls `make` and expects an error that says what `match` says."""
    return pytest.param(match, make, error, id=match[:40])


class Claim(NamedTuple):
    """An assumption that a problem can be made to obey; shared where `under` is None."""

    groups: tuple[tuple[str, ...], ...]
    given: tuple[str, ...] = ()
    under: str | None = None

    @property
    def assumption(self):
        if self.under is None:
            return shared(*self.groups[0], given=self.given)
        return independent(*self.groups, given=self.given, under=self.under)


class Problem:
    """What both kinds have in common: two sources over named parts."""

    names: tuple[str, ...]

    def log_ratio(self, x):
        """Returns log p(x) - log q(x) of whole observations, with shape (N,)."""
        return self.log_density("p", self.names, x) - self.log_density("q", self.names, x)

    def log_term(self, term, x):
        """Returns the unsigned log ratio of a term, with shape (N,)."""
        above = sum(self.log_density(d.source, d.parts, x) for d in term.numerator)
        return above - sum(self.log_density(d.source, d.parts, x) for d in term.denominator)

    def log_sum(self, terms, x):
        """Returns the signed sum of the terms' log ratios, with shape (N,)."""
        zero = torch.zeros(len(x[self.names[0]]), dtype=torch.float64)
        return sum((term.sign * self.log_term(term, x) for term in terms), zero)


class DiscreteTables(Problem):
    """Two positive joint tables over parts of few values; a part is one integer."""

    def __init__(self, names, tables):
        self.names = tuple(names)
        self.tables = tables

    @classmethod
    def random(cls, cardinalities, seed):
        """Draws tables for parts with these numbers of values."""
        rng = np.random.default_rng(seed)
        weights = np.exp(rng.normal(size=(2, *cardinalities.values())))
        p, q = (table / table.sum() for table in weights)
        return cls(cardinalities, {"p": p, "q": q})

    @classmethod
    def obeying(cls, claims, cardinalities, seed, rounds=40):
        """Draws tables that obey the claims, and says which: claims may exclude each other."""
        problem = cls.random(cardinalities, seed)
        for _ in range(rounds):
            if all(problem.obeys(claim) for claim in claims):
                break
            for claim in claims:
                problem = problem.imposed(claim)
        return problem, [claim for claim in claims if problem.obeys(claim)]

    def imposed(self, claim):
        """Returns tables that obey one claim: the product of the conditionals that it names."""
        every = (*(name for group in claim.groups for name in group), *claim.given)
        if claim.under is None:
            # q(A, B, rest) = p(A | B) q(B) r(rest | A, B)
            p, q = (self._marginal(s, every) / self._marginal(s, claim.given) for s in ("p", "q"))
            return DiscreteTables(self.names, self.tables | {"q": self.tables["q"] * p / q})
        product = self._marginal(claim.under, claim.given) ** (1 - len(claim.groups))
        for group in claim.groups:
            product = product * self._marginal(claim.under, (*group, *claim.given))
        table = self.tables[claim.under] * product / self._marginal(claim.under, every)
        return DiscreteTables(self.names, self.tables | {claim.under: table})

    def obeys(self, claim):
        """Whether the claim holds: imposing it changes no log density but by rounding."""
        other = self.imposed(claim).tables
        return all(
            np.abs(np.log(self.tables[s]) - np.log(other[s])).max() < 1e-13 for s in ("p", "q")
        )

    def _marginal(self, source, parts):
        others = tuple(i for i, name in enumerate(self.names) if name not in parts)
        return self.tables[source].sum(axis=others, keepdims=True)

    def log_density(self, source, parts, x):
        index = tuple(x[name][:, 0].numpy() if name in parts else 0 for name in self.names)
        return torch.from_numpy(np.log(self._marginal(source, parts)[index]))

    def cells(self):
        """Returns every possible observation once."""
        rows = np.indices(self.tables["p"].shape).reshape(len(self.names), -1)
        return {name: torch.from_numpy(rows[i])[:, None] for i, name in enumerate(self.names)}

    def sample(self, source, number, seed):
        """Draws observations of a source."""
        rng = np.random.default_rng(seed)
        table = self.tables[source]
        flat = rng.choice(table.size, size=number, p=table.ravel() / table.sum())
        rows = np.unravel_index(flat, table.shape)
        return {name: torch.from_numpy(rows[i])[:, None] for i, name in enumerate(self.names)}


class CorrelatedGaussians(Problem):
    """Two Gaussians with random means and full covariances, over parts of the given sizes."""

    def __init__(self, sizes, seed):
        rng = np.random.default_rng(seed)
        self.names = tuple(sizes)
        self.sizes = sizes
        ends = np.cumsum([0, *sizes.values()])
        self.entries = {name: np.arange(ends[i], ends[i + 1]) for i, name in enumerate(self.names)}
        length = int(ends[-1])
        self.means = {s: rng.normal(size=length) for s in ("p", "q")}
        self.covariances = {}
        for source in ("p", "q"):
            factor = rng.normal(size=(length, length)) / math.sqrt(length)
            # The identity keeps the condition number, and so the rounding errors, small.
            self.covariances[source] = factor @ factor.T + 0.5 * np.eye(length)

    def log_density(self, source, parts, x):
        values = np.concatenate([x[name].detach().double().numpy() for name in parts], axis=1)
        entries = np.concatenate([self.entries[name] for name in parts])
        factor = np.linalg.cholesky(self.covariances[source][np.ix_(entries, entries)])
        white = np.linalg.solve(factor, (values - self.means[source][entries]).T)
        constant = np.log(np.diag(factor)).sum() + 0.5 * len(entries) * math.log(2 * math.pi)
        return torch.from_numpy(-0.5 * (white**2).sum(0) - constant)

    def sample(self, source, number, seed):
        """Draws observations of a source."""
        rng = np.random.default_rng(seed)
        rows = rng.multivariate_normal(self.means[source], self.covariances[source], size=number)
        return {name: torch.from_numpy(rows[:, e]) for name, e in self.entries.items()}


class ExactTerm(nn.Module):
    """Returns the log ratio of a term, less what it is given, from what its network receives."""

    def __init__(self, term, given, problem, partition, dtype):
        super().__init__()
        self.term, self.given, self.problem, self.dtype = term, given, problem, dtype
        self.partition = partition.restrict(term.parts)

    def forward(self, *received):
        x = self.partition.split(received[0] if len(received) == 1 else received)
        given = sum(other.sign * self.problem.log_term(other, x) for other in self.given)
        return (self.problem.log_term(self.term, x) - given).to(self.dtype)


def exact_networks(factorisation, problem, partition, dtype=torch.float64):
    """Returns a network per term that gives its exact log ratio, rounded to `dtype`."""
    known = {term.name: term for term in factorisation.terms}
    return {
        name: ExactTerm(term, [known[g] for g in term.given], problem, partition, dtype)
        for name, term in known.items()
    }


def assert_exact(factorisation, problem, atol=1e-10):
    """The terms with exact sub-ratios give the log ratio, an identity but for rounding."""
    x = problem.cells()
    total = problem.log_sum(factorisation.terms, x)
    assert_close(total, problem.log_ratio(x), rtol=0, atol=atol)


def random_tree(names, draw, depth=4):
    """Draws a tree over names, of any depth up to `depth` and uneven."""
    if depth == 1 or len(names) < 3 or draw(st.booleans()):
        return list(names)
    cuts = sorted(draw(st.sets(st.integers(1, len(names) - 1), min_size=1, max_size=3)))
    pieces = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    return {f"g{i}": random_tree(piece, draw, depth - 1) for i, piece in enumerate(pieces)}


def chain_table(rng, cardinality, steps, order):
    """A joint table of a Markov chain: a product of random conditionals."""
    table = np.ones((cardinality,) * steps)
    for i in range(steps):
        seen = range(max(0, i - order), i + 1)
        shape = tuple(cardinality if j in seen else 1 for j in range(steps))
        conditional = rng.dirichlet(np.ones(cardinality), size=cardinality ** (len(seen) - 1))
        table = table * conditional.reshape(shape)
    return table
