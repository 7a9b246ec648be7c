"""What the package adds to the arithmetic of the networks: time by number of parts, and memory.

Run with::

    pytest tests/benchmarks/bench_overhead.py --benchmark-only -o python_files='bench_*.py'

or, for the figures of docs/performance.md, whose ways take turns so that noise hits all alike::

    python tests/benchmarks/bench_overhead.py [--plot DIR] [--against CHECKOUT]

where CHECKOUT is another version of the repository, measured in turn with this one.
"""

import argparse
import copy
import cProfile
import json
import math
import os
import pstats
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.profiler import ProfilerActivity, profile

import factordisc
from factordisc import (
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Observations,
    Partition,
    generator_loss,
    independent,
    markov,
)

ROOT = Path(__file__).parents[2]
NUMBERS = (2, 8, 32, 64)
STAGES = {"rows": "criterion.rows", "cost": "criterion.cost", "d(x)": "d(x)"}
BATCH = 64


def take_turns(ways, calls, rounds):
    """Microseconds per call, by way: a list of one figure per round."""
    times = {name: [] for name in ways}
    for turn in range(-1, rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                way()
            if turn >= 0:
                times[name].append(1e6 * (time.perf_counter() - start) / calls)
    return times


def least(ways, calls, rounds):
    """Microseconds per call, by way: what a call costs where nothing else disturbs it."""
    return {name: min(each) for name, each in take_turns(ways, calls, rounds).items()}


# --- the flat form of K parts ---


class FlatForm:
    """The flat form of K parts of two columns, with a small network for every term."""

    def __init__(self, number):
        partition = Partition({f"x{i}": 2 for i in range(number)})
        form = Factorisation.flat(partition.names)
        networks = {term.name: nn.Linear(2 * len(term.parts), 1) for term in form.terms}
        self.d = FactorisedDiscriminator(partition, form, networks)
        self.criterion = DiscriminatorLoss(self.d)
        self.pairs, self.fake = torch.randn(2, BATCH, 2 * number)
        self.lone = {name: torch.randn(BATCH, 2) for name in ("x0", "x1")}
        self.drawn = self.rows()
        self.joined = [
            (networks[name], torch.cat([rows.numerator, rows.denominator]))
            for name, rows in self.drawn.items()
        ]
        self.taken = [
            (networks[term.name], partition.take(self.fake, term.parts)) for term in form.terms
        ]

    def rows(self):
        return self.criterion.rows(Observations(joint=self.pairs, **self.lone), self.fake)

    def cost(self):
        return self.criterion.cost(self.drawn)

    def score(self):
        return self.d(self.fake)

    def bare_cost(self):
        """The networks of `cost`, on the rows that it evaluates them on."""
        return [network(rows) for network, rows in self.joined]

    def bare_score(self):
        return [network(rows) for network, rows in self.taken]

    def ways(self):
        return {
            "rows": self.rows,
            "cost": self.cost,
            "d(x)": self.score,
            "networks of cost": self.bare_cost,
            "networks of d(x)": self.bare_score,
        }


@pytest.mark.benchmark(group="flat form")
@pytest.mark.parametrize("way", ["rows", "cost", "d(x)", "networks of cost", "networks of d(x)"])
@pytest.mark.parametrize("number", NUMBERS)
def test_flat_form(benchmark, number, way):
    benchmark(FlatForm(number).ways()[way])


def overheads(rounds=15):
    """By stage, microseconds over bare networks for each number of parts."""
    found = {stage: [] for stage in STAGES}
    for number in NUMBERS:
        each = least(FlatForm(number).ways(), 2 + 160 // number, rounds)
        found["rows"].append(each["rows"])
        found["cost"].append(each["cost"] - each["networks of cost"])
        found["d(x)"].append(each["d(x)"] - each["networks of d(x)"])
    return found


def per_part(figures):
    """The slope over the numbers of parts."""
    return (figures[-1] - figures[0]) / (NUMBERS[-1] - NUMBERS[0])


def calls_of_rows():
    """How many calls of functions of the package draw the rows of four terms."""
    form, profiler = FlatForm(2), cProfile.Profile()
    form.rows()
    profiler.enable()
    form.rows()
    profiler.disable()
    root = os.path.dirname(factordisc.__file__)
    stats = pstats.Stats(profiler).stats
    return sum(figures[1] for place, figures in stats.items() if place[0].startswith(root))


# --- a Markov chain, whose windows share networks ---


class Chain:
    """A Markov chain of 50 steps: 148 terms, three networks."""

    STEPS, WIDTH = 50, 4

    def __init__(self):
        names = [str(i + 1) for i in range(self.STEPS)]
        form = Factorisation.autoregressive(names, [markov(1, source) for source in ("p", "q")])
        kinds = {}

        def network(term):
            kind = (len(term.parts), len(term.denominator), term.numerator[0].source)
            inputs = self.WIDTH * len(term.parts)
            layers = (nn.Flatten(), nn.Linear(inputs, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
            return kinds.setdefault(kind, nn.Sequential(*layers))

        networks = {term.name: network(term) for term in form.terms}
        partition = Partition.steps(self.STEPS)
        self.criterion = DiscriminatorLoss(FactorisedDiscriminator(partition, form, networks))
        self.real, self.fake = torch.randn(2, BATCH, self.STEPS, self.WIDTH)
        together = {}
        for name, rows in self.rows().items():
            sides = [rows.numerator, rows.denominator]
            together.setdefault(networks[name], []).extend(sides)
        self.joined = [(network, torch.cat(rows)) for network, rows in together.items()]

    def rows(self):
        return self.criterion.rows(self.real, self.fake)

    def networks(self):
        """The arithmetic of a step: every network once, forward and backward."""
        sum(network(rows).sum() for network, rows in self.joined).backward()


@pytest.mark.benchmark(group="a Markov chain of 50 steps")
@pytest.mark.parametrize("way", ["rows", "networks"])
def test_chain(benchmark, way):
    benchmark(getattr(Chain(), way))


def chain(rounds=9):
    """Microseconds of drawing the rows of a chain, and of its networks."""
    model = Chain()
    return least({"rows": model.rows, "networks": model.networks}, 5, rounds)


# --- many networks of one architecture ---


class Marginals:
    """A whole step of the flat form of 32 independent parts, whose networks are alike."""

    PARTS, COLUMNS = 32, 8

    def __init__(self, networks, stack):
        partition = Partition({f"x{i}": self.COLUMNS for i in range(self.PARTS)})
        assuming = [independent(*partition.names, under=source) for source in ("p", "q")]
        form = Factorisation.flat(partition.names, assuming)
        self.d = FactorisedDiscriminator(partition, form, copy.deepcopy(networks), stack=stack)
        self.criterion = DiscriminatorLoss(self.d)
        self.optimiser = torch.optim.Adam(self.d.parameters(), 1e-4)
        self.real, self.fake = torch.randn(2, BATCH, self.COLUMNS * self.PARTS)

    @classmethod
    def both(cls, width):
        networks = {
            f"x{i}": nn.Sequential(
                nn.Linear(cls.COLUMNS, width),
                nn.LeakyReLU(0.2),
                nn.Linear(width, width),
                nn.LeakyReLU(0.2),
                nn.Linear(width, 1),
            )
            for i in range(cls.PARTS)
        }
        return {"stacked": cls(networks, True), "one by one": cls(networks, False)}

    def __call__(self):
        loss = self.criterion(self.real, self.fake)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        fake = self.fake.clone().requires_grad_()
        generator_loss(self.d(fake)).backward(inputs=[fake])


@pytest.mark.benchmark(group="a step of 32 marginals")
@pytest.mark.parametrize("way", ["stacked", "one by one"])
@pytest.mark.parametrize("width", [32, 128])
def test_stack(benchmark, width, way):
    benchmark(Marginals.both(width)[way])


def stacking(width, rounds=24):
    """Medians of both ways, in microseconds."""
    times = take_turns(Marginals.both(width), 4, rounds)
    return {name: statistics.median(each) for name, each in times.items()}


# --- memory ---


class Images:
    """A step of the flat form of two parts on 64x64 images, by the package and by hand.

    Args:
        inplace: Whether activations overwrite what they are given.
    """

    def __init__(self, inplace=False):
        partition = Partition({"a": 3, "b": 3})
        self.networks = {
            name: self.network(3 if name in partition.names else 6, inplace)
            for name in ("a", "b", "p_dependency", "q_dependency")
        }
        form = Factorisation.flat(partition.names)
        self.d = FactorisedDiscriminator(partition, form, self.networks)
        self.criterion = DiscriminatorLoss(self.d)
        self.real, self.fake = torch.randn(2, 32, 6, 64, 64)

    @staticmethod
    def network(channels, inplace):
        return nn.Sequential(
            nn.Conv2d(channels, 16, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace),
            nn.Conv2d(32, 1, 16),
            nn.Flatten(),
        )

    def package(self):
        self.criterion(self.real, self.fake).backward()

    def by_hand(self):
        """One pass of each network over both sides, no copy kept longer than it is needed."""
        total = torch.zeros(())
        for name, network in self.networks.items():
            above, below = self.sides(name)
            n, rows = len(above), torch.cat([above, below])
            del above, below
            output = network(rows)[:, 0]
            total = total + softplus(-output[:n]).mean() + softplus(output[n:]).mean()
        total.backward()

    def sides(self, name):
        if name in ("a", "b"):
            half = slice(0, 3) if name == "a" else slice(3, 6)
            return self.real[:, half], self.fake[:, half]
        x = self.real if name == "p_dependency" else self.fake
        orders = [torch.randperm(len(x)) for _ in range(2)]
        parts = [part[order] for part, order in zip(x.split(3, 1), orders, strict=True)]
        return x, torch.cat(parts, 1)


def peak_bytes(step, parameters):
    """The most bytes of tensors that a step holds at once, over what there was before.

    The profiler reports every allocation and release of PyTorch's allocator; releases of what
    was allocated before it started are not among them. Memory that a kernel takes elsewhere
    (the scratch space of oneDNN) is not seen, and is the same for both ways.
    """
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = None
        step()
    for parameter in parameters:
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def memory(inplace=False):
    """Peak bytes of a step on images, of both ways."""
    images = Images(inplace)
    parameters = list(images.d.parameters())
    return {
        "package": peak_bytes(images.package, parameters),
        "by hand": peak_bytes(images.by_hand, parameters),
    }


@pytest.mark.benchmark(group="memory of a step")
@pytest.mark.parametrize("inplace", [False, True])
def test_memory(benchmark, inplace):
    peak = benchmark.pedantic(memory, (inplace,))
    benchmark.extra_info |= {way: f"{held / 2**20:.1f} MiB" for way, held in peak.items()}
    assert peak["package"] >= 0.9 * peak["by hand"]


# --- all in one run ---


def measure():
    """Everything that can be compared with another version."""
    return {
        "overheads": overheads(),
        "calls": calls_of_rows(),
        "chain": chain(),
        "memory": {"out of place": memory(), "in place": memory(inplace=True)},
    }


def measured_of(checkouts, rounds):
    """Measures checkouts in turn, each in processes of its own; of times the least counts."""
    found = {checkout: [] for checkout in checkouts}
    for _ in range(rounds):
        for checkout, each in found.items():
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            command = [sys.executable, __file__, "--json"]
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            each.append(json.loads(output.stdout))
    return [smallest(each) for each in found.values()]


def smallest(each):
    """The least of every figure, whatever structure holds them."""
    if isinstance(each[0], dict):
        return {key: smallest([one[key] for one in each]) for key in each[0]}
    if isinstance(each[0], list):
        return [min(column) for column in zip(*each, strict=True)]
    return min(each)


def lines_of(found):
    """By what was measured, its figure."""
    lines = {}
    for stage, figures in found["overheads"].items():
        for number, figure in zip(NUMBERS, figures, strict=True):
            lines[f"{STAGES[stage]}, {number} parts, us"] = figure
        lines[f"{STAGES[stage]}, per part, us"] = per_part(figures)
    lines["calls for the rows of four terms"] = found["calls"]
    lines["chain, rows, ms"] = found["chain"]["rows"] / 1e3
    lines["chain, networks, ms"] = found["chain"]["networks"] / 1e3
    lines["chain, rows / networks"] = found["chain"]["rows"] / found["chain"]["networks"]
    for activations, peak in found["memory"].items():
        for way, held in peak.items():
            lines[f"peak, {activations}, {way}, MiB"] = held / 2**20
        lines[f"peak, {activations}, package / by hand"] = peak["package"] / peak["by hand"]
    return lines


def draw(path, now, before):
    """A panel per stage: overhead over the number of parts."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), sharey=True, layout="constrained")
    for ax, stage in zip(axes, STAGES, strict=True):
        ax.plot(NUMBERS, now["overheads"][stage], "o-", color="#1f6fb4", label="now")
        if before is not None:
            ax.plot(NUMBERS, before["overheads"][stage], "s--", color="#c4661f", label="before")
        ax.set(xscale="log", yscale="log", xlabel="parts K", title=STAGES[stage])
        ax.set_xticks(NUMBERS, map(str, NUMBERS))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("µs over bare networks")
    if before is not None:
        axes[0].legend(frameon=False)
    figure.savefig(path, dpi=200)


def main():
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--plot", type=Path, help="a folder for overhead.png")
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--rounds", type=int, default=2, help="processes per version")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.json:
        print(json.dumps(measure()))
        return
    checkouts = [ROOT] if options.against is None else [options.against.resolve(), ROOT]
    *before, now = measured_of(checkouts, options.rounds)
    print(f"torch {torch.__version__}, one thread, batches of {BATCH}\n")
    headings = ["before", "now", "ratio"] if before else ["now"]
    print(f"{'':42}" + "".join(f"{heading:>10}" for heading in headings))
    lines = [lines_of(found) for found in (*before, now)]
    for name, figure in lines[-1].items():
        columns = [each[name] for each in lines]
        columns += [columns[0] / figure if figure else math.nan] if before else []
        print(f"{name:42}" + "".join(f"{column:10.2f}" for column in columns))
    print()
    for width in (32, 128):
        both = stacking(width)
        one_by_one, stacked = both["one by one"] / 1e3, both["stacked"] / 1e3
        print(
            f"step of 32 MLPs of width {width}: {one_by_one:.2f} ms, stacked {stacked:.2f} ms, "
            f"{one_by_one / stacked:.2f} times as fast"
        )
    if options.plot is not None:
        options.plot.mkdir(parents=True, exist_ok=True)
        draw(options.plot / "overhead.png", now, before[0] if before else None)


if __name__ == "__main__":
    main()
