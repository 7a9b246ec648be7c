"""Partition: a sample <-> its named parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from factordisc.layouts import (
    Array,
    Batch,
    Boxes,
    Fields,
    Indices,
    Layout,
    Slices,
    Span,
    check_same_names,
    like,
    outward,
)
from factordisc.names import check_part_name, kind

__all__ = ["Partition"]

AnyLayout = TypeVar("AnyLayout", bound=Layout)


class Partition:
    r"""Divides the observations of a batch into K named parts, and puts them together again.

    The first dimension of every tensor is the batch, of N observations. The parts do not
    overlap, and together they are the whole observation. ``Partition(sizes, dim)`` names
    consecutive slices of one tensor; `indices`, `boxes`, `fields` and `steps` make the other
    kinds.

    Everywhere a batch is taken it may be a tensor or a NumPy array of shape :math:`(N, *)`
    (of separate `fields`: a tuple or a mapping of them), of any dtype and on any device;
    nothing is copied that a view can show. A mapping from every part's name to its entries
    is understood by every kind of partition, and so is a named tuple. What comes back has the
    form of what was given: tensors for tensors, arrays for arrays.

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

    def __init__(self, sizes: Mapping[str, int] | Layout, dim: int = 1) -> None:
        # The other constructors and `restrict` give a layout that they have made and checked.
        self._layout = sizes if isinstance(sizes, Layout) else _slices(sizes, dim)

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
            raise TypeError(f"Partition.indices expects a mapping, but got {kind(parts)}.")
        owner: dict[int, str] = {}
        for name, entries in parts.items():
            check_part_name(name)
            if len(entries) == 0:
                raise ValueError(f"Part {name!r} expects at least one index, but got none.")
            for entry in entries:
                index = _integer(entry, f"An index of part {name!r}")
                if index in owner:
                    raise ValueError(
                        f"Parts do not overlap, but index {index} stands in part "
                        f"{owner[index]!r} and again in part {name!r}."
                    )
                owner[index] = name
        missing = sorted(set(range(len(owner))) - set(owner))
        if missing:
            raise ValueError(
                f"The parts of Partition.indices cover 0 to {max(len(owner) - 1, *owner)}, "
                f"each index once, but index {missing[0]} belongs to no part. "
                "Add it to a part."
            )
        sorted_parts = {name: tuple(sorted(map(int, e))) for name, e in parts.items()}
        return cls(_at_least_two(Indices(sorted_parts, _checked_dim(dim))))

    @classmethod
    def boxes(cls, parts: Mapping[str, Sequence[slice]], shape: Sequence[int]) -> Partition:
        """Makes parts of regions of an image (or of any array): boxes that cover it.

        A network receives the smallest box around the parts of its term, if they fill it. The
        parts of a hierarchy's groups should therefore be neighbours; a term about other
        parts needs `inputs=` of the `FactorisedDiscriminator`, which gets a tensor per part.

        Args:
            parts: The box of each part: one slice, of step 1, for each dimension of `shape`.
            shape: The sizes of the trailing dimensions that are divided, such as (H, W).

        Raises:
            ValueError: If two boxes overlap, a place belongs to none, or a box is empty.
            TypeError: If a box is not a sequence of slices.

        Example:
            >>> left, right = (slice(None), slice(0, 32)), (slice(None), slice(32, 64))
            >>> partition = Partition.boxes({"left": left, "right": right}, shape=(64, 64))
            >>> partition.take(torch.zeros(8, 3, 64, 64), "left").shape
            torch.Size([8, 3, 64, 32])
        """
        if not isinstance(parts, Mapping):
            raise TypeError(f"Partition.boxes expects a mapping, but got {kind(parts)}.")
        shape = tuple(_integer(size, "A size of `shape`") for size in shape)
        spans: dict[str, tuple[Span, ...]] = {}
        for name, box in parts.items():
            check_part_name(name)
            if not isinstance(box, Sequence) or not all(isinstance(s, slice) for s in box):
                raise TypeError(f"Part {name!r} expects a tuple of slices, but got {box!r}.")
            if len(box) != len(shape):
                raise ValueError(
                    f"Part {name!r} expects {len(shape)} slices, one per dimension of {shape}, "
                    f"but got {len(box)}."
                )
            ranges = [range(*s.indices(size)) for s, size in zip(box, shape, strict=True)]
            ends = [s.stop for s in box]
            beyond = any(e is not None and e > n for e, n in zip(ends, shape, strict=True))
            if beyond or any(r.step != 1 or not len(r) for r in ranges):
                raise ValueError(
                    f"Part {name!r} expects slices of step 1 that are not empty and lie within "
                    f"{shape}, but got {tuple(box)}."
                )
            spans[name] = tuple((r.start, r.stop) for r in ranges)
        return cls(_at_least_two(Boxes.covering(spans, shape)))

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
        return cls(_at_least_two(Fields(names)))

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
        number = _integer(number, "The number of steps")
        names = [str(i + 1) for i in range(number)] if names is None else list(names)
        if len(names) != number or len(set(names)) != number:
            raise ValueError(f"Partition.steps expects {number} different names, but got {names}.")
        return cls(dict.fromkeys(names, 1), dim)

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
        parts: dict[str, Array] = like(x, self._layout.split(self._layout.read(x)))
        return parts

    def join(self, parts: Mapping[str, Array]) -> Any:
        """Puts the parts of a batch together: the inverse of `split`.

        Args:
            parts: The entries of every part, by name, as `split` gives them.

        Returns:
            The batch: one tensor, or for fields a tuple in the order of the parts.

        Raises:
            ValueError: If a part is missing or unknown, or their shapes do not fit.
        """
        check_same_names(self, self.names, parts)
        return like(parts, outward(self._layout.join(parts)))

    def take(self, x: Batch, names: str | Iterable[str]) -> Any:
        """Takes some parts of a batch, as a network receives them.

        Args:
            x: A batch of N whole observations.
            names: The names of the parts, in any order.

        Returns:
            For fields the tensor of one part, or a tuple of several in the order of the parts.
            For the other kinds one tensor with the entries of the parts: slices and steps in
            the order of the parts, indices in their original order, boxes as the smallest box
            around them; a view where the entries are neighbours, and `x` itself where they are
            all.

        Raises:
            ValueError: If a name is unknown, the batch does not fit the partition, or boxes do
                not fill the smallest box around them.
        """
        ordered = self._layout.ordered(names)
        check_input(self, ordered)
        tensors = self._layout.read(x)
        if ordered == self.names and isinstance(x, (Tensor, np.ndarray)):
            return x
        return like(x, outward(self._layout.taker(ordered)(tensors)))

    def recombine(self, x: Batch, orders: Mapping[str, Tensor]) -> Any:
        """Makes rows whose parts come from different observations.

        Args:
            x: A batch of N whole observations.
            orders: For every part the numbers of the observations that give it, row by row:
                int64, all of one shape (M,), from 0 to N - 1.

        Returns:
            M rows: one tensor, or for fields a tuple in the order of the parts.

        Raises:
            ValueError: If a part has no order, or orders differ in length, are not
                one-dimensional, or name observations that there are not.
            TypeError: If an order is not a tensor of int64.

        Example:
            >>> x = torch.tensor([[0, 10], [1, 11]])
            >>> orders = {"a": torch.tensor([0, 1]), "b": torch.tensor([1, 0])}
            >>> Partition({"a": 1, "b": 1}).recombine(x, orders)
            tensor([[ 0, 11],
                    [ 1, 10]])
        """
        check_same_names(self, self.names, orders)
        tensors = self._layout.read(x)
        length = None
        for name, order in orders.items():
            if not isinstance(order, Tensor) or order.dtype != torch.int64:
                got = f"a tensor of {order.dtype}" if isinstance(order, Tensor) else kind(order)
                raise TypeError(f"The order of part {name!r} is a tensor of int64, but got {got}.")
            length = order.shape if length is None else length
            if order.dim() != 1 or order.shape != length:
                raise ValueError(
                    "The orders have one length and one dimension, but that of part "
                    f"{name!r} has shape {tuple(order.shape)}, where {tuple(length)} came first."
                )
            rows = len(tensors[0])
            if len(order) and not 0 <= int(order.min()) <= int(order.max()) < rows:
                raise ValueError(
                    f"The order of part {name!r} names observations from {int(order.min())} to "
                    f"{int(order.max())}, but there are {rows}, from 0."
                )
        device = tensors[0].device
        combine = self._layout.combiner([(name,) for name in self.names])
        return like(x, outward(combine(tensors, [orders[n].to(device) for n in self.names])))

    def restrict(self, names: str | Iterable[str]) -> Partition:
        """Returns the partition of what `take` gives for these parts: one part is allowed.

        Boxes that do not fill the smallest box around them are divided as the tuple of their
        tensors, in the order of the parts.

        Args:
            names: The names of the parts, in any order.

        Example:
            >>> partition = Partition.indices({"a": [0, 3], "b": [1], "c": [2]})
            >>> partition.restrict(["a", "c"])
            Partition.indices({'a': [0, 2], 'c': [1]}, dim=1)
        """
        ordered = self._layout.ordered(names)
        return self if ordered == self.names else Partition(self._layout.restrict(ordered))


