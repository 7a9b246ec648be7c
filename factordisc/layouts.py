"""How the parts lie in a batch: slices, indices or boxes of one tensor, or separate fields.

Inside the package a batch is the tuple of tensors that a network is called with. `read` makes it
of what users pass and checks it; every other method trusts what it gets.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from factordisc.names import kind

__all__: list[str] = []

Array: TypeAlias = "Tensor | npt.NDArray[Any]"
Batch: TypeAlias = "Array | Sequence[Array] | Mapping[str, Array]"
Tensors: TypeAlias = "tuple[Tensor, ...]"
Take: TypeAlias = "Callable[[Tensors], Tensors]"
Combine: TypeAlias = "Callable[[Tensors, Sequence[Tensor]], Tensors]"
Span: TypeAlias = "tuple[int, int]"


class Layout(ABC):
    """How the parts lie in a batch."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.position = {name: i for i, name in enumerate(self.names)}

    def read(self, x: Batch) -> Tensors:
        """Brings a batch into canonical form.

        Raises:
            ValueError: If the batch does not have the form that the layout divides.
            TypeError: If it is of the wrong kind.
        """
        named = None if isinstance(x, Tensor) else by_name(x)
        if named is None:
            return self._read(x)
        check_same_names(self, self.names, named)
        return self.join(named)

    def join(self, parts: Mapping[str, Array]) -> Tensors:
        """Puts all parts together, after checking that they fit."""
        tensors = [read_tensor(parts[name], f"Part {name!r}") for name in self.names]
        self._check(tensors)
        return self.assemble(tensors)

    @abstractmethod
    def _read(self, x: Any) -> Tensors:
        """Reads and checks what has no names."""

    @abstractmethod
    def _check(self, parts: Sequence[Tensor]) -> None:
        """Refuses parts, in order, that do not fit together."""

    @abstractmethod
    def assemble(self, parts: Sequence[Tensor]) -> Tensors:
        """Puts parts together that are known to fit."""

    @abstractmethod
    def split(self, x: Tensors) -> dict[str, Tensor]:
        """Takes a batch apart, into views where possible."""

    @abstractmethod
    def taker(self, names: tuple[str, ...]) -> Take:
        """Returns what takes some parts, in the order of the layout, out of a batch."""

    @abstractmethod
    def restrict(self, names: tuple[str, ...]) -> Layout:
        """Returns the layout of what `taker` gives."""

    def combiner(self, blocks: Sequence[tuple[str, ...]]) -> Combine:
        """Returns what makes rows whose k-th block of parts comes in the k-th order."""
        which = {name: k for k, block in enumerate(blocks) for name in block}
        there = self.restrict(self.ordered(which))
        takes = [(self.taker((name,)), which[name]) for name in there.names]
        return partial(self._combine, there, takes)

    @staticmethod
    def _combine(
        there: Layout, takes: list[tuple[Take, int]], x: Tensors, orders: Sequence[Tensor]
    ) -> Tensors:
        return there.assemble([take(x)[0].index_select(0, orders[k]) for take, k in takes])

    def typed(self, x: Tensors) -> Iterable[tuple[str | None, Tensor]]:
        """Returns the tensors whose dtype and device must agree between batches, by part."""
        return [(None, tensor) for tensor in x]

    def ordered(self, names: str | Iterable[str]) -> tuple[str, ...]:
        """Sorts names into the order of the parts.

        Raises:
            ValueError: If there is none, one is unknown, or one is named twice.
        """
        given = (names,) if isinstance(names, str) else tuple(names)
        for name in given:
            if name not in self.position:
                raise ValueError(f"{self} has no part {name!r}. Its parts are {self.names}.")
        if not given or len(set(given)) < len(given):
            raise ValueError(f"Expected at least one part and each once, but got {given}.")
        return tuple(sorted(given, key=self.position.__getitem__))


