"""What a step of ObservationLoader costs over one batch of each of three DataLoaders.

Run with::

    pytest tests/benchmarks/bench_loader.py --benchmark-only -o python_files='bench_*.py'
    python tests/benchmarks/bench_loader.py  # throughput over that of DataLoaders, side by side
"""

import io
from functools import partial
from statistics import median
from time import perf_counter, sleep

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from factordisc import ObservationLoader, Partition

PATTERNS = {"joint": 400, "a": 1200, "b": 1200}
BATCH = 32


class Images(Dataset):
    """Small PNGs in memory: an image, or one on top of the other."""

    def __init__(self, number, parts, seed):
        rng = np.random.default_rng(seed)
        self.files = [
            [encoded(np.kron(block, np.ones((4, 4, 1), np.uint8))) for block in blocks]
            for blocks in rng.integers(0, 256, (number, parts, 16, 16, 3), dtype=np.uint8)
        ]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return torch.cat([decoded(file) for file in self.files[index]])


class BatchedImages(Images):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Fields(Images):
    """The same as mappings, with the images as arrays."""

    def __init__(self, number, parts, seed):
        super().__init__(number, len(parts), seed)
        self.parts = parts

    def __getitem__(self, index):
        files = zip(self.parts, self.files[index], strict=True)
        return {name: decoded(file).numpy() for name, file in files}


class Cropped(Dataset):
    """What one writes by hand to pool complete samples with those of a part."""

    def __init__(self, dataset, crop):
        self.dataset = dataset
        self.crop = crop

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.crop(self.dataset[index])


class CroppedTogether(Cropped):
    def __getitems__(self, indices):
        return [self.crop(sample) for sample in self.dataset.__getitems__(indices)]


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def decoded(file):
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255)


def rows(number, parts, seed):
    rng = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(number, 3 * parts, generator=rng))


def key(name, sample):
    return {name: sample[name]}


def channels(start, sample):
    return sample[start : start + 3]


def columns(start, sample):
    return (sample[0][start : start + 3],)


def made(make):
    sets = {"joint": make(PATTERNS["joint"], 2, 0)}
    return sets | {name: make(PATTERNS[name], 1, i) for i, name in enumerate("ab", 1)}


CROPS = {name: partial(channels, 3 * i) for i, name in enumerate("ab")}
# What makes the data sets, by pattern; the split; how one crops by hand.
KINDS = {
    "tensors": (
        lambda: made(rows),
        Partition({"a": 3, "b": 3}),
        {name: partial(columns, 3 * i) for i, name in enumerate("ab")},
    ),
    "images": (lambda: made(Images), Partition({"a": 3, "b": 3}), CROPS),
    "images, __getitems__": (lambda: made(BatchedImages), Partition({"a": 3, "b": 3}), CROPS),
    "mappings of fields": (
        lambda: {
            pattern: Fields(number, ("a", "b") if pattern == "joint" else (pattern,), i)
            for i, (pattern, number) in enumerate(PATTERNS.items())
        },
        Partition.fields("a", "b"),
        {name: partial(key, name) for name in "ab"},
    ),
}


def ours(kind, pool, workers):
    make, partition, _ = KINDS[kind]
    return iter(ObservationLoader(make(), partition, BATCH, pool, workers=workers))


def forever(loader):
    while True:
        yield from loader


def by_hand(kind, pool, workers):
    make, _, crops = KINDS[kind]
    sets = make()
    if pool:
        cropped = CroppedTogether if hasattr(sets["joint"], "__getitems__") else Cropped
        for name in "ab":
            sets[name] = ConcatDataset([cropped(sets["joint"], crops[name]), sets[name]])
    options = {"shuffle": True, "drop_last": True, "num_workers": workers}
    options["persistent_workers"] = workers > 0
    streams = {name: forever(DataLoader(s, BATCH, **options)) for name, s in sets.items()}
    while True:
        yield {name: next(stream) for name, stream in streams.items()}


HOW = {"loader": ours, "by hand": by_hand}
WORKERS = {"loader": 3, "by hand": 1}  # of three DataLoaders each has processes of its own


@pytest.mark.benchmark(group="a step of three patterns")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("pool", [False, True], ids=["own sets", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_step(benchmark, kind, pool, how):
    stream = HOW[how](kind, pool, workers=0)
    real = benchmark(next, stream)
    assert len(real) == 3


def ratio(kind, pool, workers, rounds):
    """Returns the throughput over that of DataLoaders, which take turns."""
    streams = {how: make(kind, pool, WORKERS[how] * workers) for how, make in HOW.items()}
    # What processes have loaded ahead, during the pause between turns, is not timed.
    ahead, timed = (2 * WORKERS["loader"] * workers, 24) if workers else (0, 1)
    times = {how: [] for how in streams}
    for _ in range(rounds):
        for how, stream in streams.items():
            for _ in range(ahead):
                next(stream)
            start = perf_counter()
            for _ in range(timed):
                next(stream)
            times[how].append(perf_counter() - start)
            sleep(0.2 * workers)
    return median(times["by hand"]) / median(times["loader"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in KINDS:
        for pool in (False, True):
            here, processes = ratio(kind, pool, 0, 80), ratio(kind, pool, 1, 6)
            shown = f"{kind}, {'pooled' if pool else 'own sets'}"
            print(f"{shown:38} here {here:.2f}   three processes {processes:.2f}", flush=True)
