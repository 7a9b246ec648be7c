"""What discriminator and generator minimise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from factordisc.densities import Ratio, is_dependency
from factordisc.discriminator import FactorisedDiscriminator, TermBatches
from factordisc.layouts import Batch, Tensors, outward
from factordisc.observations import Observations
from factordisc.sampling import DependencySampler, Step

__all__ = ["DiscriminatorLoss", "generator_loss"]

Rows: TypeAlias = "Tensor | Tensors"
Penalty: TypeAlias = "Callable[[TermFunction, TermRows], Tensor]"


class TermFunction:
    """From rows of a term to its log ratio in nats, with shape (N,): what a penalty gets.

    Attributes:
        name: The name of the term.
    """

    def __init__(self, discriminator: FactorisedDiscriminator, name: str) -> None:
        self.name = name
        self._discriminator = discriminator

    def __call__(self, rows: Batch) -> Tensor:
        return self._discriminator.term(self.name, rows)


class TermRows:
    """What a term learns from in one step.

    Rows have the form that the term's network receives: a tensor, or a tuple of several. The
    sides lie one below the other in one memory, so that a network is called on all of them
    without another copy.

    Args:
        sides: The rows of each side; of a ratio, those of its numerator and its denominator.
        weight: A scalar: 1, or 0 for a term that lacks data in this step.
        generated: The generator's rows of the term's parts, where the generator will ask the
            term; ``None`` unless something asks for them.
        missing: Whether the term lacks data in this step.
        evaluated: Whether the network is evaluated on the generated rows too, below the sides.
    """

    def __init__(
        self,
        sides: Sequence[Rows],
        weight: Tensor,
        generated: Rows | None = None,
        missing: bool = False,
        evaluated: bool = False,
    ) -> None:
        blocks = [*sides, generated] if evaluated and generated is not None else sides
        several = [block if isinstance(block, tuple) else (block,) for block in blocks]
        self.sizes = [block[0].shape[0] for block in several]
        self.weight = weight
        self.generated = generated
        self.missing = missing
        self.number = len(sides)
        # Sides of unlike shapes cannot lie in one memory.
        self.joined: Tensors | None = None
        self.apart: list[Tensors] = []
        columns = list(zip(*several, strict=True))
        if all([_alike(column) for column in columns]):
            self.joined = tuple([torch.cat(column) for column in columns])
        else:
            self.apart = several

    @property
    def sides(self) -> tuple[Rows, ...]:
        """The rows of each side."""
        return tuple(map(outward, self.split()[: self.number]))

    @property
    def numerator(self) -> Rows:
        """The rows of a ratio's numerator."""
        return self.sides[0]

    @property
    def denominator(self) -> Rows:
        """The rows of a ratio's denominator."""
        return self.sides[1]

    def blocks(self) -> list[Tensors]:
        """Returns all rows in as few pieces as there are memories."""
        return self.apart if self.joined is None else [self.joined]

    def split(self) -> list[Tensors]:
        """Returns the rows of each block, as the arguments of the network."""
        if self.joined is None:
            return self.apart
        return list(zip(*(torch.split(rows, self.sizes) for rows in self.joined), strict=True))


class TermReport(NamedTuple):
    """How a term did in one step: detached tensors without dimensions.

    Attributes:
        loss: What the term added to the loss, without penalties.
        accuracy: The share of rows on the right side of zero, both classes weighing the same.
        numerator: The mean log ratio on rows of the numerator, in nats.
        denominator: The mean log ratio on rows of the denominator, in nats.
        generated: The mean log ratio on the generator's rows of the term's parts, in nats: where
            the generator asks the term. Of a p-dependency much above the numerator's, it says
            that the network praises what it has never seen.

    All but the loss, which is then zero, are NaN for a term that had no data.
    """

    loss: Tensor
    accuracy: Tensor
    numerator: Tensor
    denominator: Tensor
    generated: Tensor


