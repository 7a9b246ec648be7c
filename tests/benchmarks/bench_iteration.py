"""What an iteration of experiment 1 (Paired MNIST) costs, in several ways.

Two updates of the discriminators and one of the generator, with the networks of Tables 1 and 2,
batches of 25 and Adam, on one thread. Run with::

    pytest tests/benchmarks/bench_iteration.py --benchmark-only -o python_files='bench_*.py'

or, for ratios, whose ways take turns so that noise hits all alike::

    python tests/benchmarks/bench_iteration.py
"""

import argparse
import statistics
import time

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm as torchs_layer

from factordisc import (
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Observations,
    Partition,
    generator_loss,
)
from factordisc.regularisers import spectral_norm

SIZE, WIDTH, NOISE, BATCH, UPDATES = 28, 128, 50, 25, 2
ADAM = {"lr": 1e-4, "betas": (0.5, 0.999)}
PARTS = {"top": SIZE, "bottom": SIZE}
# Of each network the parts that it sees; the last is subtracted.
HEIGHTS = {"top": SIZE, "bottom": SIZE, "p_dependency": 2 * SIZE, "q_dependency": 2 * SIZE}


def torchs(network):
    """Torch's spectral norm on every linear layer."""
    for layer in network:
        if isinstance(layer, nn.Linear):
            torchs_layer(layer)
    return network


NORMS = {"torch's": torchs, "ours": spectral_norm}


def make_generator():
    return nn.Sequential(
        nn.Linear(NOISE, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 2 * SIZE * SIZE),
        nn.Sigmoid(),
        nn.Unflatten(1, (2 * SIZE, SIZE)),
    )


def make_network(height, norm):
    return norm(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(height * SIZE, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, 1),
        )
    )


def noise():
    return torch.rand(BATCH, NOISE).mul_(2).sub_(1)


def draw_real():
    """A loader is no part of what is measured."""
    joint = torch.rand(BATCH, 2 * SIZE, SIZE)
    top, bottom = torch.rand(2, BATCH, SIZE, SIZE)
    return {"joint": joint, "top": top, "bottom": bottom}


def recombined(pairs):
    top, bottom = pairs.split(SIZE, dim=1)
    return torch.cat([top[torch.randperm(BATCH)], bottom[torch.randperm(BATCH)]], dim=1)


def logit_by_hand(networks, x):
    """The discriminator as the generator sees it."""
    top, bottom = x.split(SIZE, dim=1)
    outputs = networks["top"](top) + networks["bottom"](bottom)
    return (outputs + networks["p_dependency"](x) - networks["q_dependency"](x))[:, 0]


class AsInThePaper:
    """One sub-discriminator after the other, as the authors' loop runs.

    Each has an optimiser, a batch of fakes and two passes, forward and backward, of its own; the
    generator's step computes all gradients of the discriminators, and throws them away.
    """

    def __init__(self, norm=torchs, fused=None):
        self.generator = make_generator()
        self.networks = {name: make_network(height, norm) for name, height in HEIGHTS.items()}
        self.optimisers = {
            name: torch.optim.Adam(network.parameters(), fused=fused, **ADAM)
            for name, network in self.networks.items()
        }
        self.g_optimiser = torch.optim.Adam(self.generator.parameters(), fused=fused, **ADAM)
        self.real = draw_real()

    def sides(self, name):
        if name == "p_dependency":
            return self.real["joint"], recombined(self.real["joint"])
        with torch.no_grad():
            fake = self.generator(noise())
        if name == "q_dependency":
            return fake, recombined(fake)
        return self.real[name], fake.split(SIZE, dim=1)[0 if name == "top" else 1]

    def __call__(self):
        for _ in range(UPDATES):
            for name, network in self.networks.items():
                numerator, denominator = self.sides(name)
                self.optimisers[name].zero_grad()
                softplus(-network(numerator)).mean().backward()
                softplus(network(denominator)).mean().backward()
                self.optimisers[name].step()
        self.g_optimiser.zero_grad()
        softplus(-logit_by_hand(self.networks, self.generator(noise()))).mean().backward()
        self.g_optimiser.step()


