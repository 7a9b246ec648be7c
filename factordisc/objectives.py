"""How a ratio is learned: what a pair of outputs costs, and what an output says of the ratio."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["Logistic"]


@runtime_checkable
class Objective(Protocol):
    """A loss whose optimum is a known function of a density ratio.

    Outputs have shape (N,). A loss that averages over the last dimension only can also be given
    the outputs of T terms at once, with shape (T, N), and then returns shape (T,): far fewer
    small operations for many terms. One that averages over everything is called term by term.
    """

    def loss(self, numerator_output: Tensor, denominator_output: Tensor) -> Tensor:
        """Returns the cost; each class is averaged by itself."""
        ...

    def log_ratio(self, output: Tensor) -> Tensor:
        """Returns the log density ratio of the optimal output, entry by entry, in nats."""
        ...


class Logistic:
    r"""Learns a ratio by logistic regression: the loss of the original GAN.

    .. math:: \mathbb{E}_\text{numerator} \log(1 + e^{-d(x)})
        + \mathbb{E}_\text{denominator} \log(1 + e^{d(x)})

    Its minimum over all functions is at d(x) = log numerator(x) - log denominator(x). Each
    class is averaged by itself, so unequal numbers of rows leave the ratio unbiased. At
    chance (d = 0) it is 2 log 2 = 1.386 nats.

    References:
        Goodfellow et al. (2014), Eq. 1; Stoller et al. (2020), Eq. 1.

    Example:
        >>> Logistic().loss(torch.zeros(4), torch.zeros(2))
        tensor(1.3863)
    """

    def loss(self, numerator_output: Tensor, denominator_output: Tensor) -> Tensor:
        """Returns the cost of the outputs for rows of the two sides.

        Args:
            numerator_output: Logits of rows of the numerator, with shape (N,) or (T, N).
            denominator_output: Logits of rows of the denominator, with shape (M,) or (T, M).

        Returns:
            A scalar, or one per term with shape (T,), in nats.
        """
        return softplus(-numerator_output).mean(-1) + softplus(denominator_output).mean(-1)

    def log_ratio(self, output: Tensor) -> Tensor:
        """Returns `output` itself: a logit of this loss is a log ratio, in nats."""
        return output

    def __repr__(self) -> str:
        return "Logistic()"
