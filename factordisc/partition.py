"""Partition: a sample <-> its named parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["Partition"]

Array: TypeAlias = "Tensor | npt.NDArray[Any]"
Batch: TypeAlias = "Array | Sequence[Array] | Mapping[str, Array]"

# Names that nn.ModuleDict would refuse (or worse, shadow) as the key of a network.
_MODULE_DICT = nn.ModuleDict()
_TERM_NAMES = ("joint", "p_dependency", "q_dependency")


def check_part_name(name: object) -> None:
    """Refuses what cannot name a part, with the reason."""
    check_key(name, "part")
    if name in _TERM_NAMES:
        raise ValueError(
            f"{name!r} cannot name a part: it is the name of a term. Rename the part."
        )
    if "/" in cast(str, name):
        raise ValueError(
            f"{name!r} cannot name a part: '/' separates a group from its dependency "
            "in the names of terms. Rename the part."
        )


def check_key(name: object, what: str) -> None:
    """Refuses what cannot be a key of `nn.ModuleDict`; `what` is "part" or "term"."""
    if not isinstance(name, str):
        raise TypeError(f"A {what} name is a string, but got {name!r} of type {_kind(name)}.")
    if not name:
        raise ValueError(f"A {what} name is a non-empty string, but got ''.")
    if "." in name:
        raise ValueError(
            f"{name!r} cannot name a {what}: '.' separates the levels of a state dict. "
            f"Rename the {what}."
        )
    if hasattr(_MODULE_DICT, name):
        raise ValueError(
            f"{name!r} cannot name a {what}: it is an attribute of nn.ModuleDict, "
            f"which holds the networks. Rename the {what}."
        )


class Partition:
    r"""Divides the observations of a batch into K named parts, and puts them together again.

    The first dimension of every tensor is the batch, of N observations. The parts do not
    overlap, and together they are the whole observation. ``Partition(sizes, dim)`` names
    consecutive slices of one tensor; `indices`, `fields` and `steps` make the other kinds.

    Everywhere a batch is taken it may be a tensor or a NumPy array of shape :math:`(N, *)`
    (of separate `fields`: a tuple or a mapping of them), of any dtype and on any device;
    nothing is copied that a view can show. A mapping from every part's name to its entries
    is understood by every kind of partition.

    References:
        Stoller et al. (2020), Section 2.2: the subsets :math:`\mathcal{D}_1, ..., \mathcal{D}_K`.

    Args:
        sizes: The number of entries of each part along `dim`, in the order of the parts.
        dim: The dimension that is divided; not 0, which is the batch.

    Raises:
        ValueError: If there are fewer than two parts, a name that is not allowed, a size
            below one, or `dim` 0.
        TypeError: If a name is not a string, or a size or `dim` is not an integer.

    Example:
        >>> partition = Partition({"edges": 1, "shoes": 3}, dim=1)
        >>> x = torch.arange(8.0).reshape(2, 4)
        >>> partition.split(x)["edges"]
        tensor([[0.],
                [4.]])
        >>> partition.take(x, "shoes").shape
        torch.Size([2, 3])
        >>> bool((partition.join(partition.split(x)) == x).all())
        True
    """

    def __init__(self, sizes: Mapping[str, int], dim: int = 1) -> None:
        if not isinstance(sizes, Mapping):
            raise TypeError(
                "Partition expects a mapping from part names to sizes, such as "
                f"{{'edges': 1, 'shoes': 3}}, but got {_kind(sizes)}."
            )
        for name, size in sizes.items():
            check_part_name(name)
            _check_integer(size, f"The size of part {name!r}")
            if size < 1:
                raise ValueError(f"Part {name!r} expects a size of at least 1, but got {size}.")
        self._set(_Slices(dict(sizes), _checked_dim(dim)))

    @classmethod
    def indices(cls, parts: Mapping[str, Sequence[int]], dim: int = 1) -> Partition:
        """Makes parts of any disjoint sets of indices that cover one dimension.

        Args:
            parts: The indices of each part along `dim`. Together they are 0 to D - 1, each once.
                Within a part their order is ignored: entries keep their original order.
            dim: The dimension that is divided; not 0, which is the batch.

        Raises:
            ValueError: If an index stands in two parts, is missing or negative.
            TypeError: If an index is not an integer.

        Example:
            >>> partition = Partition.indices({"a": [0, 3], "b": [1, 2]})
            >>> partition.take(torch.tensor([[10, 11, 12, 13]]), "a")
            tensor([[10, 13]])
        """
        if not isinstance(parts, Mapping):
            raise TypeError(f"Partition.indices expects a mapping, but got {_kind(parts)}.")
        owner: dict[int, str] = {}
        for name, entries in parts.items():
            check_part_name(name)
            if len(entries) == 0:
                raise ValueError(f"Part {name!r} expects at least one index, but got none.")
            for entry in entries:
                _check_integer(entry, f"An index of part {name!r}")
                if int(entry) in owner:
                    raise ValueError(
                        f"Parts do not overlap, but index {entry} stands in part "
                        f"{owner[int(entry)]!r} and again in part {name!r}."
                    )
                owner[int(entry)] = name
        missing = sorted(set(range(len(owner))) - set(owner))
        if missing:
            raise ValueError(
                f"The parts of Partition.indices cover 0 to {max(len(owner) - 1, *owner)}, "
                f"each index once, but index {missing[0]} belongs to no part. "
                "Add it to a part."
            )
        sorted_parts = {name: tuple(sorted(map(int, e))) for name, e in parts.items()}
        return cls._of(_Indices(sorted_parts, _checked_dim(dim)))

    @classmethod
    def fields(cls, *names: str) -> Partition:
        """Makes every part a tensor of its own: observations are tuples or mappings.

        A batch is a tuple of arrays in the order of `names`, or a mapping with these keys, all
        with the same first dimension N. A network receives one positional argument per part.

        Args:
            *names: The names of the parts.

        Example:
            >>> partition = Partition.fields("scene", "labels")
            >>> batch = {"labels": torch.zeros(2, 5), "scene": torch.ones(2, 3)}
            >>> [tuple(part.shape) for part in partition.take(batch, ["scene", "labels"])]
            [(2, 3), (2, 5)]
        """
        for name in names:
            check_part_name(name)
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"Partition.fields expects every name once, but got {names}.")
        return cls._of(_Fields(names))

    @classmethod
    def steps(cls, number: int, dim: int = 1, names: Sequence[str] | None = None) -> Partition:
        """Makes every step of a sequence a part.

        Args:
            number: The number of steps T: the size of `dim`.
            dim: The dimension of time; not 0, which is the batch. It is kept: a step of a
                batch (N, T, C) is (N, 1, C).
            names: One name per step. If ``None``, "1" to "T".

        Example:
            >>> Partition.steps(3).take(torch.zeros(8, 3, 2), ["2", "3"]).shape
            torch.Size([8, 2, 2])
        """
        _check_integer(number, "The number of steps")
        names = [str(i + 1) for i in range(number)] if names is None else list(names)
        if len(names) != number or len(set(names)) != number:
            raise ValueError(f"Partition.steps expects {number} different names, but got {names}.")
        return cls(dict.fromkeys(names, 1), dim)

    @classmethod
    def _of(cls, layout: _Layout) -> Partition:
        self = cls.__new__(cls)
        self._set(layout)
        return self

    def _set(self, layout: _Layout) -> None:
        if len(layout.names) < 2:
            raise ValueError(
                f"A partition has at least two parts, but got {len(layout.names)}: "
                f"{layout.names}. With one part there is nothing to factorise."
            )
        self._store(layout)

    def _store(self, layout: _Layout) -> None:
        self._layout = layout
        self._position = {name: i for i, name in enumerate(layout.names)}
        self._restricted: dict[tuple[str, ...], Partition] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts, in order."""
        return self._layout.names

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return repr(self._layout)

    def split(self, x: Batch) -> dict[str, Array]:
        """Takes a batch apart.

        Args:
            x: A batch of N whole observations.

        Returns:
            The entries of every part, by name, in the order of the parts; views where possible.

        Raises:
            ValueError: If the batch does not have the shape that the partition divides.
            TypeError: If it is not a tensor, an array, or (for fields) a tuple or mapping.
        """
        return self._layout.split(self._layout.normalise(x))

    def join(self, parts: Mapping[str, Array]) -> Array | tuple[Array, ...]:
        """Puts the parts of a batch together: the inverse of `split`.

        Args:
            parts: The entries of every part, by name, as `split` gives them.

        Returns:
            The batch: one tensor, or for fields a tuple in the order of the parts.

        Raises:
            ValueError: If a part is missing or unknown, or their shapes do not fit.
        """
        _check_same_names(self, self.names, parts)
        return self._layout.join(parts)

    def take(self, x: Batch, names: str | Iterable[str]) -> Array | tuple[Array, ...]:
        """Takes some parts of a batch, as a network receives them.

        Args:
            x: A batch of N whole observations.
            names: The names of the parts, in any order.

        Returns:
            For fields the tensor of one part, or a tuple of several in the order of the parts.
            For the other kinds one tensor with the entries of the parts: slices and steps in
            the order of the parts, indices in their original order; a view where the entries
            are neighbours, and `x` itself where they are all.

        Raises:
            ValueError: If a name is unknown, or the batch does not fit the partition.
        """
        return self._layout.take(self._layout.normalise(x), self.ordered(names))

    def recombine(self, x: Batch, orders: Mapping[str, Tensor]) -> Array | tuple[Array, ...]:
        """Makes rows whose parts come from different observations.

        Args:
            x: A batch of N whole observations.
            orders: For every part the numbers of the observations that give it, row by row:
                int64, all of one shape (M,).

        Returns:
            M rows: one tensor, or for fields a tuple in the order of the parts.

        Example:
            >>> x = torch.tensor([[0, 10], [1, 11]])
            >>> orders = {"a": torch.tensor([0, 1]), "b": torch.tensor([1, 0])}
            >>> Partition({"a": 1, "b": 1}).recombine(x, orders)
            tensor([[ 0, 11],
                    [ 1, 10]])
        """
        _check_same_names(self, self.names, orders)
        return self._layout.recombine(self._layout.normalise(x), orders)

    def restrict(self, names: str | Iterable[str]) -> Partition:
        """Returns the partition of what `take` gives for these parts: one part is allowed.

        Args:
            names: The names of the parts, in any order.

        Example:
            >>> partition = Partition.indices({"a": [0, 3], "b": [1], "c": [2]})
            >>> partition.restrict(["a", "c"])
            Partition.indices({'a': [0, 2], 'c': [1]}, dim=1)
        """
        key = self.ordered(names)
        if key == self.names:
            return self
        if key not in self._restricted:
            restricted = Partition.__new__(Partition)
            restricted._store(self._layout.restrict(key))
            self._restricted[key] = restricted
        return self._restricted[key]

    def batch_size(self, x: Batch) -> int:
        """Returns N, the number of observations of a batch, after checking its form.

        Args:
            x: A batch of whole observations.

        Raises:
            ValueError: If the batch does not fit the partition, or its fields differ in length.
            TypeError: If it is not a tensor, an array, or (for fields) a tuple or mapping.
        """
        arrays = self._layout.arrays(self._layout.normalise(x))
        return int(arrays[0].shape[0]) if isinstance(arrays[0], np.ndarray) else arrays[0].size(0)

    def arguments(self, x: Batch) -> tuple[Array, ...]:
        """Returns the positional arguments with which a network is called on a batch.

        Args:
            x: A batch of whole observations.
        """
        return self._layout.arrays(self._layout.normalise(x))

    def ordered(self, names: str | Iterable[str]) -> tuple[str, ...]:
        """Sorts names into the order of the parts.

        Raises:
            ValueError: If there is none, one is unknown, or one is named twice.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in self._position:
                raise ValueError(f"{self} has no part {name!r}. Its parts are {self.names}.")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Expected at least one part and each once, but got {names}.")
        return tuple(sorted(names, key=self._position.__getitem__))


class _Layout(Protocol):
    """How the parts lie in a sample. `normalise` comes first; the others trust its result."""

    names: tuple[str, ...]

    def normalise(self, x: Batch) -> Any: ...
    def arrays(self, x: Any) -> tuple[Array, ...]: ...
    def split(self, x: Any) -> dict[str, Array]: ...
    def join(self, parts: Mapping[str, Array]) -> Array | tuple[Array, ...]: ...
    def take(self, x: Any, names: tuple[str, ...]) -> Array | tuple[Array, ...]: ...
    def recombine(self, x: Any, orders: Mapping[str, Tensor]) -> Array | tuple[Array, ...]: ...
    def restrict(self, names: tuple[str, ...]) -> _Layout: ...


class _Along(ABC):
    """What slices and indices share: the parts lie along one dimension of one array."""

    names: tuple[str, ...]
    dim: int
    length: int

    def normalise(self, x: Batch) -> Array:
        if isinstance(x, Mapping):
            _check_same_names(self, self.names, x)
            return self.join(x)
        if not isinstance(x, (Tensor, np.ndarray)):
            raise TypeError(f"{self} expects a tensor or an array, but got {_kind(x)}.")
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
        return self.join({n: _select_rows(self.take(x, (n,)), orders[n]) for n in self.names})

    def concatenate(self, parts: Mapping[str, Array], sizes: Mapping[str, int]) -> Array:
        """Checks the parts' shapes and puts them side by side, in the order of the names."""
        ordered = [parts[name] for name in self.names]
        for name, part in zip(self.names, ordered, strict=True):
            if not isinstance(part, (Tensor, np.ndarray)):
                raise TypeError(f"Part {name!r} expects a tensor or an array, got {_kind(part)}.")
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


