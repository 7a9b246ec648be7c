"""Observations: what a training step has of real data, by the parts that were seen together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from factordisc.layouts import Array, Batch, by_name
from factordisc.names import Pattern, pattern_names

__all__ = ["Observations"]


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
        self, batches: Mapping[Any, Batch | None] | None = None, /, **named: Batch | None
    ) -> None:
        self._batches: dict[frozenset[str], tuple[Pattern, Any]] = {}
        patterns: set[frozenset[str]] = set()
        for key, batch in [*dict(batches or {}).items(), *named.items()]:
            names = pattern_names(key)
            if frozenset(names) in patterns:
                raise ValueError(
                    f"Observations expects every pattern once, but got {key!r} twice."
                )
            patterns.add(frozenset(names))
            if batch is not None:
                pattern = names[0] if len(names) == 1 else names
                self._batches[frozenset(names)] = (pattern, batch)

    def __getitem__(self, pattern: Pattern) -> Any:
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

    def entries(self) -> list[tuple[Pattern, Any]]:
        """Returns all patterns with their batches."""
        return list(self._batches.values())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Observations:
        return Observations({key: _mapped(change, batch) for key, batch in self.items()})

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


def _mapped(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Applies a function to every tensor of a batch; arrays stay as they are."""
    if isinstance(batch, Tensor):
        return change(batch)
    named = by_name(batch)
    if named is not None:
        return {name: _mapped(change, named[name]) for name in named.keys()}
    if isinstance(batch, (tuple, list)):
        return tuple(_mapped(change, array) for array in batch)
    return batch


def _shapes(batch: Any) -> str:
    named = by_name(batch)
    if named is not None:
        return f"{{{', '.join(f'{name!r}: {_shapes(named[name])}' for name in named.keys())}}}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(map(_shapes, batch)) + ")"
    array: Array = batch
    return str(tuple(array.shape))
