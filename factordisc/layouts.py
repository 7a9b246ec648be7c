"""How the parts lie in a sample: slices, indices or boxes of one array, or separate fields."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__: list[str] = []

Array: TypeAlias = "Tensor | npt.NDArray[Any]"
Batch: TypeAlias = "Array | Sequence[Array] | Mapping[str, Array]"
Span: TypeAlias = "tuple[int, int]"


class Layout(Protocol):
    """How the parts lie in a sample. `normalise` comes first; the others trust its result."""

    names: tuple[str, ...]

    def normalise(self, x: Batch) -> Any: ...
    def arrays(self, x: Any) -> tuple[Array, ...]: ...
    def split(self, x: Any) -> dict[str, Array]: ...
    def join(self, parts: Mapping[str, Array]) -> Array | tuple[Array, ...]: ...
    def take(self, x: Any, names: tuple[str, ...]) -> Array | tuple[Array, ...]: ...
    def recombine(self, x: Any, orders: Mapping[str, Tensor]) -> Array | tuple[Array, ...]: ...
    def restrict(self, names: tuple[str, ...]) -> Layout: ...


class Along(ABC):
    """What slices and indices share: the parts lie along one dimension of one array."""

    names: tuple[str, ...]
    dim: int
    length: int

    def normalise(self, x: Batch) -> Array:
        if isinstance(x, Mapping):
            check_same_names(self, self.names, x)
            return self.join(x)
        if not isinstance(x, (Tensor, np.ndarray)):
            raise TypeError(f"{self} expects a tensor or an array, but got {kind(x)}.")
        axis = self.axis(x)
        if x.shape[axis] != self.length:
            raise ValueError(
                f"{self} expects {self.length} entries along dim {self.dim}, "
                f"but got x with shape {tuple(x.shape)}."
            )
        return x

    def axis(self, x: Array) -> int:
        axis = self.dim if self.dim > 0 else x.ndim + self.dim
        if not 0 < axis < x.ndim:
            raise ValueError(
                f"{self} divides dim {self.dim} behind the batch, "
                f"but got x with shape {tuple(x.shape)}."
            )
        return axis

    def arrays(self, x: Array) -> tuple[Array, ...]:
        return (x,)

    def split(self, x: Array) -> dict[str, Array]:
        return {name: self.take(x, (name,)) for name in self.names}

    @abstractmethod
    def take(self, x: Array, names: tuple[str, ...]) -> Array: ...

    @abstractmethod
    def join(self, parts: Mapping[str, Array]) -> Array: ...

    def recombine(self, x: Array, orders: Mapping[str, Tensor]) -> Array:
        return self.join({n: select_rows(self.take(x, (n,)), orders[n]) for n in self.names})

    def concatenate(self, parts: Mapping[str, Array], sizes: Mapping[str, int]) -> Array:
        """Checks the parts' shapes and puts them side by side, in the order of the names."""
        ordered = [parts[name] for name in self.names]
        for name, part in zip(self.names, ordered, strict=True):
            if not isinstance(part, (Tensor, np.ndarray)):
                raise TypeError(f"Part {name!r} expects a tensor or an array, got {kind(part)}.")
            axis = self.axis(part)
            if part.shape[axis] != sizes[name] or part.shape[0] != ordered[0].shape[0]:
                raise ValueError(
                    f"Part {name!r} of {self} expects {ordered[0].shape[0]} observations with "
                    f"{sizes[name]} entries along dim {self.dim}, "
                    f"but got shape {tuple(part.shape)}."
                )
        if len(ordered) == 1:
            return ordered[0]
        axis = self.axis(ordered[0])
        if isinstance(ordered[0], np.ndarray):
            return np.concatenate(cast("list[npt.NDArray[Any]]", ordered), axis=axis)
        return torch.cat(cast("list[Tensor]", ordered), dim=axis)


