"""The density chasm: log p − log q where p and q have almost nothing in common.

Under p, d dimensions are d/2 correlated pairs of Gaussians in an unknown order; q is the product
of p's marginals. Every pair adds half a nat to KL(p, q), so that a classifier of p against q soon
has nothing to learn from: all its rows are on the right side long before its logits are log ratios
(Rhodes et al., 2020, https://arxiv.org/abs/2006.12204). Factorised, the same number is a sum of
small log ratios, each with plenty of overlap. The mean of d(x) under p estimates KL(p, q), whose
closed form is d/4 nats; it is taken on held-out samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor, nn
from tqdm.auto import tqdm

from factordisc import (
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Partition,
    independent,
    shared,
)
from support.results import environment, read_rows, table, write_json

NATS_PER_PAIR = 0.5  # of mutual information, as in the benchmark
COLUMNS = {
    "method": "",
    "dimensions": "",
    "seed": "",
    "truth": ".0f",
    "estimate": ".2f",
    "relative_error": "+.1%",
    "error_p": ".2f",
    "error_q": ".2f",
    "parameters": ",",
    "seconds": ".0f",  # of CPU
}


@dataclass(frozen=True)
class GaussianPairs:
    """Standard normal dimensions, which p correlates in pairs and q does not.

    Args:
        pairs: The dimensions of every pair, with shape (d/2, 2): a permutation of 0 to d - 1.
    """

    pairs: Tensor

    @classmethod
    def draw(cls, dimensions: int) -> GaussianPairs:
        """Puts the dimensions, an even number, into pairs at random."""
        if dimensions < 4 or dimensions % 2:
            raise ValueError(
                f"Two pairs or more have an even number of dimensions from 4, got {dimensions}."
            )
        return cls(torch.randperm(dimensions).view(-1, 2))

    @property
    def correlation(self) -> float:
        """Of the two dimensions of a pair under p."""
        return math.sqrt(1 - math.exp(-2 * NATS_PER_PAIR))

    @property
    def divergence(self) -> float:
        """KL(p, q), in nats: the sum of the pairs' mutual informations."""
        return NATS_PER_PAIR * len(self.pairs)

    def sample_q(self, number: int) -> Tensor:
        """Draws from the product of the marginals, with shape (number, d)."""
        return torch.randn(number, self.pairs.numel())

    def sample_p(self, number: int) -> Tensor:
        """Draws observations, with shape (number, d)."""
        x = self.sample_q(number)
        first, second = self.pairs.T
        noise = math.sqrt(1 - self.correlation**2) * x[:, second]
        x[:, second] = self.correlation * x[:, first] + noise
        return x

    def log_ratio(self, x: Tensor) -> Tensor:
        """Returns log p(x) - log q(x) in nats, with shape (N,), for x of shape (N, d)."""
        rho = self.correlation
        a, b = x[:, self.pairs].unbind(2)  # (N, d/2)
        squares = (rho**2 * (a**2 + b**2) - 2 * rho * a * b) / (2 * (1 - rho**2))
        return NATS_PER_PAIR * len(self.pairs) - squares.sum(1)


class Quadratic(nn.Module):
    """A quadratic function of its input: a family that holds the log ratio of two Gaussians."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(size, size))
        self.vector = nn.Parameter(torch.zeros(size))
        self.constant = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (N,) of x (N, size)."""
        return ((x @ self.matrix + self.vector) * x).sum(1) + self.constant


class LastOnPast(nn.Module):
    r"""The dependency of the last entry of its input on those before it, of Gaussians.

    Where :math:`x_i` and its past are jointly Gaussian,
    :math:`\log p(x_i | x_{<i}) - \log p(x_i)` is a quadratic function of :math:`x_i` and of one
    linear function of the past, which makes i + 4 parameters instead of :math:`O(i^2)`. The
    product of the two has the weight one, since the linear function has a scale of its own; so
    zero weights are no saddle point.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.regression = nn.Parameter(torch.zeros(size - 1))
        self.polynomial = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (N,) of x (N, size)."""
        past, last = x[:, :-1] @ self.regression, x[:, -1]
        a, b, c, d, e = self.polynomial.unbind()
        return last * (past + a * last + b) + past * (c * past + d) + e


def single(problem: GaussianPairs) -> FactorisedDiscriminator:
    """One classifier of p against q."""
    partition = Partition.steps(problem.pairs.numel())
    factorisation = Factorisation.joint(partition.names)
    return FactorisedDiscriminator(partition, factorisation, {"joint": Quadratic(len(partition))})


def pairs(problem: GaussianPairs) -> FactorisedDiscriminator:
    """A classifier per pair, for who knows the pairs and that they are independent."""
    entries = {f"pair{i + 1}": pair for i, pair in enumerate(problem.pairs.tolist())}
    partition = Partition.indices(entries)
    independence = [independent(*partition.names, under=source) for source in ("p", "q")]
    factorisation = Factorisation.flat(partition.names, independence)
    networks = {term.name: Quadratic(2) for term in factorisation.terms}
    return FactorisedDiscriminator(partition, factorisation, networks)


