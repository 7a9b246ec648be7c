"""Rows for the sides of every term: what was observed, and draws with independent parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from factordisc.layouts import Batch, Combine, Layout, Take, Tensors, by_name, like, outward
from factordisc.observations import Observations
from factordisc.partition import Partition

if TYPE_CHECKING:  # the algebra imports nothing from here, nor this from the algebra
    from factordisc.densities import Density, Ratio

__all__ = ["DependencySampler"]


class DependencySampler:
    r"""Draws the rows of the sides of a term: observations, and combinations of them.

    Where a side is a product of densities, one random order :math:`\pi` of the batch says
    which observation gives which block of parts, so that no drawn row combines two blocks of
    the same observation:

    .. math:: \tilde{x}_n = (x^1_{\pi(n)}, x^2_{\pi(n+1)}, \dots, x^K_{\pi(n+K-1)})

    with positions modulo N. Each drawn row has exactly the law of the product, and every
    part keeps its multiset of values; the rows of one batch depend on each other, which
    leaves means over them unbiased.

    Note:
        The paper permutes each part by itself (``collisions="allow"``). That leaves 1/N of
        the rows of two parts as they were observed, and so bounds the learned ratio by N.

    References:
        | Training Generative Adversarial Networks from Incomplete Observations using
          Factorised Discriminators (Stoller et al., 2020), Section 2.2
        | https://arxiv.org/abs/1905.12660

    Args:
        partition: The split of an observation into its K parts.
        rng: The source of the random orders. If ``None``, PyTorch's global one of the device.
        collisions: "forbid", or "allow" for the independent permutations of the paper.

    Example:
        >>> sampler = DependencySampler(Partition({"a": 1, "b": 1}))
        >>> x = torch.tensor([[0, 10], [1, 11], [2, 12], [3, 13]])
        >>> y = sampler(x)
        >>> y[:, 1].sort().values  # each part keeps its values, not its rows
        tensor([10, 11, 12, 13])
        >>> bool((y[:, 1] - y[:, 0] == 10).any())  # and no row is an observation
        False
    """

    def __init__(
        self,
        partition: Partition,
        rng: torch.Generator | None = None,
        collisions: Literal["forbid", "allow"] = "forbid",
    ) -> None:
        if not isinstance(partition, Partition):
            raise TypeError(f"DependencySampler expects a Partition, but got {partition!r}.")
        if rng is not None and not isinstance(rng, torch.Generator):
            raise TypeError(f"`rng` expects a torch.Generator or None, but got {rng!r}.")
        if collisions not in ("forbid", "allow"):
            raise ValueError(f"`collisions` is 'forbid' or 'allow', but got {collisions!r}.")
        self.partition = partition
        self.rng = rng
        self.collisions = collisions
        # What is known before any data come: the layouts of a source's patterns, and how a term
        # is drawn from a set of patterns.
        self._layouts: dict[tuple[Any, ...], list[Layout]] = {}
        self._plans: dict[Any, dict[str, _Plan]] = {}

    def __repr__(self) -> str:
        return f"DependencySampler({self.partition}, collisions={self.collisions!r})"

    def __call__(self, x: Batch) -> Any:
        r"""Draws a batch whose parts are independent of each other.

        Args:
            x: Observations of all parts, with shape :math:`(N, *)` and :math:`N \geq K`.

        Returns:
            N drawn rows in the form, dtype and on the device of `x`.

        Raises:
            ValueError: If `x` holds fewer observations than there are parts, or does not fit
                the partition.
        """
        layout = self.partition._layout
        tensors = layout.read(x)
        rows, blocks = len(tensors[0]), [(name,) for name in layout.names]
        if rows < len(blocks) and self.collisions == "forbid":
            raise ValueError(
                f"The sampler combines {len(blocks)} parts of different observations, but the "
                f"batch of {layout.names} has {rows} rows. Use batches of at least "
                f"{len(blocks)}, or group the parts with Factorisation.hierarchical."
            )
        orders = _Orders(self, tensors[0])
        drawn = layout.combiner(blocks)(tensors, orders.of_blocks(len(blocks), rows))
        return like(x, outward(drawn) if by_name(x) is None else layout.split(drawn))

    def step(self, sources: Mapping[str, Observations | Batch]) -> Step:
        """Prepares one step's data, from which the rows of any term can be drawn.

        Each source is brought into one form and checked once, and each batch gets one random
        order, which all terms share.

        Args:
            sources: What there is of each source, such as ``{"p": real, "q": fake}``:
                `Observations`, or a batch of whole observations.

        Raises:
            ValueError: If a pattern names an unknown part, "joint" and all parts are both
                given, a batch does not have the form of its pattern, or a part differs in
                dtype or device between batches.
            TypeError: If a batch is of the wrong kind.
        """
        return Step(self, sources)

    def draw(
        self, term: Ratio, sources: Mapping[str, Observations | Batch]
    ) -> tuple[Any, ...] | None:
        """Draws rows of the sides of a term: ``sampler.step(sources).draw(term)``.

        A side asks each of its sources once, for all the parts that it needs of it: it takes
        the batch observed with exactly those parts, else the smallest that contains them
        (the first given, on a tie). So both sides of a p-dependency are made of the same
        complete observations, and only the pairing tells them apart. Where no batch holds all
        parts of a side, every density takes a batch of its own in the same way, and the side
        has as many rows as the smallest of these.

        Args:
            term: A ratio over parts of the partition.
            sources: As for `step`.

        Returns:
            As `Step.draw`.

        Raises:
            ValueError: As `step`; or if the term is about other parts or another source.
        """
        return self.step(sources).draw(term)


class Step:
    """The data of one training step, and the rows of any term. Made by `DependencySampler.step`.

    Args:
        sampler: The sampler.
        sources: What there is of each source.
        labels: What the sources are called in messages; by default by their names.
        detach: Draw rows that carry no gradients.
    """

    def __init__(
        self,
        sampler: DependencySampler,
        sources: Mapping[str, Observations | Batch],
        labels: Mapping[str, str] | None = None,
        detach: bool = False,
    ) -> None:
        self.sampler = sampler
        self.detach = detach
        self.batches: dict[str, dict[tuple[str, ...], Tensors]] = {}
        types: dict[str | None, _Seen] = {}
        for source, given in sources.items():
            label = f"source {source!r}" if labels is None else labels[source]
            self.batches[source] = self._read(given, label, types)
        # What plans refer to by number: the batches of all sources, in this order.
        self._tensors = [x for batches in self.batches.values() for x in batches.values()]
        self._orders: dict[int, _Orders] = {}
        patterns = tuple((source, *batches) for source, batches in self.batches.items())
        self._plans = sampler._plans.setdefault(patterns, {})

    def draw(self, term: Ratio) -> tuple[Any, ...] | None:
        """Draws rows of the sides of a term.

        Args:
            term: A ratio over parts of the partition.

        Returns:
            For each side what the term's network receives: a tensor, or a tuple of several; a
            view where nothing is combined. ``None`` where the step has too little data for the
            term: no batch holds its parts, or one has fewer rows than a side has blocks.

        Raises:
            ValueError: If the term is about other parts, or a source that the step lacks.
        """
        sides = self.sides(term)
        return None if sides is None else tuple(map(outward, sides))

    def sides(self, term: Ratio) -> tuple[Tensors, ...] | None:
        """Draws as `draw`, in canonical form."""
        plan = self._plans.get(term.name)
        if plan is None or (plan.term is not term and plan.term != term):
            plan = self._plans[term.name] = self._planned(term)
        if plan.sides is None:
            return None
        drawn = []
        for side in plan.sides:
            picks, take = side.picks, side.take
            rows = self._combine(side) if take is None else take(self._tensors[picks[0].batch])
            if rows is None:
                return None
            drawn.append(rows)
        return tuple(drawn)

    def _read(
        self, given: Observations | Batch, label: str, types: dict[str | None, _Seen]
    ) -> dict[tuple[str, ...], Tensors]:
        """Brings the batches of a source that have rows into canonical form."""
        several = isinstance(given, Observations)
        entries = given.entries() if isinstance(given, Observations) else [("joint", given)]
        layouts = self._layouts_of(tuple([pattern for pattern, _ in entries]))
        batches: dict[tuple[str, ...], Tensors] = {}
        for (pattern, batch), layout in zip(entries, layouts, strict=True):
            try:
                tensors = layout.read(batch)
            except (TypeError, ValueError) as error:
                place = f"In the batch observed of {pattern!r}: " if several else ""
                raise type(error)(f"In {label}: {place}{error}") from None
            for part, tensor in layout.typed(tensors):
                seen = types.get(part)
                if seen and seen.device == tensor.device and _mix(seen.dtype, tensor):
                    continue
                where = f"the batch of {pattern!r} in {label}" if several else label
                if seen:
                    raise ValueError(_differs(part or layout.names[0], seen, tensor, where))
                types[part] = _Seen(tensor.dtype, tensor.device, where)
            if self.detach:
                tensors = tuple([t.detach() if t.requires_grad else t for t in tensors])
            if tensors[0].shape[0]:
                batches[layout.names] = tensors
        return batches

    def _layouts_of(self, patterns: tuple[Any, ...]) -> list[Layout]:
        known = self.sampler._layouts.get(patterns)
        if known is not None:
            return known
        whole = self.sampler.partition._layout
        layouts: dict[tuple[str, ...], Layout] = {}
        for pattern in patterns:
            names = whole.names if pattern == "joint" else whole.ordered(pattern)
            if names in layouts:
                raise ValueError(f"All parts were given twice: as 'joint' and as {names}.")
            layouts[names] = whole if names == whole.names else whole.restrict(names)
        self.sampler._layouts[patterns] = list(layouts.values())
        return self.sampler._layouts[patterns]

    def _combine(self, side: _Side) -> Tensors | None:
        """Draws rows whose blocks come from different observations; None if they are too few."""
        if len(side.picks) == 1:
            return self._pick(side.picks[0], self._tensors[side.picks[0].batch][0].shape[0])
        rows = min([self._tensors[pick.batch][0].shape[0] for pick in side.picks])
        parts: dict[str, Tensor] = {}
        for pick in side.picks:
            drawn = self._pick(pick, rows)
            if drawn is None:
                return None
            parts |= pick.layout.split(drawn)
        return side.layout.join(parts)

    def _pick(self, pick: _Pick, rows: int) -> Tensors | None:
        batch = self._tensors[pick.batch]
        orders = self._orders.get(pick.batch)
        if orders is None:
            orders = self._orders[pick.batch] = _Orders(self.sampler, batch[0])
        if orders.size < pick.blocks and self.sampler.collisions == "forbid":
            return None
        return pick.combine(batch, orders.of_blocks(pick.blocks, rows))

    # --- planning: once for a term and a set of patterns ---

    def _planned(self, term: Ratio) -> _Plan:
        layout = self.sampler.partition._layout
        for name in term.parts:
            if name not in layout.position:
                raise ValueError(
                    f"Term {term.name!r} is about part {name!r}, but the parts are {layout.names}."
                )
        keys = [(source, names) for source, b in self.batches.items() for names in b]
        numbers = {key: i for i, key in enumerate(keys)}
        sides = []
        for densities in (term.numerator, term.denominator):
            groups = self._grouped(term, densities)
            if groups is None:
                return _Plan(term, None)
            picks = []
            for key, blocks in groups.items():
                observed = layout.restrict(key[1])
                there = observed.restrict(layout.ordered(name for b in blocks for name in b))
                picks.append(_Pick(numbers[key], len(blocks), observed.combiner(blocks), there))
            parts = layout.ordered(term.parts)
            alone = len(densities) == 1
            take = layout.restrict(next(iter(groups))[1]).taker(parts) if alone else None
            sides.append(_Side(picks, take, layout.restrict(parts)))
        return _Plan(term, sides)

    def _grouped(
        self, term: Ratio, densities: Sequence[Density]
    ) -> dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] | None:
        """Chooses the batches of a side, each with the blocks that come from it."""
        groups: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = {}
        for source in dict.fromkeys(density.source for density in densities):
            if source not in self.batches:
                raise ValueError(
                    f"Term {term.name!r} needs source {source!r}, but got {tuple(self.batches)}."
                )
            observed = self.batches[source]
            blocks = [density.parts for density in densities if density.source == source]
            whole = _smallest(observed, [name for block in blocks for name in block])
            for block in blocks:
                batch = _smallest(observed, block) if whole is None else whole
                if batch is None:
                    return None
                groups.setdefault((source, batch), []).append(block)
        return groups


class _Seen(NamedTuple):
    """The first batch of a step that holds a part."""

    dtype: torch.dtype
    device: torch.device
    where: str


class _Pick(NamedTuple):
    """What a side takes of one batch, which has a number in the step."""

    batch: int
    blocks: int
    combine: Combine
    layout: Layout


class _Side(NamedTuple):
    """How a side is drawn: one batch as it is, by `take`, or picks side by side."""

    picks: list[_Pick]
    take: Take | None
    layout: Layout


class _Plan(NamedTuple):
    """How a term is drawn; without sides, if the patterns lack its parts."""

    term: Ratio
    sides: list[_Side] | None


class _Orders:
    """The random orders in which the blocks of a batch are drawn."""

    def __init__(self, sampler: DependencySampler, like: Tensor) -> None:
        self.sampler = sampler
        self.like = like
        self.size = like.shape[0]
        self.cycle: Tensor | None = None
        self.permutations: list[Tensor] = []

    def of_blocks(self, blocks: int, rows: int) -> list[Tensor]:
        if self.sampler.collisions == "allow":
            while len(self.permutations) < blocks:
                self.permutations.append(self._permutation())
            return [order[:rows] for order in self.permutations[:blocks]]
        if self.cycle is None:
            # Twice round, so that every block's order is a view.
            self.cycle = torch.cat([self._permutation()] * 2)
        return [self.cycle[k : k + rows] for k in range(blocks)]

    def _permutation(self) -> Tensor:
        device, rng = self.like.device, self.sampler.rng
        if rng is None:
            return torch.randperm(self.size, device=device)
        order = torch.randperm(self.size, generator=rng, device=rng.device)
        if device.type == "cuda" and order.device.type == "cpu":
            order = order.pin_memory()  # else the copy would wait for the device
        return order.to(device, non_blocking=True)


def _smallest(
    observed: Mapping[tuple[str, ...], Tensors], names: Sequence[str]
) -> tuple[str, ...] | None:
    """Returns the pattern with the fewest parts that holds all the names."""
    wanted = set(names)
    return min((p for p in observed if wanted.issubset(p)), key=len, default=None)


def _mix(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether a dtype is that of a tensor, or one that autocast would make of the other."""
    if dtype == tensor.dtype:
        return True
    single = (torch.float32, torch.float16, torch.bfloat16)
    mixed = dtype in single and tensor.dtype in single
    return mixed and torch.is_autocast_enabled(tensor.device.type)


def _differs(part: str, seen: _Seen, tensor: Tensor, where: str) -> str:
    if tensor.dtype != seen.dtype:
        one, other, remedy = str(seen.dtype), str(tensor.dtype), f"to({seen.dtype})"
    else:
        one, other = str(seen.device), str(tensor.device)
        remedy = f"to({one!r})"
    return (
        f"Part {part!r} has one dtype and one device in all batches of a step, but it is {one} in "
        f"{seen.where} and {other} in {where}. Convert one of them, such as by `.{remedy}`."
    )
