"""Scores of generated samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

# Where a class never occurs, the ratio of equation 5 is 0/0. With this in the denominator it is
# 0; with 10,000 samples the smallest product of marginals that does occur is 1e-8.
EPSILON = 1e-12


class _Features(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features = classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


class FrechetDistance:
    """The Fréchet distance of generated to real images in the features of a classifier.

    Args:
        classifier: A module with ``features(images)`` and ``num_features``.
        real: The real images, with shape (N, *).
    """

    def __init__(self, classifier: nn.Module, real: Tensor) -> None:
        self.metric = FrechetInceptionDistance(
            _Features(classifier), normalize=True, reset_real_features=False
        ).to(real.device)
        for batch in real.split(1000):
            self.metric.update(batch, real=True)

    def __call__(self, images: Tensor) -> float:
        """Returns the distance (squared, as usual; lower is better) of images (M, *)."""
        self.metric.reset()
        for batch in images.split(1000):
            self.metric.update(batch, real=False)
        return float(self.metric.compute())


def class_table(upper: Tensor, lower: Tensor, classes: int) -> Tensor:
    """Returns how often pairs of classes occur, with shape (classes, classes), summing to 1."""
    counts = torch.bincount(upper * classes + lower, minlength=classes**2)
    return counts.reshape(classes, classes).double() / len(upper)


def dependency_error(real: Tensor, generated: Tensor) -> float:
    """Returns d_dep: the mean absolute difference of joint over product of marginals.

    References:
        Stoller et al. (2020), Eq. 5.

    Args:
        real: The table of class pairs in real data, from `class_table`.
        generated: The same of generated data.

    Returns:
        The error; lower is better, 0 for the same dependence.
    """

    def ratio(table: Tensor) -> Tensor:
        return table / (torch.outer(table.sum(1), table.sum(0)) + EPSILON)

    return (ratio(real) - ratio(generated)).abs().mean().item()