def check_input(partition: Partition, names: tuple[str, ...]) -> None:
    """Refuses boxes that cannot be one input of a network."""
    layout = partition._layout.restrict(names)
    if isinstance(layout, Boxes) and not layout.filled:
        raise ValueError(
            f"The boxes of {names} do not fill the smallest box around them, so they cannot be "
            "the input of a network. Pass a callable for the term in `inputs=` of the "
            "FactorisedDiscriminator: it gets the tensor of every part, "
            f"({', '.join(names)}), and returns what the network is to receive."
        )


def _slices(sizes: Mapping[str, int], dim: int) -> Slices:
    if not isinstance(sizes, Mapping):
        raise TypeError(
            "Partition expects a mapping from part names to sizes, such as "
            f"{{'edges': 1, 'shoes': 3}}, but got {kind(sizes)}."
        )
    checked = {}
    for name, size in sizes.items():
        check_part_name(name)
        checked[name] = _integer(size, f"The size of part {name!r}")
        if checked[name] < 1:
            raise ValueError(f"Part {name!r} expects a size of at least 1, but got {size}.")
    return _at_least_two(Slices(checked, _checked_dim(dim)))


def _at_least_two(layout: AnyLayout) -> AnyLayout:
    if len(layout.names) < 2:
        raise ValueError(
            f"A partition has at least two parts, but got {len(layout.names)}: "
            f"{layout.names}. With one part there is nothing to factorise."
        )
    return layout


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} is an integer, but got {value!r} of type {kind(value)}.")
    return int(value)


def _checked_dim(dim: int) -> int:
    if _integer(dim, "`dim`") == 0:
        raise ValueError("`dim` 0 is the batch; the parts lie along another dimension.")
    return int(dim)
