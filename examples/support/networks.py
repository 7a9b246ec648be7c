"""The convolutional networks of the paper: the generator of Table 4, the discriminator of Table 5.

Where the tables leave something open, this is what was chosen, and why:

- The slope of LeakyReLU is PyTorch's default, 0.01, as in the authors' public code.
- Table 5 prints a LeakyReLU after the last layer. It would divide every negative logit by 100, so
  that the network could hardly say "fake"; the output is a log density ratio, which has either
  sign. The authors' code has none there, nor have we.
- For 64x64 images the authors' code stops one convolution earlier than Tables 4 and 5 (at 4x4x256
  in the discriminator, from 4x4x512 in the generator). We follow the tables.
- The paper does not say how the generator starts. From PyTorch's default (the authors' code has
  no other) the pixels of different samples deviate by 1e-5: the noise is lost on the way, and
  many updates pass before it counts. We draw weights that keep the variance (He et al., 2015):
  0.08.
- A filter of 4x4 keeps the size at stride 1 only with padding of 1 before and 2 after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

NOISE = 50  # the generator's input, uniform in [-1, 1]
HALVINGS = 5  # the strided convolutions of a discriminator


def make_generator(channels: int, filters: int = 64) -> nn.Module:
    """The generator of Table 4: noise (N, 50) to images (N, channels, 64, 64) in [0, 1].

    Args:
        channels: The channels of all parts together.
        filters: The filters of the last hidden layer; the layers before it have 2, 4, 8 and 16
            times as many. The paper's number is 64.
    """
    widths = [16 * filters, 8 * filters, 4 * filters, 2 * filters, filters]
    layers: list[nn.Module] = [
        nn.Unflatten(1, (NOISE, 1, 1)),
        nn.ConvTranspose2d(NOISE, widths[0], 4),
        nn.ReLU(),
    ]
    for fewer, more in pairwise(widths):
        layers += [nn.ConvTranspose2d(fewer, more, 4, stride=2, padding=1), nn.ReLU()]
    layers += [nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(filters, channels, 4), nn.Sigmoid()]
    for layer in layers:
        if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)):
            _keep_variance(layer)
    return nn.Sequential(*layers)


def _keep_variance(layer: nn.ConvTranspose2d | nn.Conv2d) -> None:
    """Draws weights with variance 2 / inputs, for the ReLU before or after the layer."""
    inputs = layer.in_channels * math.prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose2d):
        # of a filter's 16 weights a pixel meets 4 at stride 2; the first layer's input is 1x1
        inputs = layer.in_channels * (1 if layer.stride == (1, 1) else 4)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs))
    nn.init.zeros_(layer.bias)


def make_critic(
    shape: tuple[int, int, int], filters: int = 32, *, normalise: bool = True
) -> nn.Module:
    """The discriminator of Table 5: images (N, C, H, W) to logits (N, 1).

    Args:
        shape: The channels, height and width of its input.
        filters: The filters of the first layer; the others have 2, 4, 8 and 16 times as many. The
            paper's number is 32.
        normalise: Normalise every layer spectrally.

    Raises:
        ValueError: If height or width is not a multiple of 32.
    """
    channels, height, width = shape
    side = 2**HALVINGS
    if height % side or width % side or min(shape) < 1:
        raise ValueError(
            f"make_critic expects a height and a width that are multiples of {side}, since it "
            f"halves them {HALVINGS} times, but got the shape {tuple(shape)}."
        )
    normalised: Callable[[nn.Module], nn.Module] = (
        spectral_norm if normalise else lambda layer: layer
    )
    widths = [channels, *(filters * 2**i for i in range(HALVINGS))]
    layers: list[nn.Module] = []
    for fewer, more in pairwise(widths):
        layers += [
            normalised(nn.Conv2d(fewer, more, 4, stride=2, padding=1)),
            nn.LeakyReLU(),
        ]
    features = widths[-1] * (height // side) * (width // side)
    layers += [nn.Flatten(), normalised(nn.Linear(features, 1, bias=False))]
    return nn.Sequential(*layers)


def bounded(output: Tensor, bound: float) -> Tensor:
    """Keeps logits (N, 1) between -`bound` and `bound` (nats), with shape (N,).

    Not in the paper. A p-dependency that learns from n pairs meets generated images that are like
    none of them, and may answer with log ratios far above those of its own pairs, which the
    generator then takes for success. Of n pairs whose parts are permuted each by itself, the
    dependency is at most log n: a natural bound.
    """
    return bound * torch.tanh(output.squeeze(1) / bound)
