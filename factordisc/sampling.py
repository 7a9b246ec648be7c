"""Rows for the two sides of every term: what was observed, and draws with independent parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from factordisc.densities import Density, Ratio
from factordisc.layouts import Array, Batch
from factordisc.partition import Partition, Pattern, pattern_names

__all__ = ["DependencySampler", "Observations"]


class Observed(NamedTuple):
    """A batch of one pattern, as a partition understands it."""

    partition: Partition
    batch: Batch
    size: int


class Observations(Mapping[Pattern, Batch]):
    """What a training step has of real data: batches, keyed by the parts seen together.

    The key of a batch, its *pattern*, is the name of a part, a tuple of names in any order, or
    "joint" for all parts. Its value has the form of ``partition.take(sample, pattern)``: for
    `Partition.fields` a tensor for one part, and a tuple in the order of the parts or a mapping
    for several. Batches may differ in length; the fields of one batch may not. A pattern whose
    batch is ``None`` or has no rows counts as not observed in this step.

    It is a read-only mapping and, because DistributedDataParallel rebuilds those, not a dict.

    Note:
        What is missing must be missing completely at random: the batch of a pattern stands for
        the marginal of p over its parts. Rows of a batch must be distinct draws: of snippets
        of songs, take batches in which each song occurs once.

    Args:
        batches: Batches by pattern.
        **named: The same, for patterns that are a name.

    Raises:
        ValueError: If two keys are the same pattern.
        TypeError: If a key is not a name or a tuple of names.

    Example:
        >>> pairs, lefts = torch.zeros(4, 6), torch.zeros(16, 3)
        >>> real = Observations({("left", "right"): pairs}, left=lefts)
        >>> real["right", "left"].shape, "right" in real, len(real)
        (torch.Size([4, 6]), False, 2)
    """

    def __init__(
        self, batches: Mapping[Pattern, Batch | None] | None = None, /, **named: Batch | None
    ) -> None:
        self._batches: dict[frozenset[str], tuple[Pattern, Batch]] = {}
        # The step's terms all ask for the same partition's view of these batches.
        self._seen: tuple[Partition, dict[tuple[str, ...], Observed]] | None = None
        given: Iterable[tuple[Any, Batch | None]] = [*dict(batches or {}).items(), *named.items()]
        patterns: set[frozenset[str]] = set()
        for key, batch in given:
            names = pattern_names(key)
            if frozenset(names) in patterns:
                raise ValueError(
                    f"Observations expects every pattern once, but got {key!r} twice."
                )
            patterns.add(frozenset(names))
            if batch is not None:
                pattern = names[0] if len(names) == 1 else names
                self._batches[frozenset(names)] = (pattern, batch)

    def __getitem__(self, pattern: Pattern) -> Batch:
        names = frozenset(pattern_names(pattern))
        if names not in self._batches:
            raise KeyError(f"{pattern!r} was not observed; there are {list(self)}")
        return self._batches[names][1]

    def __contains__(self, pattern: object) -> bool:
        try:
            return frozenset(pattern_names(pattern)) in self._batches
        except (TypeError, ValueError):
            return False

    def __iter__(self) -> Iterator[Pattern]:
        return (pattern for pattern, _ in self._batches.values())

    def __len__(self) -> int:
        return len(self._batches)

    def __repr__(self) -> str:
        shapes = (f"{pattern!r}: {_shapes(batch)}" for pattern, batch in self._batches.values())
        return f"Observations({{{', '.join(shapes)}}})"

    def to(self, *args: Any, **kwargs: Any) -> Observations:
        """Returns the batches moved as by `torch.Tensor.to`, with the same arguments."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Observations:
        """Returns the batches in pinned memory; `torch.utils.data.DataLoader` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Observations:
        return Observations({key: map_tensors(change, batch) for key, batch in self.items()})

    @staticmethod
    def collate(samples: Sequence[Mapping[str, Any]]) -> Observations:
        """Groups samples that lack parts by what they have: a `collate_fn` for data with holes.

        Args:
            samples: Mappings from part names to values; a part that was not observed is absent
                or ``None``. The values of a part are stacked as by `default_collate`.

        Returns:
            One batch per pattern that occurs: a tensor for one part, a mapping for several.

        Raises:
            ValueError: If a sample has no parts at all.
            TypeError: If a sample is not a mapping.

        Example:
            >>> samples = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": None}, {"a": 4.0}]
            >>> Observations.collate(samples)["a"]
            tensor([3., 4.], dtype=torch.float64)
        """
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for i, sample in enumerate(samples):
            if not isinstance(sample, Mapping):
                raise TypeError(
                    "Observations.collate expects mappings from part names to values, "
                    f"but sample {i} is of type {type(sample).__name__}."
                )
            present = {name: value for name, value in sample.items() if value is not None}
            if not present:
                raise ValueError(
                    f"Sample {i} has no observed parts. Leave it out of the data set."
                )
            groups.setdefault(tuple(sorted(present)), []).append(present)
        batches: dict[Pattern, Batch | None] = {}
        for names, group in groups.items():
            fields = {name: default_collate([s[name] for s in group]) for name in group[0]}
            batches[names] = fields if len(names) > 1 else fields[names[0]]
        return Observations(batches)

    def observed(self, partition: Partition) -> dict[tuple[str, ...], Observed]:
        """Returns the batches that have rows by their parts, in the order of the partition.

        Raises:
            ValueError: If a pattern names an unknown part, "joint" and all parts are both
                given, or a batch does not have the form of its pattern.
            TypeError: If a batch is of the wrong kind.
        """
        if self._seen is not None and self._seen[0] is partition:
            return self._seen[1]
        observed: dict[tuple[str, ...], Observed] = {}
        for pattern, batch in self._batches.values():
            names = partition.names if pattern == "joint" else partition.ordered(pattern)
            if names in observed:
                raise ValueError(f"All parts were given twice: as 'joint' and as {names}.")
            restricted = partition.restrict(names)
            try:
                size = restricted.batch_size(batch)
            except (TypeError, ValueError) as error:
                raise type(error)(f"In the batch observed of {pattern!r}: {error}") from None
            if size:
                observed[names] = Observed(restricted, batch, size)
        self._seen = (partition, observed)
        return observed


class DependencySampler:
    r"""Draws the rows of both sides of a term: observations, and combinations of them.

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

    def __repr__(self) -> str:
        return f"DependencySampler({self.partition}, collisions={self.collisions!r})"

    def __call__(self, x: Batch) -> Batch:
        r"""Draws a batch whose parts are independent of each other.

        Args:
            x: Observations of all parts, with shape :math:`(N, *)` and :math:`N \geq K`.

        Returns:
            N drawn rows in the form, dtype and on the device of `x`.

        Raises:
            ValueError: If `x` holds fewer observations than there are parts, or does not fit
                the partition.
        """
        whole = Observed(self.partition, x, self.partition.batch_size(x))
        blocks = [(name,) for name in self.partition.names]
        return self._combine(whole, blocks, whole.size, "The sampler")

    def draw(
        self, term: Ratio, sources: Mapping[str, Observations | Batch]
    ) -> tuple[Batch, Batch]:
        """Draws rows of the numerator and of the denominator of a term.

        A side asks each of its sources once, for all the parts that it needs of it: it takes
        the batch observed with exactly those parts, else the smallest that contains them
        (the first given, on a tie). So both sides of a p-dependency are made of the same
        complete observations, and only the pairing tells them apart. Where no batch holds all
        parts of a side, every density takes a batch of its own in the same way, and the side
        has as many rows as the smallest of these.

        Args:
            term: A ratio over parts of the partition.
            sources: What there is of each source, such as ``{"p": real, "q": fake}``:
                `Observations`, or a batch of whole observations.

        Returns:
            The rows of the two sides, each in the form ``partition.take(x, term.parts)`` has
            for its source; a view where nothing is combined.

        Raises:
            ValueError: If a source lacks parts of the term, or a batch has fewer rows than
                a side has blocks.
        """
        for name in term.parts:
            if name not in self.partition.names:
                raise ValueError(
                    f"Term {term.name!r} is about part {name!r}, "
                    f"but the parts are {self.partition.names}."
                )
        observed = {
            source: as_observations(given).observed(self.partition)
            for source, given in sources.items()
        }
        return (
            self._draw_side(term, "numerator", observed),
            self._draw_side(term, "denominator", observed),
        )

    def lacks(self, term: Ratio, sources: Mapping[str, Observations]) -> bool:
        """Says whether the sources lack data for a term, so that `draw` could not serve it."""
        return any(
            _smallest(sources[density.source].observed(self.partition), density.parts) is None
            for density in (*term.numerator, *term.denominator)
        )

    def _draw_side(
        self, term: Ratio, side: str, observed: Mapping[str, dict[tuple[str, ...], Observed]]
    ) -> Batch:
        densities: tuple[Density, ...] = getattr(term, side)
        groups = self._group(term, densities, observed)
        if len(groups) == 1 and len(densities) == 1:
            return self._cut(groups[0][0], densities[0].parts)
        rows = min(batch.size for batch, _ in groups)
        who = f"The {side} of term {term.name!r}"
        drawn = [self._combine(batch, blocks, rows, who) for batch, blocks in groups]
        if len(groups) == 1:
            return drawn[0]
        parts: dict[str, Array] = {}
        for (batch, blocks), combined in zip(groups, drawn, strict=True):
            parts |= batch.partition.restrict(_union(blocks)).split(combined)
        names = self.partition.ordered(parts)
        if len(names) > 1 and all(isinstance(batch.batch, Mapping) for batch, _ in groups):
            return {name: parts[name] for name in names}
        return self.partition.restrict(names).join(parts)

    def _group(
        self,
        term: Ratio,
        densities: Sequence[Density],
        observed: Mapping[str, dict[tuple[str, ...], Observed]],
    ) -> list[tuple[Observed, list[tuple[str, ...]]]]:
        """Chooses the batches of a side, each with the blocks that come from it."""
        groups: list[tuple[Observed, list[tuple[str, ...]]]] = []
        for source in dict.fromkeys(density.source for density in densities):
            if source not in observed:
                raise ValueError(
                    f"Term {term.name!r} needs source {source!r}, but got {tuple(observed)}."
                )
            blocks = [density.parts for density in densities if density.source == source]
            whole = _smallest(observed[source], _union(blocks))
            if whole is not None:
                groups.append((whole, blocks))
                continue
            chosen: dict[int, tuple[Observed, list[tuple[str, ...]]]] = {}
            for block in blocks:
                batch = _smallest(observed[source], block)
                if batch is None:
                    raise ValueError(
                        f"Term {term.name!r} needs observations of {block} under {source!r}, "
                        f"but there are only {list(observed[source])}."
                    )
                chosen.setdefault(id(batch), (batch, []))[1].append(block)
            groups += chosen.values()
        return groups

    def _combine(
        self, batch: Observed, blocks: Sequence[tuple[str, ...]], rows: int, who: str
    ) -> Batch:
        """Draws rows in which the blocks are independent, in the form in which the batch came."""
        if self.collisions == "forbid" and batch.size < len(blocks):
            raise ValueError(
                f"{who} combines {len(blocks)} blocks of different observations, but the batch "
                f"of {batch.partition.names} has {batch.size} rows. Use batches of at least "
                f"{len(blocks)}, or group the parts with Factorisation.hierarchical."
            )
        names = _union(blocks)
        restricted = batch.partition.restrict(names)
        observed = self._cut(batch, names)
        arrays = restricted.arguments(observed)
        order = self._order(batch.size, arrays)
        orders: dict[str, Tensor] = {}
        for k, block in enumerate(blocks):
            if self.collisions == "forbid":
                block_order = order.roll(-k)[:rows] if k else order[:rows]
            else:
                block_order = (self._order(batch.size, arrays) if k else order)[:rows]
            orders |= dict.fromkeys(block, block_order)
        drawn = restricted.recombine(observed, orders)
        if isinstance(observed, Mapping):
            return restricted.split(drawn)
        return drawn

    def _order(self, size: int, arrays: Sequence[Array]) -> Tensor:
        device = next((a.device for a in arrays if isinstance(a, Tensor)), None)
        if self.rng is None:
            return torch.randperm(size, device=device)
        order = torch.randperm(size, generator=self.rng, device=self.rng.device)
        if device is not None and device.type == "cuda" and order.device.type == "cpu":
            order = order.pin_memory()  # else the copy would wait for the device
        return order.to(device, non_blocking=True)

    def _cut(self, batch: Observed, names: tuple[str, ...]) -> Batch:
        """Takes parts of a batch as they were observed."""
        if isinstance(batch.batch, Mapping) and len(names) > 1:
            return {name: batch.batch[name] for name in batch.partition.ordered(names)}
        return batch.partition.cut(batch.batch, names)


def as_observations(given: Observations | Batch) -> Observations:
    """Takes a batch of whole observations for `Observations` of the pattern "joint"."""
    return given if isinstance(given, Observations) else Observations(joint=given)


def map_tensors(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Applies a function to every tensor of a batch; arrays stay as they are."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: cast(Array, map_tensors(change, array)) for name, array in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(cast(Array, map_tensors(change, array)) for array in batch)
    return batch


def _union(blocks: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(name for block in blocks for name in block)


def _smallest(
    observed: Mapping[tuple[str, ...], Observed], names: Iterable[str]
) -> Observed | None:
    """Returns the batch with the fewest parts that holds all the names."""
    wanted = set(names)
    fitting = [pattern for pattern in observed if wanted.issubset(pattern)]
    return observed[min(fitting, key=len)] if fitting else None


def _shapes(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name!r}: {tuple(a.shape)}" for name, a in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(str(tuple(array.shape)) for array in batch) + ")"
    return str(tuple(cast(Array, batch).shape))