class DiscriminatorLoss(nn.Module):
    r"""The sum over terms of what their classifiers cost on one step's data.

    It works in three stages. `rows` draws the rows of every term: all randomness, everything
    about missing data, and nothing else. `cost` is networks and arithmetic of a fixed structure:
    for batches of one size one graph for `torch.compile`, whatever a step lacks. `penalty` is
    what differentiates twice, which a compiled graph cannot. Calling the module does all three.

    A term that lacks data in a step is evaluated on the generator's rows with weight zero: it
    costs nothing, whatever its network makes of them, its buffers stay, and its parameters get
    gradients of zero, not ``None``, so that no rank of a distributed run waits for it. An
    optimiser with momentum or weight decay still moves them.

    Args:
        discriminator: The discriminator that is trained.
        sampler: Draws the rows. If ``None``, a collision-free `DependencySampler`.
        penalties: Callables by term, or "*" for every term without one of its own. They get a
            function from rows of the term to its log ratio, and the term's `TermRows`, and return
            a scalar that is added to the loss.
        anchor: The weight with which the generator's rows join both sides of every dependency, or
            of those that a mapping names: pins a p-dependency to 0 where only the generator has
            mass. See the note.
        separate_batches: Evaluate the sides of a term in a pass each, and terms that share a
            network by themselves, for networks with batch statistics. By default they share one.
        check_finite: Look for NaN and infinite values in every batch. Off by default: it waits
            for the device.

    Note:
        A p-dependency learns from few complete observations and is asked about the generator's,
        where nothing pins it. With an anchor of weight :math:`\epsilon` its optimum is
        :math:`\log (p + \epsilon q) / (\prod_i p_i + \epsilon q)`: what it was where the data
        have mass, and 0, which says nothing, where only the generator has. The q-dependency's is
        :math:`\log (1 + \epsilon) q / (\prod_i q_i + \epsilon q)`, so that the two still cancel
        wherever p = q: the fixed point is not biased, if the dependencies of both sources are over
        the same sets (not with `markov` or `from_patterns` under one source only).

    Raises:
        ValueError: If a penalty is for a term that does not exist; if an anchor is negative, not
            finite, or for a term that is no dependency.
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
        anchor: float | Mapping[str, float] = 0.0,
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
        self._own = {term.name: _own_side(term) for term in discriminator.factorisation.terms}
        self.anchors = _anchors(discriminator.factorisation.terms, anchor)
        self.separate_batches = separate_batches
        self.check_finite = check_finite
        # By device, the weights 0 and 1 of every term: a compiled `cost` is guarded by which of
        # its inputs are one object.
        self._weights: dict[torch.device, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

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
            real: What the step has of real data, or a batch of whole observations; a mapping only
                as `Observations`, which say whether its parts were seen together.
            fake: A batch of whole observations from the generator. It is detached. A
                conditional generator's includes the input that it was given.
            report: Also return how every term did, from the same pass.

        Returns:
            The loss, a scalar in nats; with `report` also a `TermReport` by term.

        Raises:
            ValueError: If a batch does not fit the partition, or a part differs in dtype or
                device between batches; with `check_finite` if a batch holds NaN or infinity.
        """
        draw = self.rows
        if torch.compiler.is_compiling():
            # Not a decorator: that would import the compiler with this package.
            draw = torch.compiler.disable(draw)  # type: ignore[no-untyped-call]
        rows = draw(real, fake, generated=True) if report else draw(real, fake)
        # By its public name: users replace it by a compiled one.
        if report:
            loss, reports = self.cost(rows, report=True)
        else:
            loss, reports = self.cost(rows), {}
        if self.penalties:
            loss = loss + self.penalty(rows)
        return (loss, reports) if report else loss

    def rows(
        self,
        real: Observations | Batch,
        fake: Batch,
        *,
        detach: bool = True,
        generated: bool = False,
    ) -> dict[str, TermRows]:
        """Draws the rows of every term: all that is random or missing.

        Args:
            real: As for the module itself.
            fake: As for the module itself.
            detach: Cut the rows off the generator. ``False`` keeps its graph, for generators
                that differentiate through the discriminator's updates (unrolled GANs).
            generated: Have every term evaluated on the generator's rows too, for the report.

        Returns:
            The `TermRows` of every term, with generated rows for those that have a penalty or an
            anchor.
        """
        labels = {"p": "`real`", "q": "`fake`"}
        if real is None or (isinstance(real, Mapping) and not isinstance(real, Observations)):
            raise TypeError(
                f"`real` expects Observations or a batch of whole observations, but got "
                f"{'None' if real is None else 'a mapping'}. Say what was seen together: "
                "Observations(joint=...) of complete rows, Observations(a=..., b=...) of parts."
            )
        step = Step(self.sampler, {"p": real, "q": fake}, labels, detach)
        if self.check_finite:
            self._check_finite(step)
        d = self.discriminator
        whole = step.batches["q"].get(d.partition.names)
        if whole is None:
            raise ValueError("`fake` expects whole observations, at least one, but got none.")
        terms, device = d.factorisation.terms, whole[0].device
        if device not in self._weights:
            zeros, ones = (full(len(terms), device=device) for full in (torch.zeros, torch.ones))
            self._weights[device] = (zeros.unbind(), ones.unbind())
        penalised = self.penalties.keys()
        drawn = {}
        for term, zero, one in zip(terms, *self._weights[device], strict=True):
            name, sides, own = term.name, step.sides(term), self._own[term.name]
            missing = sides is None
            evaluated = own is None and (generated or name in self.anchors)
            at: Tensors | None = None
            if missing or evaluated or name in penalised or "*" in penalised:
                at = d._takes[name](whole)
            if sides is None:
                # Never an empty batch: users' networks reshape by x.size(0). Rolled, so that no
                # penalty divides by a difference of zero.
                sides = (at or (), tuple(t.roll(1, 0) for t in at or ()))
            drawn[name] = TermRows(
                [side[0] if len(side) == 1 else side for side in sides],
                zero if missing else one,
                None if at is None else outward(at),
                missing,
                evaluated,
            )
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
        """Evaluates the networks on rows that `rows` has drawn, without penalties.

        Args:
            rows: The rows of every term, or of those that count.
            report: Also return how every term did.

        Returns:
            As the module itself.
        """
        loss, reports = self._cost(rows, report)
        return (loss, reports) if report else loss

    def penalty(self, rows: Mapping[str, TermRows]) -> Tensor:
        """Evaluates the penalties on rows that `rows` has drawn.

        Args:
            rows: The rows of every term, or of those that count.

        Returns:
            The sum of what the penalties return, a scalar; nothing of terms without data.
        """
        costs = []
        for name, term in rows.items():
            penalty = self.penalties.get(name, self.penalties.get("*"))
            if penalty is not None and not term.missing:
                costs.append(penalty(TermFunction(self.discriminator, name), term) * term.weight)
        return torch.stack(costs).sum() if costs else next(iter(rows.values())).weight * 0

    def _cost(
        self, rows: Mapping[str, TermRows], report: bool
    ) -> tuple[Tensor, dict[str, TermReport]]:
        if not rows:
            raise ValueError("`rows` expects the rows of at least one term, but got none.")
        # A graph must not know what a step lacks, so there every term is masked by its weight.
        compiling = torch.compiler.is_compiling()
        weights = {n: term.weight for n, term in rows.items() if compiling or term.missing}
        # Offsets first: they leave buffers as they were, which must not change once they are used.
        d = self.discriminator
        offsets: dict[str, Tensor] = {}
        for name in d._given.keys() & rows.keys():
            offset = [d.offset(name, block) for block in rows[name].blocks()]
            offsets[name] = torch.cat(offset)
        outputs = self._outputs(rows, weights)
        # Terms with as many rows of each side are one loss. (In a graph, sizes are unknown.)
        groups: dict[object, list[str]] = {}
        for name, term in rows.items():
            # An anchor or a report also asks for the side that is the generator's.
            own = self._own[name] if report or name in self.anchors else None
            alike = (*term.sizes, self.anchors.get(name), own)
            alone = compiling or name in offsets
            groups.setdefault(name if alone else alike, []).append(name)
        losses: list[Tensor] = []
        reports: dict[str, TermReport] = {}
        for names in groups.values():
            several, first = len(names) > 1, names[0]
            stacked = torch.stack([outputs[n] for n in names]) if several else outputs[first]
            blocks = torch.split(stacked, rows[first].sizes, -1)
            sides, own = blocks[: rows[first].number], self._own[first]
            at = blocks[-1] if own is None else blocks[own]
            if first in offsets:
                shifted = torch.split(stacked + offsets[first], rows[first].sizes, -1)
                sides = shifted[: rows[first].number]
            loss = self._losses(sides)
            if first in self.anchors:
                if own is None and len(blocks) == len(sides):
                    raise ValueError(
                        f"The anchor of term {first!r} expects the generator's rows in `rows`, "
                        "but got none: draw them with a criterion that has this anchor."
                    )
                loss = loss + self.anchors[first] * self._losses((at, at))
            weight = None
            if any([name in weights for name in names]):
                weight = rows[first].weight
                weight = torch.stack([rows[n].weight for n in names]) if several else weight
                loss = torch.where(weight > 0, loss, 0.0)
            losses.append(loss.sum() if several else loss)
            if report:
                evaluated = own is not None or len(blocks) > len(sides)
                at = at if evaluated else torch.full_like(sides[0], torch.nan)
                accuracy = self._accuracy(sides)
                values = (*blocks[: len(sides)], at)
                reports.update(self._reports(names, loss.detach(), accuracy, values, weight))
        total = reduce(add, losses)
        return total, {name: reports[name] for name in rows} if report else {}

    def _outputs(
        self, rows: Mapping[str, TermRows], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Evaluates terms on all their blocks, one below the other."""
        together: dict[str, Tensors] = {}
        apart: list[dict[str, Tensors]] = []
        for name, term in rows.items():
            if term.joined is not None and not self.separate_batches:
                together[name] = term.joined
                continue
            blocks = term.split()
            apart += [{} for _ in blocks[len(apart) :]]
            for batches, block in zip(apart, blocks, strict=False):
                batches[name] = block
        d = self.discriminator
        outputs: dict[str, Tensor] = d(TermBatches(together, weights)) if together else {}
        several = [d(TermBatches(b, weights, self.separate_batches)) for b in apart]
        for name in several[0] if several else ():
            outputs[name] = torch.cat([one[name] for one in several if name in one])
        return outputs

    def _losses(self, sides: tuple[Tensor, ...]) -> Tensor:
        """What terms cost, from the outputs of each side: (N,) of one term, (T, N) of several."""
        objective = self.discriminator.objective
        losses = objective.loss(*sides)
        if losses.shape == sides[0].shape[:-1]:
            return losses
        # The objective averages over everything.
        return torch.stack([objective.loss(*outputs) for outputs in zip(*sides, strict=True)])

    def _accuracy(self, sides: tuple[Tensor, ...]) -> Tensor:
        above, below = (self.discriminator.objective.log_ratio(side.detach()) for side in sides)
        right = (above > 0).to(above.dtype).mean(-1) + (below <= 0).to(below.dtype).mean(-1)
        return right / 2

    def _reports(
        self,
        names: list[str],
        losses: Tensor,
        accuracy: Tensor,
        outputs: tuple[Tensor, ...],
        weight: Tensor | None,
    ) -> dict[str, TermReport]:
        log_ratio = self.discriminator.objective.log_ratio
        means = [log_ratio(output.detach()).mean(-1) for output in outputs]
        figures = torch.stack([accuracy, *means])
        if weight is not None:
            figures = torch.where(weight > 0, figures, torch.nan)
        columns = figures.reshape(4, -1).unbind(1)
        each = zip(names, losses.reshape(-1).unbind(), columns, strict=True)
        return {name: TermReport(loss, *column.unbind()) for name, loss, column in each}

    def _check_finite(self, step: Step) -> None:
        partition = self.discriminator.partition
        for source, batches in step.batches.items():
            for names, tensors in batches.items():
                layout = partition._layout.restrict(names)
                for part, values in layout.split(tensors).items():
                    if not bool(torch.isfinite(values).all()):
                        raise ValueError(
                            f"Part {part!r} of the batch of {source} over {names} holds "
                            "NaN or infinite values."
                        )

    def extra_repr(self) -> str:
        """Names the sampler and the options."""
        return f"{self.sampler}, separate_batches={self.separate_batches}"


def _own_side(term: Ratio) -> int | None:
    """Returns the side whose rows are the generator's as they are, if one is."""
    for i, side in enumerate((term.numerator, term.denominator)):
        if len(side) == 1 and side[0].source == "q":
            return i
    return None


def _anchors(terms: Sequence[Ratio], anchor: float | Mapping[str, float]) -> dict[str, float]:
    """Checks the anchors; returns those that are not zero, by term."""
    dependencies = [term.name for term in terms if is_dependency(term)]
    given = anchor if isinstance(anchor, Mapping) else dict.fromkeys(dependencies, anchor)
    for name, value in given.items():
        if name not in dependencies:
            raise ValueError(
                f"`anchor` names term {name!r}, which is no dependency; the dependencies are "
                f"{tuple(dependencies)}."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"The anchor of term {name!r} is a number, but got {value!r}.")
        if not 0 <= value < math.inf:
            raise ValueError(
                f"The anchor of term {name!r} is finite and at least 0, but got {value}."
            )
    return {name: float(value) for name, value in given.items() if value}


def _alike(tensors: Sequence[Tensor]) -> bool:
    shape = tensors[0].shape[1:]
    return all([tensor.shape[1:] == shape for tensor in tensors[1:]])


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