class Slices(Along):
    """Consecutive slices of one dimension."""

    def __init__(self, sizes: dict[str, int], dim: int) -> None:
        self.names = tuple(sizes)
        self.sizes = sizes
        self.dim = dim
        self.length = sum(sizes.values())
        starts = np.cumsum([0, *sizes.values()])
        self.spans = {name: (int(starts[i]), int(starts[i + 1])) for i, name in enumerate(sizes)}
        self.neighbours: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def __repr__(self) -> str:
        return f"Partition({self.sizes}, dim={self.dim})"

    def take(self, x: Array, names: tuple[str, ...]) -> Array:
        if names == self.names:
            return x
        axis = self.axis(x)
        ends = [(self.spans[run[0]][0], self.spans[run[-1]][1]) for run in self.runs(names)]
        pieces = [narrow(x, axis, start, stop) for start, stop in ends]
        if len(pieces) == 1:
            return pieces[0]
        if isinstance(x, np.ndarray):
            return np.concatenate(cast("list[npt.NDArray[Any]]", pieces), axis=axis)
        return torch.cat(cast("list[Tensor]", pieces), dim=axis)

    def runs(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Divides parts, in their order, into neighbours: `take` gives a view of each run."""
        if names not in self.neighbours:
            runs: list[list[str]] = []
            for name in names:
                if runs and self.spans[runs[-1][-1]][1] == self.spans[name][0]:
                    runs[-1].append(name)
                else:
                    runs.append([name])
            self.neighbours[names] = [tuple(run) for run in runs]
        return self.neighbours[names]

    def join(self, parts: Mapping[str, Array]) -> Array:
        return self.concatenate(parts, self.sizes)

    def recombine(self, x: Array, orders: Mapping[str, Tensor]) -> Array:
        return recombined(self, x, orders)

    def restrict(self, names: tuple[str, ...]) -> Slices:
        return Slices({name: self.sizes[name] for name in names}, self.dim)


class Indices(Along):
    """Any sets of indices of one dimension."""

    def __init__(self, parts: dict[str, tuple[int, ...]], dim: int) -> None:
        self.names = tuple(parts)
        self.parts = parts
        self.dim = dim
        self.sizes = {name: len(entries) for name, entries in parts.items()}
        self.length = sum(self.sizes.values())
        # Where each entry of the whole stands when the parts lie side by side.
        side_by_side = [entry for entries in parts.values() for entry in entries]
        self.inverse = tuple(int(i) for i in np.argsort(side_by_side))
        self.tensors: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def __repr__(self) -> str:
        parts = {name: list(entries) for name, entries in self.parts.items()}
        return f"Partition.indices({parts}, dim={self.dim})"

    def take(self, x: Array, names: tuple[str, ...]) -> Array:
        if names == self.names:
            return x
        return self.select(x, tuple(sorted(i for name in names for i in self.parts[name])))

    def join(self, parts: Mapping[str, Array]) -> Array:
        return self.select(self.concatenate(parts, self.sizes), self.inverse)

    def select(self, x: Array, entries: tuple[int, ...]) -> Array:
        axis = self.axis(x)
        if entries == tuple(range(entries[0], entries[-1] + 1)):
            return narrow(x, axis, entries[0], entries[-1] + 1)
        if isinstance(x, np.ndarray):
            return np.take(x, entries, axis=axis)
        return x.index_select(axis, self.tensor(entries, x.device))

    def tensor(self, entries: tuple[int, ...], device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            # A cache that grows while a graph is traced would be a side effect of the graph.
            return torch.tensor(entries, device=device)
        key = (entries, device)
        if key not in self.tensors:
            self.tensors[key] = torch.tensor(entries, device=device)
        return self.tensors[key]

    def restrict(self, names: tuple[str, ...]) -> Indices:
        kept = sorted(i for name in names for i in self.parts[name])
        rank = {entry: i for i, entry in enumerate(kept)}
        return Indices(
            {name: tuple(rank[i] for i in self.parts[name]) for name in names}, self.dim
        )


class Boxes:
    """Boxes within the trailing dimensions of one array.

    The union of some of them need not be a box. Their batch is then a tuple, one array per box.
    """

    def __init__(self, boxes: Mapping[str, tuple[Span, ...]]) -> None:
        self.names = tuple(boxes)
        starts = [min(box[d][0] for box in boxes.values()) for d in range(_rank(boxes))]
        self.shape = tuple(
            max(box[d][1] for box in boxes.values()) - start for d, start in enumerate(starts)
        )
        self.boxes = {
            name: tuple((a - s, b - s) for (a, b), s in zip(box, starts, strict=True))
            for name, box in boxes.items()
        }
        self.sizes = {name: tuple(b - a for a, b in box) for name, box in self.boxes.items()}
        self.whole = sum(map(prod, self.sizes.values())) == prod(self.shape)
        self.restricted: dict[tuple[str, ...], Boxes] = {}

    @classmethod
    def covering(cls, boxes: Mapping[str, tuple[Span, ...]], shape: tuple[int, ...]) -> Boxes:
        """Makes boxes after checking that each place of `shape` belongs to one of them."""
        owner = np.full(shape, -1)
        for i, (name, box) in enumerate(boxes.items()):
            place = owner[tuple(slice(a, b) for a, b in box)]
            if (place >= 0).any():
                other = list(boxes)[int(place[place >= 0][0])]
                raise ValueError(f"Parts do not overlap, but those of {other!r} and {name!r} do.")
            place[:] = i
        if (owner < 0).any():
            missing = tuple(int(i) for i in np.argwhere(owner < 0)[0])
            raise ValueError(
                f"The parts of Partition.boxes cover an array of shape {shape}, "
                f"but {missing} belongs to no part. Add it to a part."
            )
        return cls(boxes)

    def __repr__(self) -> str:
        boxes = {name: tuple(slice(a, b) for a, b in box) for name, box in self.boxes.items()}
        written = re.sub(r", None\)", ")", repr(boxes))
        return f"Partition.boxes({written}, shape={self.shape})"

    def normalise(self, x: Batch) -> Array | tuple[Array, ...]:
        if isinstance(x, Mapping):
            check_same_names(self, self.names, x)
            return self.join(x)
        if not self.whole:
            if not isinstance(x, (tuple, list)) or len(x) != len(self.names):
                raise TypeError(
                    f"The boxes of {self.names} do not fill a box: their batch is a mapping, or "
                    f"a tuple of {len(self.names)} tensors, but got {kind(x)}."
                )
            return self.join(dict(zip(self.names, x, strict=True)))
        if not isinstance(x, (Tensor, np.ndarray)):
            raise TypeError(f"{self} expects a tensor or an array, but got {kind(x)}.")
        self.check_shape(x, self.shape, str(self))
        return x

    def check_shape(self, x: Array, shape: tuple[int, ...], who: str) -> None:
        if x.ndim <= len(shape) or tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"{who} expects a batch whose last dimensions are {shape}, "
                f"but got shape {tuple(x.shape)}."
            )

    def arrays(self, x: Any) -> tuple[Array, ...]:
        return (x,) if self.whole else tuple(x)

    def split(self, x: Any) -> dict[str, Array]:
        if not self.whole:
            return dict(zip(self.names, x, strict=True))
        return {name: _window(x, box) for name, box in self.boxes.items()}

    def join(self, parts: Mapping[str, Array]) -> Array | tuple[Array, ...]:
        ordered = [parts[name] for name in self.names]
        for name, part in zip(self.names, ordered, strict=True):
            if not isinstance(part, (Tensor, np.ndarray)):
                raise TypeError(f"Part {name!r} expects a tensor or an array, got {kind(part)}.")
            self.check_shape(part, self.sizes[name], f"Part {name!r}")
            rank = len(self.shape)
            if part.shape[:-rank] != ordered[0].shape[:-rank]:
                raise ValueError(
                    f"The parts of one batch have one batch size and equal channels, but "
                    f"{self.names[0]!r} has shape {tuple(ordered[0].shape)} "
                    f"and {name!r} {tuple(part.shape)}."
                )
        if not self.whole:
            return tuple(ordered)
        if len(ordered) == 1:
            return ordered[0]
        shape = (*ordered[0].shape[: -len(self.shape)], *self.shape)
        whole: Any
        if isinstance(ordered[0], np.ndarray):
            whole = np.empty(shape, np.result_type(*cast("list[npt.NDArray[Any]]", ordered)))
        else:
            dtype = reduce(torch.promote_types, (cast(Tensor, part).dtype for part in ordered))
            whole = ordered[0].new_empty(shape, dtype=dtype)
        for name, part in zip(self.names, ordered, strict=True):
            _window(whole, self.boxes[name])[...] = part
        return cast(Array, whole)

    def take(self, x: Any, names: tuple[str, ...]) -> Array | tuple[Array, ...]:
        if names == self.names:
            return cast("Array | tuple[Array, ...]", x)
        taken = self.restrict(names)
        if self.whole and taken.whole:
            spans = [self.boxes[name] for name in names]
            window: Array = _window(
                x,
                tuple(
                    (min(s[d][0] for s in spans), max(s[d][1] for s in spans))
                    for d in range(len(self.shape))
                ),
            )
            return window
        return taken.join({name: part for name, part in self.split(x).items() if name in names})

    def recombine(self, x: Any, orders: Mapping[str, Tensor]) -> Array | tuple[Array, ...]:
        if self.whole:
            return recombined(self, x, orders)
        return self.join({n: select_rows(a, orders[n]) for n, a in self.split(x).items()})

    def runs(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Divides parts into sets that `take` gives a view of."""
        return [names] if self.restrict(names).whole else [(name,) for name in names]

    def restrict(self, names: tuple[str, ...]) -> Boxes:
        if names not in self.restricted:
            self.restricted[names] = Boxes({name: self.boxes[name] for name in names})
        return self.restricted[names]


def _rank(boxes: Mapping[str, tuple[Span, ...]]) -> int:
    return len(next(iter(boxes.values()), ()))


def _window(x: Any, box: Sequence[Span]) -> Any:
    """A view of a box in the last dimensions."""
    return x[(..., *(slice(start, stop) for start, stop in box))]


class Fields:
    """Every part is a tensor of its own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"Partition.fields({', '.join(map(repr, self.names))})"

    def normalise(self, x: Batch) -> tuple[Array, ...]:
        if isinstance(x, Mapping):
            check_same_names(self, self.names, x)
            arrays = tuple(x[name] for name in self.names)
        elif isinstance(x, (Tensor, np.ndarray)) and len(self.names) == 1:
            arrays = (x,)
        elif isinstance(x, (tuple, list)):
            arrays = tuple(x)
            if len(arrays) != len(self.names):
                raise ValueError(
                    f"{self} expects {len(self.names)} fields, but got {len(arrays)}."
                )
        else:
            raise TypeError(
                f"{self} expects a tuple or a mapping of {len(self.names)} arrays, "
                f"but got {kind(x)}."
            )
        for name, array in zip(self.names, arrays, strict=True):
            if not isinstance(array, (Tensor, np.ndarray)):
                raise TypeError(f"Field {name!r} expects a tensor or array, got {kind(array)}.")
            if array.ndim == 0:
                raise ValueError(f"Field {name!r} expects a batch dimension, but got shape ().")
        lengths = {name: a.shape[0] for name, a in zip(self.names, arrays, strict=True)}
        if any(length != arrays[0].shape[0] for length in lengths.values()):
            raise ValueError(
                f"The fields of one batch have one length, but got {lengths}. "
                "Observations that were not seen together are batches of their own: "
                "Observations(scene=..., labels=...)."
            )
        return arrays

    def arrays(self, x: tuple[Array, ...]) -> tuple[Array, ...]:
        return x

    def split(self, x: tuple[Array, ...]) -> dict[str, Array]:
        return dict(zip(self.names, x, strict=True))

    def join(self, parts: Mapping[str, Array]) -> Array | tuple[Array, ...]:
        x = self.normalise(parts)
        return x[0] if len(x) == 1 else x

    def take(self, x: tuple[Array, ...], names: tuple[str, ...]) -> Array | tuple[Array, ...]:
        if names == self.names and len(names) > 1:
            return x
        taken = tuple(array for name, array in self.split(x).items() if name in names)
        return taken[0] if len(taken) == 1 else taken

    def recombine(
        self, x: tuple[Array, ...], orders: Mapping[str, Tensor]
    ) -> Array | tuple[Array, ...]:
        return self.join({n: select_rows(a, orders[n]) for n, a in self.split(x).items()})

    def restrict(self, names: tuple[str, ...]) -> Fields:
        return Fields(names)


def recombined(layout: Slices | Boxes, x: Array, orders: Mapping[str, Tensor]) -> Array:
    """Makes rows of parts that are views of one array, each in an order of its own."""
    if isinstance(x, np.ndarray) or x.requires_grad:
        parts = layout.split(x)
        return cast(Array, layout.join({n: select_rows(parts[n], orders[n]) for n in parts}))
    # Straight into the result: half the time of parts that are concatenated afterwards.
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    drawn = torch.empty(
        (len(orders[layout.names[0]]), *x.shape[1:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    # The parts of a block share an order: neighbours are taken at once, not part by part.
    blocks: dict[int, list[str]] = {}
    for name in layout.names:
        blocks.setdefault(id(orders[name]), []).append(name)
    for block in blocks.values():
        order = orders[block[0]].to(x.device, non_blocking=True)
        for names in layout.runs(tuple(block)):
            part, place = layout.take(x, names), layout.take(drawn, names)
            torch.index_select(cast(Tensor, part), 0, order, out=cast(Tensor, place))
    return drawn


def narrow(x: Array, axis: int, start: int, stop: int) -> Array:
    if isinstance(x, np.ndarray):
        return x[(slice(None),) * axis + (slice(start, stop),)]
    return x.narrow(axis, start, stop - start)


def select_rows(array: Array, order: Tensor) -> Array:
    if isinstance(array, np.ndarray):
        return np.take(array, order.numpy(), axis=0)
    return array.index_select(0, order.to(array.device, non_blocking=True))


def kind(x: object) -> str:
    return type(x).__name__


def check_integer(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} is an integer, but got {value!r} of type {kind(value)}.")


def checked_dim(dim: int) -> int:
    check_integer(dim, "`dim`")
    if dim == 0:
        raise ValueError("`dim` 0 is the batch; the parts lie along another dimension.")
    return int(dim)


def check_same_names(who: object, names: tuple[str, ...], parts: Mapping[str, Any]) -> None:
    missing = [name for name in names if name not in parts]
    unknown = [name for name in parts if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{who} expects the parts {names}, but got {tuple(parts)}"
            + (f": {missing[0]!r} is missing." if missing else f": {unknown[0]!r} is unknown.")
        )