def chain(problem: GaussianPairs) -> FactorisedDiscriminator:
    """A classifier per dimension, for who knows of q that it is the product of p's marginals."""
    partition = Partition.steps(problem.pairs.numel())
    product_of_marginals = [independent(*partition.names, under="q")]
    product_of_marginals += [shared(name) for name in partition.names]
    factorisation = Factorisation.autoregressive(partition.names, product_of_marginals)
    networks = {term.name: LastOnPast(len(term.parts)) for term in factorisation.terms}
    return FactorisedDiscriminator(partition, factorisation, networks)


@dataclass(frozen=True)
class Method:
    """A form of the log ratio, and how it is trained: Adam on `bridges` classifiers at once."""

    make: Callable[[GaussianPairs], FactorisedDiscriminator]
    updates: int = 500
    learning_rate: float = 4e-2
    annealed: bool = True  # down to zero, linearly
    bridges: Callable[[int], int] = lambda dimensions: 1


def published_bridges(dimensions: int) -> int:
    """Those of the telescoping paper's code: 2, 4, 6, 8 at 40, 80, 160 and 320 dimensions."""
    return max(2, 2 * round(math.log2(dimensions / 20)))


Name = Literal["single", "single-annealed", "telescoping", "pairs", "chain"]
METHODS: dict[Name, Method] = {
    "single": Method(single, 3000, 1e-3, annealed=False),
    "single-annealed": Method(single),
    "telescoping": Method(single, 3000, 5e-3, bridges=published_bridges),
    "pairs": Method(pairs),
    "chain": Method(chain),
}


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    samples: int = 100_000
    """Fixed training samples of p, and as many of q."""
    held_out: int = 100_000
    """Samples of p and of q for the comparison."""
    batch_size: int = 512
    updates: int | None = None
    """Instead of every method's own number."""


def recipe(name: Name, dimensions: int, settings: Settings) -> dict[str, Any]:
    """Says how a run is trained, to tell whether it is there already."""
    method = METHODS[name]
    return {
        **asdict(settings),
        "updates": settings.updates or method.updates,
        "learning_rate": method.learning_rate,
        "annealed": method.annealed,
        "bridges": method.bridges(dimensions),
    }


def waymark(p: Tensor, q: Tensor, position: float) -> Tensor:
    """Moves samples of p towards samples of q: position 0 is p, position 1 is q."""
    return math.sqrt(1 - position**2) * p + position * q


def learn(name: Name, dimensions: int, seed: int, settings: Settings) -> dict[str, Any]:
    """Trains one estimate of the log ratio and compares it with the truth."""
    torch.manual_seed(seed)
    problem = GaussianPairs.draw(dimensions)
    p, q = problem.sample_p(settings.samples), problem.sample_q(settings.samples)
    how = recipe(name, dimensions, settings)
    start = time.process_time()
    # log p - log q is the sum over bridges; all methods but telescoping have one, from p to q.
    bridges = nn.ModuleList(METHODS[name].make(problem) for _ in range(how["bridges"]))
    train(bridges, p, q, how)
    seconds = time.process_time() - start  # of the CPU: other work does not count
    learned, truth = {}, {}
    for source, sample in (("p", problem.sample_p), ("q", problem.sample_q)):
        x = sample(settings.held_out)
        truth[source] = problem.log_ratio(x)
        with torch.no_grad():
            learned[source] = torch.stack([bridge(x) for bridge in bridges]).sum(0)
    estimate = learned["p"].mean().item()
    return {
        "method": name,
        "dimensions": dimensions,
        "seed": seed,
        "truth": problem.divergence,
        "estimate": estimate,
        "standard_error": (learned["p"].std() / math.sqrt(settings.held_out)).item(),
        "relative_error": estimate / problem.divergence - 1,
        "error_p": (learned["p"] - truth["p"]).abs().mean().item(),
        "error_q": (learned["q"] - truth["q"]).abs().mean().item(),
        "terms": sum(len(bridge.networks) for bridge in bridges),
        "parameters": sum(parameter.numel() for parameter in bridges.parameters()),
        "seconds": seconds,
        "recipe": how,
    }


def train(bridges: nn.ModuleList, p: Tensor, q: Tensor, how: Mapping[str, Any]) -> None:
    """Trains discriminators of neighbouring waymarks between p and q on fixed samples of both."""
    criteria = [DiscriminatorLoss(bridge) for bridge in bridges]
    partition = bridges[0].partition
    loaders = [iter(ObservationLoader({"joint": x}, partition, how["batch_size"])) for x in (p, q)]
    optimiser = torch.optim.Adam(bridges.parameters(), lr=how["learning_rate"], fused=True)
    end = 0.0 if how["annealed"] else 1.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, end, how["updates"])
    for _ in tqdm(range(how["updates"]), leave=False, unit="update"):
        real, fake = (next(loader)["joint"] for loader in loaders)
        marks = [waymark(real, fake, i / len(bridges)) for i in range(len(bridges) + 1)]
        optimiser.zero_grad()
        for criterion, (above, below) in zip(criteria, pairwise(marks), strict=True):
            criterion(above, below).backward()
        optimiser.step()
        schedule.step()


