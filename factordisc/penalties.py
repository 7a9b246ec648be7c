"""What is added to a term's loss: penalties on the gradient of its log ratio."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from factordisc.layouts import Tensors, outward

if TYPE_CHECKING:
    from factordisc.losses import TermFunction, TermRows

__all__ = ["GradientPenalty"]

Place = Literal["numerator", "denominator", "between", "generated"]


class GradientPenalty:
    r"""Penalises the gradient of a term's log ratio with respect to its rows.

    .. math:: w \, \mathbb{E}_x \, (\lVert \nabla_x d(x) \rVert - t)^2

    The norm is of a row, over all its floating-point parts together; it is computed in float32 at
    least, also under autocast, and without a square root where the target t is 0.

    References:
        | At the numerator and the denominator, with target 0: Mescheder et al. (2018), Which
          Training Methods for GANs do actually Converge?, Eqs. 9 and 10 (R1 and R2, where the
          weight is half their :math:`\gamma`)
        | Between them, with target 1: Gulrajani et al. (2017), Improved Training of Wasserstein
          GANs, Eq. 3

    Args:
        at: Where: at rows of the "numerator", of the "denominator", "between" pairs of their
            rows, or at the "generated" rows of the term's parts, where the generator asks it.
        weight: The weight w.
        target: The norm t that costs nothing.
        every: Apply it in each k-th step only, with k times the weight. Steps are counted from
            where the object was made: a resumed run starts a new count.

    Raises:
        ValueError: If `at` is unknown, or a number is negative or not finite, or `every` below 1.

    Example:
        >>> partition, form = Partition({"a": 1, "b": 1}), Factorisation.joint(["a", "b"])
        >>> d = FactorisedDiscriminator(partition, form, {"joint": nn.Linear(2, 1)})
        >>> criterion = DiscriminatorLoss(d, penalties={"*": GradientPenalty("numerator", 5.0)})
        >>> rows = criterion.rows(torch.randn(4, 2), torch.randn(4, 2))
        >>> bool(criterion.penalty(rows).isclose(5 * d.networks["joint"].weight.square().sum()))
        True
    """

    def __init__(self, at: Place, weight: float, target: float = 0.0, every: int = 1) -> None:
        if at not in get_args(Place):
            raise ValueError(f"`at` is one of {get_args(Place)}, but got {at!r}.")
        for name, value in (("weight", weight), ("target", target)):
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is finite and at least 0, but got {value!r}.")
        if type(every) is not int or every < 1:
            raise ValueError(f"`every` is an integer of at least 1, but got {every!r}.")
        self.at = at
        self.weight = weight
        self.target = target
        self.every = every
        self._steps: Counter[str] = Counter()

    def __call__(self, term: TermFunction, rows: TermRows) -> Tensor:
        """Returns the penalty of a term, a scalar.

        Args:
            term: From rows of the term to its log ratio.
            rows: The rows of the term in this step.

        Raises:
            ValueError: If no part of the rows is of floating point.
        """
        self._steps[term.name] += 1
        if (self._steps[term.name] - 1) % self.every:
            return rows.weight * 0
        points = tuple(_leaf(tensor) for tensor in self._points(rows))
        leaves = [point for point in points if point.requires_grad]
        if not leaves:
            raise ValueError(
                f"The gradient penalty of term {term.name!r} expects a part of floating point, "
                f"but got {', '.join(str(point.dtype) for point in points)}."
            )
        with torch.autocast(points[0].device.type, enabled=False), torch.enable_grad():
            total = term(outward(points)).sum()
            gradients = torch.autograd.grad(total, leaves, create_graph=True)
        squares = [gradient.flatten(1).square().sum(1) for gradient in gradients]
        square = torch.stack(squares).sum(0)
        if self.target:
            square = (square.clamp_min(1e-24).sqrt() - self.target).square()
        return square.mean() * (self.weight * self.every)

    def _points(self, rows: TermRows) -> Tensors:
        sides = rows.split()
        if self.at == "generated":
            generated = rows.generated
            return generated if isinstance(generated, tuple) else (generated,)  # type: ignore[return-value]
        if self.at != "between":
            return sides[0 if self.at == "numerator" else 1]
        number = min(rows.sizes[:2])
        share = torch.rand(number, device=rows.weight.device)
        return tuple(
            _between(above[:number], below[:number], share)
            for above, below in zip(sides[0], sides[1], strict=True)
        )

    def __repr__(self) -> str:
        return f"GradientPenalty({self.at!r}, {self.weight}, {self.target}, every={self.every})"


def _leaf(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor  # the networks decide what integers mean; they have no gradient
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).clone().requires_grad_()


def _between(above: Tensor, below: Tensor, share: Tensor) -> Tensor:
    if not above.is_floating_point():
        return above
    share = share.to(above.dtype).reshape(-1, *[1] * (above.dim() - 1))
    return torch.lerp(below, above, share)