class Ours:
    """What the ways below share: one optimiser, one batch of fakes, one loss per update."""

    def __init__(self, compiled):
        self.generator = make_generator()
        self.g_parameters = list(self.generator.parameters())
        self.g_optimiser = torch.optim.Adam(self.g_parameters, fused=True, **ADAM)
        self.compiled = compiled

    def watch(self, module):
        self.parameters = list(module.parameters())
        self.optimiser = torch.optim.Adam(self.parameters, fused=True, **ADAM)
        self.g_loss = self.generators_loss
        if self.compiled:
            self.g_loss = torch.compile(self.g_loss, fullgraph=True)

    def __call__(self):
        for _ in range(UPDATES):
            with torch.no_grad():
                fake = self.generator(noise())
            self.optimiser.zero_grad()
            self.loss(fake).backward()
            self.optimiser.step()
        self.g_optimiser.zero_grad()
        if self.compiled:  # a compiled graph computes all gradients that may be asked for
            for parameter in self.parameters:
                parameter.requires_grad_(False)
            self.g_loss(noise()).backward()
            for parameter in self.parameters:
                parameter.requires_grad_(True)
        else:
            self.g_loss(noise()).backward(inputs=self.g_parameters)
        self.g_optimiser.step()


class ByHand(Ours):
    """Fused by hand: one pass of each network, over both sides."""

    def __init__(self, norm, compiled=False):
        super().__init__(compiled)
        self.networks = nn.ModuleDict({n: make_network(h, norm) for n, h in HEIGHTS.items()})
        self.real = draw_real()
        self.watch(self.networks)
        self.cost = torch.compile(self._cost, fullgraph=True) if compiled else self._cost

    def loss(self, fake):
        joint, (top, bottom) = self.real["joint"], fake.split(SIZE, dim=1)
        return self.cost(
            {
                "top": torch.cat([self.real["top"], top]),
                "bottom": torch.cat([self.real["bottom"], bottom]),
                "p_dependency": torch.cat([joint, recombined(joint)]),
                "q_dependency": torch.cat([fake, recombined(fake)]),
            }
        )

    def _cost(self, rows):
        losses = []
        for name, network in self.networks.items():
            numerator, denominator = network(rows[name]).chunk(2)
            losses += [softplus(-numerator).mean(), softplus(denominator).mean()]
        return torch.stack(losses).sum()

    def generators_loss(self, noise):
        return softplus(-logit_by_hand(self.networks, self.generator(noise))).mean()


class GanByHand(Ours):
    """A plain GAN, which has one discriminator, of pairs."""

    def __init__(self, norm, compiled=False):
        super().__init__(compiled)
        self.network, self.real = make_network(2 * SIZE, norm), draw_real()["joint"]
        self.watch(self.network)
        self.cost = torch.compile(self._cost, fullgraph=True) if compiled else self._cost

    def loss(self, fake):
        return self.cost(torch.cat([self.real, fake]))

    def _cost(self, rows):
        real, fake = self.network(rows).chunk(2)
        return softplus(-real).mean() + softplus(fake).mean()

    def generators_loss(self, noise):
        return softplus(-self.network(self.generator(noise))).mean()