class _Slices(_Along):
    """Consecutive slices of one dimension."""

    def __init__(self, sizes: dict[str, int], dim: int) -> None:
        self.names = tuple(sizes)
        self.sizes = sizes
        self.dim = dim
        self.length = sum(sizes.values())
        starts = np.cumsum([0, *sizes.values()])
        self.spans = {name: (int(starts[i]), int(starts[i + 1])) for i, name in enumerate(sizes)}

    def __repr__(self) -> str:
        return f"Partition({self.sizes}, dim={self.dim})"

    def take(self, x: Array, names: tuple[str, ...]) -> Array:
        if names == self.names:
            return x
        runs: list[tuple[int, int]] = []
        for name in names:
            start, stop = self.spans[name]
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], stop)
            else:
                runs.append((start, stop))
        axis = self.axis(x)
        pieces = [_narrow(x, axis, start, stop) for start, stop in runs]
        if len(pieces) == 1:
            return pieces[0]
        if isinstance(x, np.ndarray):
            return np.concatenate(cast("list[npt.NDArray[Any]]", pieces), axis=axis)
        return torch.cat(cast("list[Tensor]", pieces), dim=axis)

    def join(self, parts: Mapping[str, Array]) -> Array:
        return self.concatenate(parts, self.sizes)

    def recombine(self, x: Array, orders: Mapping[str, Tensor]) -> Array:
        if isinstance(x, np.ndarray) or x.requires_grad:
            return super().recombine(x, orders)
        # Straight into the result: half the time of parts that are concatenated afterwards.
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        rows = torch.empty(
            (len(orders[self.names[0]]), *x.shape[1:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        for name in self.names:
            part, place = self.take(x, (name,)), self.take(rows, (name,))
            order = orders[name].to(x.device, non_blocking=True)
            torch.index_select(cast(Tensor, part), 0, order, out=cast(Tensor, place))
        return rows

    def restrict(self, names: tuple[str, ...]) -> _Slices:
        return _Slices({name: self.sizes[name] for name in names}, self.dim)


class _Indices(_Along):
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
            return _narrow(x, axis, entries[0], entries[-1] + 1)
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

    def restrict(self, names: tuple[str, ...]) -> _Indices:
        kept = sorted(i for name in names for i in self.parts[name])
        rank = {entry: i for i, entry in enumerate(kept)}
        return _Indices(
            {name: tuple(rank[i] for i in self.parts[name]) for name in names}, self.dim
        )


class _Fields:
    """Every part is a tensor of its own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __repr__(self) -> str:
        return f"Partition.fields({', '.join(map(repr, self.names))})"

    def normalise(self, x: Batch) -> tuple[Array, ...]:
        if isinstance(x, Mapping):
            _check_same_names(self, self.names, x)
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
                f"but got {_kind(x)}."
            )
        for name, array in zip(self.names, arrays, strict=True):
            if not isinstance(array, (Tensor, np.ndarray)):
                raise TypeError(f"Field {name!r} expects a tensor or array, got {_kind(array)}.")
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
        return self.join({n: _select_rows(a, orders[n]) for n, a in self.split(x).items()})

    def restrict(self, names: tuple[str, ...]) -> _Fields:
        return _Fields(names)


def _narrow(x: Array, axis: int, start: int, stop: int) -> Array:
    if isinstance(x, np.ndarray):
        return x[(slice(None),) * axis + (slice(start, stop),)]
    return x.narrow(axis, start, stop - start)


def _select_rows(array: Array, order: Tensor) -> Array:
    if isinstance(array, np.ndarray):
        return np.take(array, order.numpy(), axis=0)
    return array.index_select(0, order.to(array.device, non_blocking=True))


def _kind(x: object) -> str:
    return type(x).__name__


def _check_integer(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} is an integer, but got {value!r} of type {_kind(value)}.")


def _checked_dim(dim: int) -> int:
    _check_integer(dim, "`dim`")
    if dim == 0:
        raise ValueError("`dim` 0 is the batch; the parts lie along another dimension.")
    return int(dim)


def _check_same_names(who: object, names: tuple[str, ...], parts: Mapping[str, Any]) -> None:
    missing = [name for name in names if name not in parts]
    unknown = [name for name in parts if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{who} expects the parts {names}, but got {tuple(parts)}"
            + (f": {missing[0]!r} is missing." if missing else f": {unknown[0]!r} is unknown.")
        )
