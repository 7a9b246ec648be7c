"""What the package costs over the same work by hand.

Run with::

    pytest tests/benchmarks/bench_core.py --benchmark-only -o python_files='bench_*.py'
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Partition,
    independent,
    markov,
)

IMAGES = Partition({"a": 3, "b": 3})


def permuted_by_hand(x, sizes):
    parts = torch.split(x, sizes, dim=1)
    return torch.cat([part[torch.randperm(len(x))] for part in parts], dim=1)


@pytest.mark.benchmark(group="sampler, (64, 6, 64, 64) images")
@pytest.mark.parametrize("how", ["sampler", "by hand"])
def test_sampler_on_images(benchmark, how):
    x, sampler = torch.randn(64, 6, 64, 64), DependencySampler(IMAGES)
    y = benchmark(sampler, x) if how == "sampler" else benchmark(permuted_by_hand, x, [3, 3])
    assert y.shape == x.shape


@pytest.mark.benchmark(group="sampler, 1e5 rows of 8 columns")
@pytest.mark.parametrize("how", ["sampler", "by hand"])
def test_sampler_on_a_table(benchmark, how):
    x, partition = torch.randn(100_000, 8), Partition.steps(8)
    sampler = DependencySampler(partition)
    y = benchmark(sampler, x) if how == "sampler" else benchmark(permuted_by_hand, x, [1] * 8)
    assert y.shape == x.shape


def mlp(width):
    return nn.Sequential(nn.Linear(width, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))


def conv(width):
    return nn.Sequential(
        nn.Conv2d(width, 16, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.LazyLinear(1),
    )


def step_by_hand(networks, real, fake):
    """The flat form of two parts, as one writes it without the package."""
    half = real.shape[1] // 2
    shuffled = [permuted_by_hand(x, [half, half]) for x in (real, fake)]
    sides = {
        "a": (real[:, :half], fake[:, :half]),
        "b": (real[:, half:], fake[:, half:]),
        "p_dependency": (real, shuffled[0]),
        "q_dependency": (fake, shuffled[1]),
    }
    total = torch.zeros(())
    for name, (above, below) in sides.items():
        output = networks[name](torch.cat([above, below]))[:, 0]
        total = total + softplus(-output[: len(above)]).mean()
        total = total + softplus(output[len(above) :]).mean()
    return total


@pytest.mark.benchmark(group="step of the criterion, forward and backward")
@pytest.mark.parametrize("how", ["criterion", "by hand"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_step(benchmark, kind, how):
    shape, network = {"mlp": ((64, 64), mlp), "conv": ((64, 6, 32, 32), conv)}[kind]
    partition = Partition({"a": shape[1] // 2, "b": shape[1] // 2})
    real, fake = torch.randn(shape), torch.randn(shape)
    widths = {"a": shape[1] // 2, "b": shape[1] // 2}
    widths |= {"p_dependency": shape[1], "q_dependency": shape[1]}
    networks = {name: network(width) for name, width in widths.items()}
    factorisation = Factorisation.flat(["a", "b"])
    criterion = DiscriminatorLoss(FactorisedDiscriminator(partition, factorisation, networks))
    steps = {
        "criterion": lambda: criterion(real, fake).backward(),
        "by hand": lambda: step_by_hand(networks, real, fake).backward(),
    }
    benchmark(steps[how])
    assert all(parameter.grad is not None for parameter in criterion.parameters())


NAMES = [f"x{i}" for i in range(200)]
GROUPS = {
    f"g{i}": {f"g{i}_{j}": NAMES[i + j : i + j + 5] for j in (0, 5)} for i in range(0, 200, 10)
}
FORMS = {
    "flat": lambda assuming: Factorisation.flat(NAMES, assuming),
    "hierarchical": lambda assuming: Factorisation.hierarchical(GROUPS, assuming),
    "autoregressive": lambda assuming: Factorisation.autoregressive(NAMES, assuming),
    "patterns": lambda assuming: Factorisation.from_patterns(
        NAMES, ["joint", *(tuple(NAMES[:i]) for i in range(2, 200))], assuming
    ),
}
ASSUMING = {
    "nothing": [],
    "all parts independent": [independent(*NAMES, under="p")],
    "Markov of order 2": [markov(2, under="p")],
}


@pytest.mark.benchmark(group="building and proving a form of 200 parts")
@pytest.mark.parametrize("assuming", ASSUMING)
@pytest.mark.parametrize("form", FORMS)
def test_form_of_200_parts(benchmark, form, assuming):
    factorisation = benchmark.pedantic(FORMS[form], (ASSUMING[assuming],), rounds=3)
    assert len(factorisation.parts) == 200


STEPS, ORDER = 200, 2


@pytest.mark.benchmark(group="d(x) of a Markov chain of 200 steps, batch of 64")
@pytest.mark.parametrize("networks", ["one for all windows", "one per term"])
def test_windows_share_a_call(benchmark, networks):
    """A chain of 200 steps has 200 marginals and 398 windows."""
    names = [str(i + 1) for i in range(STEPS)]
    chain = Factorisation.autoregressive(names, [markov(ORDER, s) for s in ("p", "q")])
    shared: dict[object, nn.Module] = {}

    def network(term):
        kind = (len(term.parts), term.numerator[0].source, len(term.denominator))
        make = nn.Sequential(nn.Flatten(), mlp(4 * len(term.parts)))
        return shared.setdefault(kind, make) if networks == "one for all windows" else make

    d = FactorisedDiscriminator(
        Partition.steps(STEPS), chain, {term.name: network(term) for term in chain.terms}
    )
    y = benchmark(d, torch.randn(64, STEPS, 4))
    assert y.shape == (64,)
