"""What discriminator and generator minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from factordisc.discriminator import FactorisedDiscriminator
from factordisc.layouts import Batch
from factordisc.sampling import DependencySampler, Observations, as_observations, map_tensors

__all__ = ["DiscriminatorLoss", "generator_loss"]

TermFunction: TypeAlias = Callable[[Batch], Tensor]
Penalty: TypeAlias = Callable[[TermFunction, Batch, Batch], Tensor]


class TermRows(NamedTuple):
    """What a term learns from in one step."""

    numerator: Batch
    denominator: Batch
    weight: Tensor


class TermReport(NamedTuple):
    """How a term did in one step: detached tensors without dimensions.

    Attributes:
        loss: What the term added to the loss, without penalties.
        accuracy: The share of rows on the right side of zero, both classes weighing the same.
        numerator: The mean log ratio on rows of the numerator, in nats.
        denominator: The mean log ratio on rows of the denominator, in nats.

    All but the loss, which is then zero, are NaN for a term that had no data.
    """

    loss: Tensor
    accuracy: Tensor
    numerator: Tensor
    denominator: Tensor


class DiscriminatorLoss(nn.Module):
    """The sum over terms of what their classifiers cost on one step's data.

    It works in two stages. `rows` draws the rows of every term: all randomness, everything about
    missing data, and nothing else. `cost` is networks and arithmetic of a fixed structure: one
    graph for `torch.compile`, whatever a step lacks. Calling the module does both.

    A term that lacks data in a step is evaluated on the generator's rows with weight zero: it
    costs nothing and its parameters get gradients of zero, not ``None``, so that no rank of a
    distributed run waits for it. An optimiser with momentum or weight decay still moves them.

    Args:
        discriminator: The discriminator that is trained.
        sampler: Draws the rows. If ``None``, a collision-free `DependencySampler`.
        penalties: Callables by term, or "*" for every term without one of its own. They get a
            function from rows of the term to its log ratio, and the rows of its numerator and
            denominator, and return a scalar that is added to the loss.
        separate_batches: Evaluate numerator and denominator in two passes, for networks with
            batch statistics. By default they share one.
        check_finite: Look for NaN and infinite values in every batch. Off by default: it waits
            for the device.

    Raises:
        ValueError: If a penalty is for a term that does not exist.
        TypeError: If the first argument is not a `FactorisedDiscriminator`.

    Example:
        >>> d = FactorisedDiscriminator(
        ...     Partition({"a": 1, "b": 1}),
        ...     marginals={"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)},
        ...     p_dependency=nn.Linear(2, 1),
        ...     q_dependency=nn.Linear(2, 1),
        ... )
        >>> criterion = DiscriminatorLoss(d)
        >>> pairs, lone_a, fake = torch.randn(4, 2), torch.randn(32, 1), torch.randn(16, 2)
        >>> loss, report = criterion(Observations(joint=pairs, a=lone_a), fake, report=True)
        >>> loss.backward()
        >>> list(report)
        ['a', 'b', 'p_dependency', 'q_dependency']
    """

    def __init__(
        self,
        discriminator: FactorisedDiscriminator,
        sampler: DependencySampler | None = None,
        penalties: Mapping[str, Penalty] | None = None,
        *,
        separate_batches: bool = False,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(discriminator, FactorisedDiscriminator):
            raise TypeError(
                "DiscriminatorLoss expects a FactorisedDiscriminator, "
                f"but got a {type(discriminator).__name__}."
            )
        self.discriminator = discriminator
        self.sampler = DependencySampler(discriminator.partition) if sampler is None else sampler
        if self.sampler.partition != discriminator.partition:
            raise ValueError(
                f"The sampler divides by {self.sampler.partition}, "
                f"but the discriminator by {discriminator.partition}."
            )
        self.penalties = dict(penalties or {})
        names = [term.name for term in discriminator.factorisation.terms]
        for name in self.penalties:
            if name != "*" and name not in names:
                raise ValueError(
                    f"`penalties` names term {name!r}, but the terms are {tuple(names)} "
                    "and '*' for all."
                )
        self.separate_batches = separate_batches
        self.check_finite = check_finite

    @overload
    def forward(
        self, real: Observations | Batch, fake: Batch, report: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def forward(
        self, real: Observations | Batch, fake: Batch, report: Literal[True]
    ) -> tuple[Tensor, dict[str, TermReport]]: ...
    def forward(
        self, real: Observations | Batch, fake: Batch, report: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, TermReport]]:
        """Draws the rows of all terms and returns what they cost.

        Args:
            real: What the step has of real data, or a batch of whole observations.
            fake: A batch of whole observations from the generator. It is detached. A
                conditional generator's includes the input that it was given.
            report: Also return how every term did, from the same pass.

        Returns:
            The loss, a scalar in nats; with `report` also a `TermReport` by term.

        Raises:
            ValueError: If a batch does not fit the partition or is too small to combine rows
                of; with `check_finite` if it holds NaN or infinite values.
        """
        draw = self.rows
        if torch.compiler.is_compiling():
            # Not a decorator: that would import the compiler with this package.
            draw = torch.compiler.disable(draw)  # type: ignore[no-untyped-call]
        rows = draw(real, fake)
        return self.cost(rows, report=True) if report else self.cost(rows)

    def rows(self, real: Observations | Batch, fake: Batch) -> dict[str, TermRows]:
        """Draws the rows of every term, without gradients: all that is random or missing.

        Args:
            real: As for the module itself.
            fake: As for the module itself.

        Returns:
            By term, the rows of its two sides and its weight: 1, or 0 if data lack for it.
        """
        # detach: the update must not reach the generator
        fake = map_tensors(Tensor.detach, fake)
        sources = {"p": as_observations(real), "q": as_observations(fake)}
        if self.check_finite:
            for source, observations in sources.items():
                self._check_finite(source, observations)
        partition = self.discriminator.partition
        weights = self._weights(fake)
        drawn = {}
        for term in self.discriminator.factorisation.terms:
            lacking = self.sampler.lacks(term, sources)
            if lacking:
                # Never an empty batch: users' networks reshape by x.size(0).
                rows = partition.cut(fake, term.parts)
                sides: tuple[Batch, Batch] = (rows, rows)
            else:
                sides = self.sampler.draw(term, sources)
            restricted = partition.restrict(term.parts)
            numerator, denominator = (
                map_tensors(_settled, restricted.cut(side, term.parts)) for side in sides
            )
            drawn[term.name] = TermRows(numerator, denominator, weights[int(not lacking)])
        return drawn

    @overload
    def cost(self, rows: Mapping[str, TermRows], report: Literal[False] = ...) -> Tensor: ...
    @overload
    def cost(
        self, rows: Mapping[str, TermRows], report: Literal[True]
    ) -> tuple[Tensor, dict[str, TermReport]]: ...
    def cost(
        self, rows: Mapping[str, TermRows], report: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, TermReport]]:
        """Evaluates the networks on rows that `rows` has drawn.

        Args:
            rows: The rows of every term, or of those that count.
            report: Also return how every term did.

        Returns:
            As the module itself.
        """
        d = self.discriminator
        if not rows:
            raise ValueError("`rows` expects the rows of at least one term, but got none.")
        if self.separate_batches:
            above = d.outputs({name: [term.numerator] for name, term in rows.items()})
            below = d.outputs({name: [term.denominator] for name, term in rows.items()})
            outputs = {name: (above[name][0], below[name][0]) for name in rows}
        else:
            both = d.outputs({n: [term.numerator, term.denominator] for n, term in rows.items()})
            outputs = {name: (both[name][0], both[name][1]) for name in rows}
        losses: list[Tensor] = []
        reports: dict[str, TermReport] = {}
        for name, (numerator, denominator) in outputs.items():
            weight = rows[name].weight
            loss = d.objective.loss(numerator, denominator) * weight
            losses.append(loss)
            penalty = self.penalties.get(name, self.penalties.get("*"))
            if penalty is not None:
                cost = penalty(partial(d.term, name), rows[name].numerator, rows[name].denominator)
                losses.append(cost * weight)
            if report:
                reports[name] = self._report(loss, numerator, denominator, weight)
        total = torch.stack(losses).sum()
        return (total, reports) if report else total

    def _report(
        self, loss: Tensor, numerator: Tensor, denominator: Tensor, weight: Tensor
    ) -> TermReport:
        above = self.discriminator.objective.log_ratio(numerator.detach())
        below = self.discriminator.objective.log_ratio(denominator.detach())
        right = (above > 0).to(above.dtype).mean() + (below <= 0).to(below.dtype).mean()
        figures = torch.stack([right / 2, above.mean(), below.mean()])
        accuracy, high, low = torch.where(weight > 0, figures, torch.nan).unbind()
        return TermReport(loss.detach(), accuracy, high, low)

    def _weights(self, generated: Batch) -> Tensor:
        """Returns the weights 0 and 1 on the device of the generator's batch."""
        arrays = self.discriminator.partition.arguments(generated)
        for array in arrays:
            if not isinstance(array, Tensor):
                raise TypeError("DiscriminatorLoss expects tensors, but `fake` holds an array.")
        device = arrays[0].device if isinstance(arrays[0], Tensor) else None
        return torch.arange(2, dtype=torch.float32, device=device)

    def _check_finite(self, source: str, observations: Observations) -> None:
        for names, observed in observations.observed(self.discriminator.partition).items():
            for part, values in observed.partition.split(observed.batch).items():
                if isinstance(values, Tensor) and not bool(torch.isfinite(values).all()):
                    raise ValueError(
                        f"Part {part!r} of the batch of {source} over {names} holds "
                        "NaN or infinite values."
                    )

    def extra_repr(self) -> str:
        """Names the sampler and the options."""
        return f"{self.sampler}, separate_batches={self.separate_batches}"


def _settled(rows: Tensor) -> Tensor:
    """Gives rows the one form that a compiled `cost` may rely on, whatever the step lacked.

    A graph is guarded by the strides of its inputs and by which of them are one object.
    """
    rows = rows.detach()  # an object of its own
    dense = rows.is_contiguous() or (
        rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last)
    )
    return rows if dense else rows.clone()


def generator_loss(
    log_ratio: Tensor,
    kind: Literal["non-saturating", "minimax", "kl"] = "non-saturating",
) -> Tensor:
    """The loss of a generator, from the log ratio of its samples.

    ``generator_loss(d(fake)).backward(inputs=list(generator.parameters()))`` leaves no gradient
    in the discriminator.

    References:
        "non-saturating": Stoller et al. (2020), Eq. 2. "minimax": Goodfellow et al. (2014),
        Eq. 1. "kl": its expectation under q is the divergence KL(q, p).

    Args:
        log_ratio: d(fake), an estimate of log p - log q in nats, with shape (N,).
        kind: With d the log ratio, the mean of softplus(-d) for "non-saturating", of
            -softplus(d) for "minimax", of -d for "kl".

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> generator_loss(torch.zeros(4))
        tensor(0.6931)
    """
    if kind == "non-saturating":
        return softplus(-log_ratio).mean()
    if kind == "minimax":
        return -softplus(log_ratio).mean()
    if kind == "kl":
        return -log_ratio.mean()
    raise ValueError(f"`kind` is 'non-saturating', 'minimax' or 'kl', but got {kind!r}.")
