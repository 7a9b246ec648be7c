"""ObservationLoader: data sets of different sizes and patterns -> endless Observations."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from factordisc.layouts import Layout, Take, Tensors, by_name, outward
from factordisc.names import Pattern
from factordisc.observations import Observations
from factordisc.partition import Partition

__all__ = ["ObservationLoader"]

Source: TypeAlias = "Dataset[Any] | Tensor"
Numbers: TypeAlias = "npt.NDArray[np.int64]"


class ObservationLoader:
    """Loads an endless stream of `Observations` from data sets of different sizes and patterns.

    Every step yields one batch per pattern. A pattern has reshuffled epochs of its own: a batch
    never repeats an observation and never spans two epochs (the short tail of one is dropped).
    A set smaller than the batch size is given whole in every step.

    With `pool`, the batch of a pattern is drawn evenly from all observations that contain it,
    cropped to it: so complete observations also train the marginals, in proportion to their
    number. ``pool=False`` draws it from its own data set only, for sets that contain each other
    already.

    The stream is a function of the seed and the number of the step, whatever the number of
    workers and the order of the mapping; so `state_dict` is small, and a resumed stream continues
    exactly, with the random transforms of the data sets too: before every step a worker seeds
    torch, NumPy and `random`.

    Args:
        datasets: Map-style data sets, or tensors, by pattern as for `Observations`. Samples have
            the form of ``partition.take(sample, pattern)`` without the batch dimension:
            tensors or arrays, for fields also tuples or mappings. A tuple of one is its entry.
        partition: The split of an observation into its parts.
        batch_size: The number of observations per pattern and step.
        pool: Draw from all data sets that contain a pattern.
        rng: Gives the seed, once, at construction. If ``None``, PyTorch's global generator.
        workers: The number of processes that load ahead; 0 loads in this one.
        pin_memory: Copy batches into pinned memory, for faster moves to a GPU.

    Attributes:
        step: The number of steps that were yielded.

    Raises:
        ValueError: If a pattern is unknown, given twice or has an empty data set, or
            `batch_size` is below one.
        TypeError: If a data set has no length or no items.

    Example:
        >>> partition = Partition({"left": 2, "right": 3})
        >>> pairs, lefts = torch.zeros(8, 5), torch.ones(100, 2)
        >>> loader = ObservationLoader({"joint": pairs, "left": lefts}, partition, 4)
        >>> real = next(iter(loader))
        >>> real["joint"].shape, real["left"].shape
        (torch.Size([4, 5]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        datasets: Mapping[Pattern, Source],
        partition: Partition,
        batch_size: int,
        pool: bool = True,
        rng: torch.Generator | None = None,
        workers: int = 0,
        *,
        pin_memory: bool = False,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` is a positive integer, but got {batch_size!r}.")
        if not isinstance(workers, int) or workers < 0:
            raise ValueError(f"`workers` is an integer of at least 0, but got {workers!r}.")
        self.partition = partition
        self.batch_size = batch_size
        self.workers = workers
        self.pin_memory = pin_memory
        named = _by_parts(datasets, partition)
        sets = {
            names: _Set(partition._layout.restrict(names), source)
            for names, (_, source) in named.items()
        }
        self._pools = [
            _Pool(
                pattern,
                names,
                [
                    samples
                    for other, samples in sets.items()
                    if other == names or (pool and set(names) < set(other))
                ],
            )
            for names, (pattern, _) in named.items()
        ]
        for pooled in self._pools:
            if len(pooled) < batch_size:
                warnings.warn(
                    f"There are {len(pooled)} observations of {pooled.pattern!r}, fewer than "
                    f"the batch size {batch_size}: every step gets all of them.",
                    stacklevel=2,
                )
        self.seed = int(torch.randint(2**62, (), generator=rng))
        self.step = 0
        self._iteration: object = None

    def __iter__(self) -> Iterator[Observations]:
        """Goes on from `step`; breaking off and iterating again loses nothing.

        Raises:
            ValueError: If it is asked for a step after another iteration began.
        """
        self._iteration = own = object()
        steps = _Steps(self._pools)
        tasks = _Tasks(self.seed, self.step, self.batch_size, [len(p) for p in self._pools])
        stream: Iterable[Observations] = map(steps.__getitem__, tasks)
        if self.workers or self.pin_memory:
            stream = DataLoader(
                cast("Dataset[Observations]", steps),
                batch_size=None,
                sampler=tasks,
                num_workers=self.workers,
                collate_fn=_as_it_is,  # the default makes lists of tuples
                pin_memory=self.pin_memory,
                # Its only use in DataLoader is the workers' base seed, which every step
                # overrides; without it, each iteration would draw from the global generator.
                generator=torch.Generator(),
            )
        for observations in stream:
            if self._iteration is not own:
                raise ValueError(
                    "Another iteration of this ObservationLoader has begun: `step` can count one "
                    "only. Go on with that one, or make a second loader."
                )
            self.step += 1
            yield observations

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on exactly: plain integers and strings."""
        return {
            "seed": self.seed,
            "step": self.step,
            "batch_size": self.batch_size,
            "sizes": {str(pooled.pattern): len(pooled) for pooled in self._pools},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the loader was whose state this is; iterate anew afterwards.

        Raises:
            ValueError: If the state is of other data sets or another batch size.
        """
        own = self.state_dict()
        for key in ("batch_size", "sizes"):
            if state[key] != own[key]:
                raise ValueError(
                    f"The state is of a loader with {key} {state[key]}, but here it is {own[key]}."
                )
        self.seed = int(state["seed"])
        self.step = int(state["step"])

    def __repr__(self) -> str:
        sizes = ", ".join(f"{pooled.pattern!r}: {len(pooled)}" for pooled in self._pools)
        return f"ObservationLoader({{{sizes}}}, batch_size={self.batch_size}, step={self.step})"


class _Set:
    """A data set, whose samples all pools of one step share."""

    def __init__(self, layout: Layout, source: Source) -> None:
        self.layout = layout
        self.source = source
        self.columns: tuple[Tensor, ...] | None = None
        if isinstance(source, (Tensor, TensorDataset)):
            self.columns = (source,) if isinstance(source, Tensor) else source.tensors

    def __len__(self) -> int:
        return _length(self.source)

    def pieces(self, shares: Sequence[_Share]) -> Iterator[tuple[Pattern, _Piece]]:
        """Yields what batches take; a sample is loaded once, however many want it."""
        if self.columns is not None:
            for share in shares:
                index = torch.from_numpy(share.numbers)
                batch = [x.index_select(0, index.to(x.device)) for x in self.columns]
                yield share.piece(share.places.tolist(), self._read(batch))
            return
        union = list(dict.fromkeys(chain.from_iterable(s.numbers.tolist() for s in shares)))
        fetch = getattr(self.source, "__getitems__", None)
        loaded = fetch(union) if fetch else [self.source[number] for number in union]
        samples = dict(zip(union, loaded, strict=True))
        for share in shares:
            places = share.places.tolist()
            chosen = [samples[number] for number in share.numbers.tolist()]
            if share.alone:
                yield share.piece(places, self._read(default_collate(chosen)))
            else:
                # Cropped one by one: joining them is then the only copy.
                for place, sample in zip(places, chosen, strict=True):
                    yield share.piece([place], self._read(_row(sample)))

    def _read(self, batch: Any) -> Tensors:
        if isinstance(batch, (tuple, list)):
            batch = tuple(batch) if len(batch) > 1 else batch[0]
        return self.layout.read(batch)


class _Share(NamedTuple):
    """What the batch of a pattern takes from one data set, and for which of its places."""

    pattern: Pattern
    samples: _Set
    take: Take
    numbers: Numbers
    places: Numbers
    alone: bool

    def piece(self, places: list[int], batch: Tensors) -> tuple[Pattern, _Piece]:
        return self.pattern, _Piece(places, self.take(batch))


class _Piece(NamedTuple):
    """Rows of a batch, and where in it they stand."""

    places: list[int]
    batch: Tensors


class _Pool:
    """All observations that contain a pattern, and how to crop them to it."""

    def __init__(self, pattern: Pattern, names: tuple[str, ...], sets: Sequence[_Set]) -> None:
        self.pattern = pattern
        self.sets = [(samples, samples.layout.taker(names)) for samples in sets]
        self.ends = np.cumsum([len(samples) for samples in sets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def shares(self, numbers: Numbers) -> Iterator[_Share]:
        """Finds the data sets of observations that are given by their number in the pool."""
        owners = np.searchsorted(self.ends, numbers, side="right")
        for owner, (samples, take) in enumerate(self.sets):
            places = np.flatnonzero(owners == owner)
            if len(places):
                own = numbers[places] - (self.ends[owner] - len(samples))
                alone = len(places) == len(numbers)
                yield _Share(self.pattern, samples, take, own, places, alone)


class _Task(NamedTuple):
    """A step to load: its seed, and the numbers of its observations in every pool."""

    seed: int
    indices: list[Numbers]  # a worker would be sent tensors as files of shared memory


class _Tasks:
    """The endless sequence of tasks from one step on: a function of seed and step alone."""

    def __init__(self, seed: int, step: int, batch_size: int, sizes: Sequence[int]) -> None:
        self.seed = seed
        self.step = step
        self.batch_size = batch_size
        self.sizes = sizes

    def __iter__(self) -> Iterator[_Task]:
        epochs: list[tuple[int, Numbers]] = [(-1, np.empty(0, np.int64))] * len(self.sizes)
        step = self.step
        while True:
            indices = []
            for i, size in enumerate(self.sizes):
                epoch, offset = divmod(step, max(1, size // self.batch_size))
                if epochs[i][0] != epoch:
                    rng = torch.Generator().manual_seed(_derived(self.seed, 0, i, epoch))
                    epochs[i] = (epoch, torch.randperm(size, generator=rng).numpy())
                start = offset * self.batch_size
                indices.append(epochs[i][1][start : start + self.batch_size])
            yield _Task(_derived(self.seed, 1, step), indices)
            step += 1


class _Steps:
    """The data set whose items are whole steps, so that a worker loads all patterns of one."""

    def __init__(self, pools: Sequence[_Pool]) -> None:
        self.pools = pools
        self.transforms = any(s.columns is None for pool in pools for s, _ in pool.sets)

    def __getitem__(self, task: _Task) -> Observations:
        wanted: dict[_Set, list[_Share]] = {}
        pieces: dict[Pattern, list[_Piece]] = {pool.pattern: [] for pool in self.pools}
        for pool, indices in zip(self.pools, task.indices, strict=True):
            for share in pool.shares(indices):
                wanted.setdefault(share.samples, []).append(share)
        with _seeded(task.seed) if self.transforms else nullcontext():
            # One data set after the other: what is loaded is read while the cache holds it.
            for samples, shares in wanted.items():
                for pattern, piece in samples.pieces(shares):
                    pieces[pattern].append(piece)
        return Observations({pattern: outward(_joined(p)) for pattern, p in pieces.items()})


def _joined(pieces: list[_Piece]) -> Tensors:
    """Puts pieces into their places in the batch."""
    if len(pieces) == 1:
        return tuple(map(_own, pieces[0].batch))
    pieces.sort(key=lambda piece: piece.places[0])
    batch = tuple(map(_cat, zip(*(piece.batch for piece in pieces), strict=True)))
    order = list(chain.from_iterable(piece.places for piece in pieces))
    if order == sorted(order):
        return batch
    index = torch.from_numpy(np.argsort(order))
    return tuple(column.index_select(0, index.to(column.device)) for column in batch)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds what transforms draw from, and leaves this process's generators as they were."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - users' transforms draw from it
    # Not torch.manual_seed, which also queues a call for every kind of device not yet in use.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _by_parts(
    datasets: Mapping[Pattern, Source], partition: Partition
) -> dict[tuple[str, ...], tuple[Pattern, Source]]:
    """Checks the data sets and orders the names of their patterns."""
    named: dict[tuple[str, ...], tuple[Pattern, Source]] = {}
    for pattern, source in datasets.items():
        names = partition.names if pattern == "joint" else partition._layout.ordered(pattern)
        if names in named:
            raise ValueError(
                f"ObservationLoader expects one data set per pattern, but {named[names][0]!r} "
                f"and {pattern!r} are the same. Join them with torch.utils.data.ConcatDataset."
            )
        if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise TypeError(
                f"The data set of {pattern!r} expects __len__ and __getitem__, but got "
                f"{type(source).__name__}. An iterable data set belongs in a loop of your own, "
                "which makes Observations."
            )
        if _length(source) == 0:
            raise ValueError(f"The data set of {pattern!r} is empty. Leave it out.")
        named[names] = (pattern, source)
    if not named:
        raise ValueError("ObservationLoader expects at least one data set, but got none.")
    # In an order of their own, so that the stream is not that of the mapping.
    return dict(sorted(named.items()))


def _length(source: Source) -> int:
    return len(cast("Tensor", source))


def _row(sample: Any) -> Any:
    """Makes a batch of one sample, which shares its memory where it has any."""
    if isinstance(sample, (Tensor, np.ndarray)):
        return sample[None]
    if (named := by_name(sample)) is not None:
        return {name: _row(named[name]) for name in named.keys()}
    if isinstance(sample, (tuple, list)):
        return [_row(entry) for entry in sample]
    return default_collate([sample])


def _cat(pieces: Sequence[Tensor]) -> Tensor:
    if all(len(piece) == 1 and piece.dtype == pieces[0].dtype for piece in pieces):
        # In a worker, this joins them in memory that is shared already.
        return cast(Tensor, default_collate([piece[0] for piece in pieces]))
    return torch.cat(list(pieces))


def _own(tensor: Tensor) -> Tensor:
    """Gives a crop memory of its own, so that a worker does not send what was cut away."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _as_it_is(observations: Any) -> Any:
    return observations


def _derived(*numbers: int) -> int:
    """Returns a seed that differs, as good as independently, for different numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
