"""GANs of a few hundred weights, with the networks that the experiments train."""

import random
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.utils.parametrizations import spectral_norm

from factordisc import (
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Partition,
    independent,
)
from support.training import Machine, Training

BATCH = 4
CPU = Machine("cpu")
PAIRS, SINGLES = 10, 30
ADAM = {"lr": 1e-2, "betas": (0.5, 0.999)}


def images(number, channels, seed):
    return torch.rand(number, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(channels, normalise=True):
    norm = spectral_norm if normalise else nn.Identity()
    return nn.Sequential(
        norm(nn.Conv2d(channels, 4, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(4, 4, 4, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(16, 1),
    )


class ConvGenerator(nn.Module):
    """Noise (N, 3) to images (N, 2, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4 * 4 * 4),
            nn.ReLU(),
            nn.Unflatten(1, (4, 4, 4)),
            nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, noise):
        return self.layers(noise)


class UNet(nn.Module):
    """Images (N, 1, 8, 8) to images, with batch norm, a skip and dropout for noise."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)
        )
        self.bottom = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.up = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        down = self.down(x)
        both = torch.cat([down, self.dropout(self.bottom(down))], dim=1)
        return torch.sigmoid(self.up(interpolate(both, scale_factor=2.0)))


def loader(partition, datasets, seed=0):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        rng = torch.Generator().manual_seed(seed)
        return ObservationLoader(datasets, partition, BATCH, pool=False, rng=rng)


def draw(generator, real, rng):
    return generator(torch.rand(BATCH, 3, generator=rng))


def factorgan(machine=CPU, make_fake=draw, normalise=True, **options):
    """Two halves of an image, the channels, of which few are seen together."""
    torch.manual_seed(0)
    partition = Partition({"a": 1, "b": 1})
    factorisation = Factorisation.flat(partition.names)
    networks = {t.name: network(len(t.parts), normalise) for t in factorisation.terms}
    pairs, singles = images(PAIRS, 2, 1), images(SINGLES, 2, 2)
    datasets = {"joint": pairs, "a": singles[:, :1], "b": singles[:, 1:]}
    return Training(
        ConvGenerator(),
        FactorisedDiscriminator(partition, factorisation, networks),
        loader(partition, datasets),
        make_fake,
        ADAM,
        2,
        7,
        machine,
        **options,
    )


def cyclegan(machine=CPU, **options):
    """Two U-Nets from each part to the other, called four times in a step."""
    torch.manual_seed(0)
    partition = Partition.fields("a", "b")
    alone = [independent("a", "b", under="p"), independent("a", "b", under="q")]
    factorisation = Factorisation.flat(partition.names, assuming=alone)
    networks = {name: network(1) for name in partition.names}
    datasets = {"a": images(SINGLES, 1, 1), "b": images(SINGLES, 1, 2)}

    def translate(generator, real, rng):
        # what users' code draws from by the way
        scale = 1 - 0.01 * random.random() * np.random.rand()  # noqa: NPY002
        return scale * generator["a"](real["b"]), generator["b"](real["a"])

    def cycle(generator, real, fake):
        a, b = fake
        return (generator["a"](b) - real["a"]).abs().mean() + (
            generator["b"](a) - real["b"]
        ).abs().mean()

    return Training(
        nn.ModuleDict({"a": UNet(), "b": UNet()}),
        FactorisedDiscriminator(partition, factorisation, networks),
        loader(partition, datasets),
        translate,
        ADAM,
        1,
        7,
        machine,
        regulariser=cycle,
        **options,
    )


def full_state(training):
    """All of a training's state but its clock, copied."""
    state = {k: v for k, v in training.state_dict().items() if k != "seconds"}
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, state)


def assert_equal_states(one, other):
    """Bit for bit, and of the same structure."""
    flat, structure = torch.utils._pytree.tree_flatten(one)
    flat_other, structure_other = torch.utils._pytree.tree_flatten(other)
    assert structure == structure_other
    for a, b in zip(flat, flat_other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