def draw_estimates(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the estimates against the truth, and their relative errors: mean and range."""
    styles = {
        "single": ("#D55E00", "v", "single ratio, constant step size"),
        "single-annealed": ("#E69F00", "^", "single ratio, optimiser of the factorised"),
        "telescoping": ("#CC79A7", "s", "telescoping over waymarks (ours)"),
        "pairs": ("#009E73", "D", "factorised, pairs known"),
        "chain": ("#0072B2", "o", "factorised, autoregressive, pairs unknown"),
    }
    truths = sorted({row["truth"] for row in rows})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    left.plot(truths, truths, "--", color="0.4", lw=1.2, label="truth", zorder=5)
    right.axhspan(-5, 5, color="0.9", label="within 5 %", zorder=0)
    right.axhline(0, ls="--", color="0.4", lw=1.2, zorder=1)
    names = [name for name in styles if any(row["method"] == name for row in rows)]
    for i, name in enumerate(names):
        colour, marker, label = styles[name]
        chosen = [row for row in rows if row["method"] == name]
        x = sorted({row["truth"] for row in chosen})
        # beside each other, so that equal errors do not hide each other
        beside = [truth * 1.05 ** (i - len(names) / 2) for truth in x]
        panels = ((left, x, "estimate", 1), (right, beside, "relative_error", 100))
        for axis, places, key, scale in panels:
            several = [[scale * r[key] for r in chosen if r["truth"] == truth] for truth in x]
            means = [sum(values) / len(values) for values in several]
            below = [mean - min(values) for mean, values in zip(means, several, strict=True)]
            above = [max(values) - mean for mean, values in zip(means, several, strict=True)]
            style = {"color": colour, "ms": 5, "capsize": 3, "lw": 1, "label": label}
            axis.errorbar(places, means, [below, above], fmt=f"{marker}-", **style)
    for axis in (left, right):
        axis.set(xscale="log", xlabel="true KL(p, q) in nats (number of dimensions)")
        axis.set_xticks(truths, [f"{truth:g}\n({truth * 4:g})" for truth in truths])
        axis.grid(alpha=0.3)
    left.set(yscale="log", ylabel="mean of d(x) under p in nats (log scale)", title="Estimate")
    low, high = left.get_ylim()
    ticks = [5 * 2**i for i in range(10) if low < 5 * 2**i < high]
    left.set_yticks(ticks, [str(tick) for tick in ticks])
    right.set(ylim=(-100, 50), ylabel="relative error in %", title="Relative error (to +50 %)")
    for axis in (left, right):
        axis.minorticks_off()
    left.legend(fontsize=8)
    band = right.get_legend_handles_labels()
    right.legend(band[0][:1], band[1][:1], fontsize=8)
    figure.suptitle("KL of Gaussian pairs on held-out samples: mean and range over seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(
    methods: tuple[Name, ...] = tuple(METHODS),
    dimensions: tuple[int, ...] = (40, 80, 160, 320),
    seeds: tuple[int, ...] = (0, 1, 2),
    settings: Settings = Settings(),
    smoke: bool = False,
    out: Path = Path("out/density_chasm"),
) -> None:
    """Trains every method at all dimensions and seeds; draws and prints the comparison.

    A run that is there already is not repeated, so an interrupted comparison goes on.

    Args:
        methods: The forms of the log ratio.
        dimensions: The numbers of dimensions d, even; the true KL(p, q) is d/4 nats.
        seeds: The seeds of data, order of the dimensions and training.
        settings: What all runs share.
        smoke: Do a few updates at 8 and 12 dimensions only, to see that everything works.
        out: Where results.json, figure.png and a file per run are written.
    """
    if smoke:
        dimensions, seeds = (8, 12), seeds[:1]
        settings = replace(settings, samples=2000, held_out=1000, updates=20)
    rows: list[dict[str, Any]] = []
    for name, size, seed in tqdm([*product(methods, dimensions, seeds)], unit="run"):
        path = out / "runs" / f"{name}-{size}-{seed}{'-smoke' if smoke else ''}.json"
        if not path.exists():
            write_json(path, learn(name, size, seed, settings))
        rows += read_rows([path])
        if rows[-1]["recipe"] != recipe(name, size, settings):
            raise SystemExit(f"{path} is a run of other settings. Give this one another --out.")
    write_json(out / "results.json", {"rows": rows, **asdict(settings), **environment()})
    draw_estimates(rows, out / "figure.png")
    print(table(rows, COLUMNS))


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(compare, args=arguments, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