class Package(Ours):
    """The package's own."""

    def __init__(self, norm, compiled=False, form=Factorisation.flat):
        super().__init__(compiled)
        factorisation = form(list(PARTS))
        networks = {
            term.name: make_network(len(term.parts) * SIZE, norm) for term in factorisation.terms
        }
        self.d = FactorisedDiscriminator(Partition(PARTS, dim=1), factorisation, networks)
        self.criterion = DiscriminatorLoss(self.d)
        real = draw_real()
        lone = {} if form is Factorisation.joint else {n: real[n] for n in PARTS}
        self.real = Observations(joint=real["joint"], **lone)
        self.watch(self.d)
        self.cost = self.criterion.cost
        if compiled:
            self.cost = torch.compile(self.cost, fullgraph=True)

    def loss(self, fake):
        if self.compiled:  # what is random stays outside
            return self.cost(self.criterion.rows(self.real, fake))
        return self.criterion(self.real, fake)

    def generators_loss(self, noise):
        return generator_loss(self.d(self.generator(noise)))


def joint(norm, compiled=False):
    return Package(norm, compiled, Factorisation.joint)


FACTORGAN = {"by hand": ByHand, "package": Package}
GAN = {"GAN by hand": GanByHand, "GAN, package": joint}


def measure(benchmark, way):
    benchmark.pedantic(way, rounds=100, warmup_rounds=10)


@pytest.mark.benchmark(group="iteration of FactorGAN")
def test_as_in_the_paper(benchmark):
    measure(benchmark, AsInThePaper())


@pytest.mark.benchmark(group="iteration of FactorGAN")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("way", FACTORGAN)
def test_factorgan(benchmark, way, norm):
    measure(benchmark, FACTORGAN[way](NORMS[norm]))


@pytest.mark.benchmark(group="iteration of a GAN")
@pytest.mark.parametrize("way", GAN)
def test_gan(benchmark, way):
    measure(benchmark, GAN[way](spectral_norm))


@pytest.mark.benchmark(group="iteration, compiled")
@pytest.mark.parametrize("way", FACTORGAN | GAN)
def test_compiled(benchmark, way):
    torch.compiler.reset()
    measure(benchmark, (FACTORGAN | GAN)[way](spectral_norm, compiled=True))


def medians(ways, rounds, together=4):
    """Milliseconds of each way. The ways take turns, each with a few iterations.

    The first of each turn is not counted: in it the caches hold the weights of another way.
    """
    times = {name: [] for name in ways}
    for turn in range(-5, rounds // together):
        for name, way in ways.items():
            for i in range(together + 1):
                start = time.perf_counter()
                way()
                if turn >= 0 and i:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


RATIOS = [  # the first is so many times as fast as the second
    ("by hand, ours", "by hand, torch's"),
    ("package, ours", "package, torch's"),
    ("package, ours", "the paper's way"),
    ("package, ours, compiled", "the paper's way"),
    ("package, ours", "the paper's way, fused Adam"),
    ("by hand, ours", "package, ours"),
    ("by hand, torch's", "package, torch's"),
    ("by hand, ours, compiled", "package, ours, compiled"),
    ("GAN by hand, ours", "GAN, package, ours"),
    ("GAN by hand, ours, compiled", "GAN, package, ours, compiled"),
]


def main():
    """Prints the medians of all ways, and their ratios."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled ways out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = {
        "the paper's way": AsInThePaper(),
        "the paper's way, fused Adam": AsInThePaper(fused=True),
    }
    for name, way in FACTORGAN.items():
        ways |= {f"{name}, {norm}": way(NORMS[norm]) for norm in NORMS}
    ways |= {f"{name}, ours": way(spectral_norm) for name, way in GAN.items()}
    if not options.no_compile:
        ways |= {
            f"{name}, ours, compiled": way(spectral_norm, compiled=True)
            for name, way in (FACTORGAN | GAN).items()
        }
    found = medians(ways, options.rounds)
    print(f"torch {torch.__version__}, one thread, medians of {options.rounds} rounds in turn\n")
    for name, milliseconds in found.items():
        print(f"{name:32}{milliseconds:9.3f} ms")
    print()
    for one, other in RATIOS:
        if one in found and other in found:
            print(f"{other:32} / {one:28}{found[other] / found[one]:6.3f}")


if __name__ == "__main__":
    main()