class Windows(Layout):
    """What slices and boxes share: a part is a view of one tensor, and so is a run of them."""

    filled = True  # or are there holes, so that parts are tensors of their own?

    @abstractmethod
    def restrict(self, names: tuple[str, ...]) -> Windows: ...

    @abstractmethod
    def runs(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Divides parts, in order, into sets of which each is one view."""

    @abstractmethod
    def window(self, run: tuple[str, ...]) -> Any:
        """Says where a run lies, for `view`."""

    @abstractmethod
    def view(self, x: Tensor, window: Any) -> Tensor: ...

    @abstractmethod
    def row_shape(self, x: Tensor) -> Sequence[int]:
        """The shape of a row of this layout whose other dimensions are those of `x`."""

    def combiner(self, blocks: Sequence[tuple[str, ...]]) -> Combine:
        there = self.restrict(self.ordered([name for block in blocks for name in block]))
        joined = super().combiner(blocks)
        if not (self.filled and there.filled):
            return joined
        moves = [
            (k, self.window(run), there.window(run))
            for k, block in enumerate(blocks)
            for run in self.runs(self.ordered(block))
        ]
        return partial(self._move, there, moves, joined)

    def _move(
        self,
        there: Windows,
        moves: list[tuple[int, Any, Any]],
        joined: Combine,
        x: Tensors,
        orders: Sequence[Tensor],
    ) -> Tensors:
        """Writes rows straight into the result: half the time of joining parts afterwards."""
        tensor = x[0]
        if tensor.requires_grad:
            return joined(x, orders)
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        rows = tensor.new_empty((orders[0].shape[0], *there.row_shape(tensor)))
        if last:
            rows = rows.contiguous(memory_format=torch.channels_last)
        for k, source, place in moves:
            out = there.view(rows, place)
            torch.index_select(self.view(tensor, source), 0, orders[k], out=out)
        return (rows,)


class Along(Layout):
    """What slices and indices share: the parts lie along one dimension of one tensor."""

    def __init__(self, sizes: dict[str, int], dim: int) -> None:
        super().__init__(sizes)
        self.sizes = sizes
        self.dim = dim
        self.length = sum(sizes.values())

    def _read(self, x: Any) -> Tensors:
        tensor = x if isinstance(x, Tensor) else read_tensor(x, self)
        if tensor.shape[self.axis(tensor)] != self.length:
            raise ValueError(
                f"{self} expects {self.length} entries along dim {self.dim}, "
                f"but got x with shape {tuple(tensor.shape)}."
            )
        return (tensor,)

    def axis(self, x: Tensor) -> int:
        axis = self.dim if self.dim > 0 else x.dim() + self.dim
        if not 0 < axis < x.dim():
            raise ValueError(
                f"{self} divides dim {self.dim} behind the batch, "
                f"but got x with shape {tuple(x.shape)}."
            )
        return axis

    def _check(self, parts: Sequence[Tensor]) -> None:
        for name, part in zip(self.names, parts, strict=True):
            if part.shape[self.axis(part)] != self.sizes[name] or len(part) != len(parts[0]):
                raise ValueError(
                    f"Part {name!r} of {self} expects {len(parts[0])} observations with "
                    f"{self.sizes[name]} entries along dim {self.dim}, "
                    f"but got shape {tuple(part.shape)}."
                )

    def assemble(self, parts: Sequence[Tensor]) -> Tensors:
        # One part is itself, not a copy.
        return (parts[0] if len(parts) == 1 else torch.cat(list(parts), self.dim),)

    def _narrow(self, start: int, length: int, x: Tensors) -> Tensors:
        return x if length == self.length else (x[0].narrow(self.dim, start, length),)


class Slices(Along, Windows):
    """Consecutive slices of one dimension."""

    def __init__(self, sizes: dict[str, int], dim: int) -> None:
        super().__init__(sizes, dim)
        starts = [0, *np.cumsum(list(sizes.values())).tolist()]
        self.spans = {name: (starts[i], starts[i + 1]) for i, name in enumerate(sizes)}

    def __repr__(self) -> str:
        return f"Partition({self.sizes}, dim={self.dim})"

    def runs(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        runs: list[tuple[str, ...]] = []
        for name in names:
            if runs and self.spans[runs[-1][-1]][1] == self.spans[name][0]:
                runs[-1] = (*runs[-1], name)
            else:
                runs.append((name,))
        return runs

    def window(self, run: tuple[str, ...]) -> Span:
        start = self.spans[run[0]][0]
        return start, self.spans[run[-1]][1] - start

    def view(self, x: Tensor, window: Span) -> Tensor:
        return x.narrow(self.dim, *window)

    def row_shape(self, x: Tensor) -> Sequence[int]:
        axis = self.axis(x)
        return (*x.shape[1:axis], self.length, *x.shape[axis + 1 :])

    def taker(self, names: tuple[str, ...]) -> Take:
        windows = [self.window(run) for run in self.runs(names)]
        if len(windows) == 1:
            return partial(self._narrow, *windows[0])
        return partial(self._join_views, windows)

    def _join_views(self, windows: list[Span], x: Tensors) -> Tensors:
        return (torch.cat([self.view(x[0], window) for window in windows], self.dim),)

    def split(self, x: Tensors) -> dict[str, Tensor]:
        pieces = torch.split(x[0], list(self.sizes.values()), self.dim)
        return dict(zip(self.names, pieces, strict=True))

    def restrict(self, names: tuple[str, ...]) -> Slices:
        return Slices({name: self.sizes[name] for name in names}, self.dim)


class Indices(Along):
    """Any sets of indices of one dimension."""

    def __init__(self, parts: dict[str, tuple[int, ...]], dim: int) -> None:
        super().__init__({name: len(entries) for name, entries in parts.items()}, dim)
        self.parts = parts
        # Where each entry of the whole stands when the parts lie side by side.
        side_by_side = [entry for entries in parts.values() for entry in entries]
        self.inverse = Chosen(np.argsort(side_by_side).tolist(), dim)

    def __repr__(self) -> str:
        parts = {name: list(entries) for name, entries in self.parts.items()}
        return f"Partition.indices({parts}, dim={self.dim})"

    def taker(self, names: tuple[str, ...]) -> Take:
        entries = sorted(i for name in names for i in self.parts[name])
        if entries[-1] - entries[0] + 1 == len(entries):
            return partial(self._narrow, entries[0], len(entries))
        return Chosen(entries, self.dim)

    def split(self, x: Tensors) -> dict[str, Tensor]:
        return {name: self.taker((name,))(x)[0] for name in self.names}

    def assemble(self, parts: Sequence[Tensor]) -> Tensors:
        joined = super().assemble(parts)
        return joined if len(parts) == 1 else self.inverse(joined)

    def restrict(self, names: tuple[str, ...]) -> Indices:
        kept = sorted(i for name in names for i in self.parts[name])
        rank = {entry: i for i, entry in enumerate(kept)}
        return Indices(
            {name: tuple(rank[i] for i in self.parts[name]) for name in names}, self.dim
        )


class Chosen:
    """Takes some entries of one dimension; keeps their numbers on every device it has met."""

    def __init__(self, entries: list[int], dim: int) -> None:
        self.entries = entries
        self.dim = dim
        self.tensors: dict[torch.device, Tensor] = {}

    def __call__(self, x: Tensors) -> Tensors:
        index = self.tensors.get(x[0].device)
        if index is None:
            index = torch.tensor(self.entries, device=x[0].device)
            # What a traced graph makes is not kept: it would be a side effect of the graph.
            if not torch.compiler.is_compiling():
                self.tensors[x[0].device] = index
        return (x[0].index_select(self.dim, index),)


class Boxes(Windows):
    """Boxes within the trailing dimensions of one tensor.

    The union of some of them need not be a box. Their batch is then a tensor per box, as many
    arguments of a network.
    """

    def __init__(self, boxes: Mapping[str, tuple[Span, ...]]) -> None:
        super().__init__(boxes)
        starts = [min(span[0] for span in spans) for spans in zip(*boxes.values(), strict=True)]
        ends = [max(span[1] for span in spans) for spans in zip(*boxes.values(), strict=True)]
        self.shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        self.boxes = {
            name: tuple((a - s, b - s) for (a, b), s in zip(box, starts, strict=True))
            for name, box in boxes.items()
        }
        self.sizes = {name: tuple(b - a for a, b in box) for name, box in self.boxes.items()}
        self.filled = sum(map(prod, self.sizes.values())) == prod(self.shape)

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

    def _read(self, x: Any) -> Tensors:
        if not self.filled:
            if not isinstance(x, (tuple, list)) or len(x) != len(self.names):
                raise TypeError(
                    f"The boxes of {self.names} do not fill a box: their batch is a mapping, or "
                    f"a tuple of {len(self.names)} tensors, but got {kind(x)}."
                )
            return self.join(dict(zip(self.names, x, strict=True)))
        tensor = read_tensor(x, self)
        self._check_shape(tensor, self.shape, str(self))
        return (tensor,)

    def _check_shape(self, x: Tensor, shape: tuple[int, ...], who: str) -> None:
        if x.dim() <= len(shape) or tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"{who} expects a batch whose last dimensions are {shape}, "
                f"but got shape {tuple(x.shape)}."
            )

    def _check(self, parts: Sequence[Tensor]) -> None:
        rank = len(self.shape)
        for name, part in zip(self.names, parts, strict=True):
            self._check_shape(part, self.sizes[name], f"Part {name!r}")
            if part.shape[:-rank] != parts[0].shape[:-rank]:
                raise ValueError(
                    f"The parts of one batch have one batch size and equal channels, but "
                    f"{self.names[0]!r} has shape {tuple(parts[0].shape)} "
                    f"and {name!r} {tuple(part.shape)}."
                )

    def assemble(self, parts: Sequence[Tensor]) -> Tensors:
        if not self.filled or len(parts) == 1:
            return tuple(parts)
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        rows = parts[0].shape[: -len(self.shape)]
        whole = parts[0].new_empty((*rows, *self.shape), dtype=dtype)
        for box, part in zip(self.boxes.values(), parts, strict=True):
            self.view(whole, box)[...] = part
        return (whole,)

    def split(self, x: Tensors) -> dict[str, Tensor]:
        if not self.filled:
            return dict(zip(self.names, x, strict=True))
        return {name: self.view(x[0], box) for name, box in self.boxes.items()}

    def runs(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [names] if self.restrict(names).filled else [(name,) for name in names]

    def window(self, run: tuple[str, ...]) -> tuple[Span, ...]:
        """Returns the smallest box around some parts."""
        spans = zip(*(self.boxes[name] for name in run), strict=True)
        return tuple((min(a for a, _ in s), max(b for _, b in s)) for s in spans)

    def view(self, x: Tensor, window: tuple[Span, ...]) -> Tensor:
        place: Any = (..., *[slice(start, stop) for start, stop in window])
        return x[place]

    def row_shape(self, x: Tensor) -> Sequence[int]:
        return [*x.shape[1 : -len(self.shape)], *self.shape]

    def taker(self, names: tuple[str, ...]) -> Take:
        if not self.filled:
            places = [self.position[name] for name in names]
            return partial(self._take_boxes, places, self.restrict(names))
        return partial(self._take_windows, [self.window(run) for run in self.runs(names)])

    def _take_boxes(self, places: list[int], there: Boxes, x: Tensors) -> Tensors:
        return there.assemble([x[place] for place in places])

    def _take_windows(self, windows: list[tuple[Span, ...]], x: Tensors) -> Tensors:
        return tuple(self.view(x[0], window) for window in windows)

    def restrict(self, names: tuple[str, ...]) -> Boxes:
        return Boxes({name: self.boxes[name] for name in names})


class Fields(Layout):
    """Every part is a tensor of its own."""

    def __repr__(self) -> str:
        return f"Partition.fields({', '.join(map(repr, self.names))})"

    def _read(self, x: Any) -> Tensors:
        if isinstance(x, (Tensor, np.ndarray)) and len(self.names) == 1:
            x = (x,)
        elif not isinstance(x, (tuple, list)):
            raise TypeError(
                f"{self} expects a tuple or a mapping of {len(self.names)} arrays, "
                f"but got {kind(x)}."
            )
        if len(x) != len(self.names):
            raise ValueError(f"{self} expects {len(self.names)} fields, but got {len(x)}.")
        return self.join(dict(zip(self.names, x, strict=True)))

    def _check(self, parts: Sequence[Tensor]) -> None:
        lengths = {}
        for name, tensor in zip(self.names, parts, strict=True):
            if tensor.dim() == 0:
                raise ValueError(f"Part {name!r} expects a batch dimension, but got shape ().")
            lengths[name] = tensor.shape[0]
        if any(length != parts[0].shape[0] for length in lengths.values()):
            raise ValueError(
                f"The fields of one batch have one length, but got {lengths}. "
                "Observations that were not seen together are batches of their own: "
                "Observations(scene=..., labels=...)."
            )

    def assemble(self, parts: Sequence[Tensor]) -> Tensors:
        return tuple(parts)

    def split(self, x: Tensors) -> dict[str, Tensor]:
        return dict(zip(self.names, x, strict=True))

    def taker(self, names: tuple[str, ...]) -> Take:
        return partial(self._choose, [self.position[name] for name in names])

    def _choose(self, places: list[int], x: Tensors) -> Tensors:
        return tuple(x[place] for place in places)

    def restrict(self, names: tuple[str, ...]) -> Fields:
        return Fields(names)

    def typed(self, x: Tensors) -> Iterable[tuple[str | None, Tensor]]:
        return zip(self.names, x, strict=True)


# --- the door and the way out ---


def by_name(x: object) -> Mapping[str, Any] | None:
    """Returns the entries of what has names, read through its keys; None for anything else."""
    if isinstance(x, Mapping):
        return x
    fields = getattr(x, "_fields", None)
    return None if fields is None else {name: getattr(x, name) for name in fields}


def read_tensor(x: object, who: object) -> Tensor:
    """Makes an array a tensor that shares its memory."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray):
        # torch knows neither negative strides nor memory that must not be written
        fit = x.flags.writeable and all(stride >= 0 for stride in x.strides)
        return torch.from_numpy(x if fit else x.copy())
    raise TypeError(f"{who} expects a tensor or an array, but got {kind(x)}.")


def outward(x: Tensors) -> Tensor | Tensors:
    """Gives one argument of a network as itself and several as a tuple."""
    return x[0] if len(x) == 1 else x


def like(given: object, x: Any) -> Any:
    """Makes arrays of tensors where arrays were given."""
    while not isinstance(given, (Tensor, np.ndarray)):
        named = by_name(given)
        entries: Any = given if named is None else [named[name] for name in named.keys()]
        given = entries[0]
    if not isinstance(given, np.ndarray):
        return x
    if isinstance(x, dict):
        return {name: part.numpy() for name, part in x.items()}
    return tuple(part.numpy() for part in x) if isinstance(x, tuple) else x.numpy()


def check_same_names(who: object, names: tuple[str, ...], parts: Mapping[str, Any]) -> None:
    given = parts.keys()
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{who} expects the parts {names}, but got {tuple(given)}"
            + (f": {missing[0]!r} is missing." if missing else f": {unknown[0]!r} is unknown.")
        )
