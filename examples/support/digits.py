"""Handwritten digits, and pairs of them whose classes depend on each other (Section 4.1)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 10


class Digits(NamedTuple):
    """Images of digits, with shape (N, S, S), float32 in [0, 1], and their classes (N,), int64."""

    images: Tensor
    labels: Tensor


def embedded() -> tuple[Digits, Digits]:
    """Returns the 8x8 digits that scikit-learn ships: 1,297 for training and 500 for testing.

    They come from 43 writers in an order in which neighbours are alike, so a fixed shuffle
    comes before the split.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    everything = Digits(
        torch.from_numpy(images[order] / 16).float().reshape(-1, 8, 8),
        torch.from_numpy(labels[order]).long(),
    )
    return Digits(*(t[:1297] for t in everything)), Digits(*(t[1297:] for t in everything))


def partners(labels: Tensor, pool: Tensor, same: float, rng: torch.Generator) -> Tensor:
    """Draws a lower digit for every upper one.

    Its class equals the upper digit's with probability `same`, else it is one of the nine
    others, uniformly; it is any image of that class. (The authors' code draws "else" from all
    ten classes.)

    Args:
        labels: The classes of the upper digits, with shape (N,).
        pool: The classes of the images to choose from, with shape (M,).
        same: The probability lambda.
        rng: The source of the choices.

    Returns:
        The number of the chosen image in the pool, with shape (N,), int64.
    """
    others = torch.randint(1, CLASSES, labels.shape, generator=rng)
    differs = torch.rand(labels.shape, generator=rng) >= same
    classes = torch.where(differs, (labels + others) % CLASSES, labels)
    by_class = pool.argsort(stable=True)
    counts = torch.bincount(pool, minlength=CLASSES)
    starts = counts.cumsum(0) - counts
    within = torch.rand(labels.shape, generator=rng, dtype=torch.float64) * counts[classes]
    return by_class[starts[classes] + within.long()]


def stacked(digits: Digits, same: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stacks every digit on a partner.

    Returns:
        The pairs, with shape (N, 2S, S), and the classes of upper and lower digit, (N, 2).
    """
    lower = partners(digits.labels, digits.labels, same, rng)
    images = torch.cat([digits.images, digits.images[lower]], dim=1)
    return images, torch.stack([digits.labels, digits.labels[lower]], dim=1)
