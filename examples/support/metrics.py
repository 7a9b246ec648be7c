"""Scores of generated samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

# Where a class never occurs, the ratio of equation 5 is 0/0. With this in the denominator it is
# 0; with 10,000 samples the smallest product of marginals that does occur is 1e-8.
EPSILON = 1e-12


class FrechetDistance:
    """The Fréchet distance of generated to real samples in a space of features.

    Args:
        real: Features of real samples, with shape (N, F).
    """

    def __init__(self, real: Tensor) -> None:
        features = nn.Identity()
        features.num_features = real.shape[1]  # torchmetrics asks its extractor for this
        # no sync: of several processes that train, one scores
        self.metric = FrechetInceptionDistance(
            features, reset_real_features=False, sync_on_compute=False
        )
        self.metric.to(real.device).update(real, real=True)

    def __call__(self, generated: Tensor) -> float:
        """Returns the (squared) distance of features (M, F); lower is better."""
        self.metric.reset()
        self.metric.update(generated, real=False)
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
