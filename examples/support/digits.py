"""Handwritten digits, and pairs of them whose classes depend on each other (Section 4.1)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = 10

# The official files, as the mirror of the PyTorch project serves them.
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f497d9c",
}


class Digits(NamedTuple):
    """Images of digits, with shape (N, S, S), float32 in [0, 1], and their classes (N,), int64."""

    images: Tensor
    labels: Tensor


def embedded() -> tuple[Digits, Digits]:
    """Returns the 8x8 digits that scikit-learn ships: 1,297 for training and 500 for testing.

    They come from 43 writers in an order in which neighbours are alike, so a fixed shuffle
    comes before the split.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    everything = Digits(
        torch.from_numpy(images[order] / 16).float().reshape(-1, 8, 8),
        torch.from_numpy(labels[order]).long(),
    )
    return Digits(*(t[:1297] for t in everything)), Digits(*(t[1297:] for t in everything))


def mnist(root: Path | None = None) -> tuple[Digits, Digits]:
    """Returns MNIST: 60,000 digits of 28x28 for training and 10,000 for testing.

    Args:
        root: A folder with the four IDX files, plain or gzipped. If ``None``, they are
            downloaded once, checked against their hashes, and kept in the user's cache.

    Raises:
        FileNotFoundError: If a file is not in `root`.
        ValueError: If a file is not in the IDX format, or a download has another hash.
    """
    arrays = []
    for name, known_hash in MNIST_FILES.items():
        if root is None:
            path = Path(
                pooch.retrieve(
                    MNIST_URL + name,
                    known_hash,
                    fname=name,
                    path=pooch.os_cache("factordisc"),
                    progressbar=True,
                )
            )
        else:
            path = _present(root, name)
        arrays.append(torch.from_numpy(read_idx(path)))
    train_images, train_labels, test_images, test_labels = arrays
    return (
        Digits(train_images.float() / 255, train_labels.long()),
        Digits(test_images.float() / 255, test_labels.long()),
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an array of bytes in the IDX format, plain or gzipped."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} expects the IDX format with bytes, but starts {content[:4]!r}.")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if values.size != np.prod(shape):
        announced = tuple(shape.tolist())
        raise ValueError(f"{path} announces shape {announced}, but holds {values.size} bytes.")
    return values.reshape(shape).copy()


def _present(root: Path, name: str) -> Path:
    for path in (root / name, root / name.removesuffix(".gz")):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{root} expects the four files of MNIST, plain or gzipped, but lacks {name}."
    )


def partners(labels: Tensor, pool: Tensor, same: float, rng: torch.Generator | None) -> Tensor:
    """Draws a lower digit for every upper one.

    Its class equals the upper digit's with probability `same`, else it is one of the nine
    others, uniformly; it is any image of that class. (The authors' code draws "else" from all
    ten classes.)

    Args:
        labels: The classes of the upper digits, with shape (N,).
        pool: The classes of the images to choose from, with shape (M,).
        same: The probability lambda.
        rng: The source of the choices.

    Returns:
        The number of the chosen image in the pool, with shape (N,), int64.
    """
    others = torch.randint(1, CLASSES, labels.shape, generator=rng)
    differs = torch.rand(labels.shape, generator=rng) >= same
    classes = torch.where(differs, (labels + others) % CLASSES, labels)
    by_class = pool.argsort(stable=True)
    counts = torch.bincount(pool, minlength=CLASSES)
    starts = counts.cumsum(0) - counts
    within = torch.rand(labels.shape, generator=rng, dtype=torch.float64) * counts[classes]
    return by_class[starts[classes] + within.long()]


def stacked(digits: Digits, same: float, rng: torch.Generator) -> Tensor:
    """Stacks every digit on a partner: pairs with shape (N, 2S, S)."""
    lower = partners(digits.labels, digits.labels, same, rng)
    return torch.cat([digits.images, digits.images[lower]], dim=1)


class RedrawnPairs(Dataset):
    """Digits whose partner is drawn anew whenever they are loaded.

    This is what the authors' loader did with its "n paired samples": the n upper digits stayed,
    their partners were drawn again in every epoch.

    Args:
        digits: The digits that serve as partners, and of which the first are the upper ones.
        number: The number of upper digits.
        same: The probability lambda.
    """

    def __init__(self, digits: Digits, number: int, same: float) -> None:
        self.digits = digits
        self.number = number
        self.same = same

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        upper = torch.tensor(indices)
        # None: the global generator, which the loader seeds for every step
        lower = partners(self.digits.labels[upper], self.digits.labels, self.same, None)
        return list(torch.cat([self.digits.images[upper], self.digits.images[lower]], dim=1))
