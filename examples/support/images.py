"""Pairs of images: Edges2Shoes and Cityscapes in the form of the pix2pix project (Section 4.2)."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
import pooch
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

Name = Literal["edges2shoes", "cityscapes"]
Split = Literal["train", "val", "test"]

# The parts of a pair and their channels, from left to right.
PARTS: dict[Name, dict[str, int]] = {
    "edges2shoes": {"edge": 1, "photo": 3},
    "cityscapes": {"scene": 3, "map": 3},
}

PIX2PIX_URL = "https://efrosgans.eecs.berkeley.edu/pix2pix/datasets/"
# The mirror publishes no hashes. These are the ones that a public loader of these archives
# (its table of pix2pix data sets) records; we could not compare them with the archives.
PIX2PIX_FILES: dict[Name, str] = {
    "edges2shoes": "md5:71da478b54fedde126e234a2a050bc15",
    "cityscapes": "md5:32569df708076e427e9cd02abbca7748",
}

# The arrays of an .npz file that make a pair, without their split.
NPZ_PAIRS = (("edge", "photo"), ("photo", "label"))


class PairedImages(NamedTuple):
    """Pairs of images: two tensors with shape (N, C, H, W), uint8; row n of both is one pair."""

    a: Tensor
    b: Tensor

    def joined(self) -> Tensor:
        """Stacks both images of a pair along the channels: (N, C of a + C of b, H, W), uint8."""
        return torch.cat(self, dim=1)


class UnitImages(Dataset):
    """Images in [0, 1], float32, kept as bytes: these take a quarter of the memory.

    Args:
        images: The images, with shape (N, C, H, W), uint8.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return list(unit(self.images[indices]))


def unit(images: Tensor) -> Tensor:
    """Scales bytes to float32 in [0, 1]."""
    return images.float() / 255


def subset(number: int, total: int, seed: int) -> Tensor:
    """Chooses which observations are complete: a smaller number gives a part of a larger one.

    The paper takes the first ones of the data set, which for street scenes are those of one town.

    Args:
        number: How many to choose.
        total: Of how many.
        seed: Seeds the choice.

    Returns:
        Their numbers, with shape (number,), int64.

    Raises:
        ValueError: If there are fewer.
    """
    if not 0 < number <= total:
        raise ValueError(f"Expected between 1 and all {total} pairs, but got {number}.")
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:number]


def load_pairs(name: Name, root: Path | None, split: Split, size: int = 64) -> PairedImages:
    """Loads a split of a data set.

    Args:
        name: Which data set.
        root: Where it lies: an .npz file as of `load_npz_pairs`, or a folder with one folder per
            split as of `load_folder_pairs`. If ``None``, the archive is downloaded once, checked
            against its hash, unpacked and kept in the user's cache.
        split: Which of its splits.
        size: Height and width to which the images of a folder are resized.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a file is broken or of another form, or a download has another hash.
    """
    channels = tuple(PARTS[name].values())
    root = download(name) if root is None else root
    if root.is_dir():
        return load_folder_pairs(root / split, size, channels)
    pairs = load_npz_pairs(root, split)
    expected = [(c, size, size) for c in channels]
    got = [tuple(images.shape[1:]) for images in pairs]
    if got != expected:
        raise ValueError(f"{name} expects images of {expected}, but {root} holds {got}.")
    return pairs


def load_npz_pairs(path: Path, split: Split) -> PairedImages:
    """Loads pairs from an .npz file with arrays of bytes.

    Args:
        path: A file with ``{split}_edge`` and ``{split}_photo``, or ``{split}_photo`` and
            ``{split}_label``: arrays with shape (N, H, W, 3) or (N, H, W), uint8.
        split: Which split.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of these.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} expects an .npz file or a folder, but does not exist.")
    try:
        content = np.load(path)
        names = set(content.files)
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{path} expects an .npz file: {error}") from error
    with content:
        for a, b in NPZ_PAIRS:
            if {f"{split}_{a}", f"{split}_{b}"} <= names:
                pairs = PairedImages(
                    *(_channels_first(content[f"{split}_{part}"], path) for part in (a, b))
                )
                break
        else:
            known = " or ".join(f"{split}_{a} and {split}_{b}" for a, b in NPZ_PAIRS)
            raise ValueError(f"{path} expects {known}, but holds {', '.join(sorted(names))}.")
    if pairs.a.shape[0] != pairs.b.shape[0] or pairs.a.shape[2:] != pairs.b.shape[2:]:
        shapes = " and ".join(str(tuple(images.shape)) for images in pairs)
        raise ValueError(f"{path} expects as many images of one size, but holds {shapes}.")
    return pairs


def _channels_first(images: np.ndarray, path: Path) -> Tensor:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{path} expects arrays with shape (N, H, W) or (N, H, W, C), uint8, but holds "
            f"{images.shape}, {images.dtype}."
        )
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def load_folder_pairs(folder: Path, size: int, channels: Sequence[int] = (3, 3)) -> PairedImages:
    """Loads the pairs of a folder: JPEG files that show two square images side by side.

    Files come in the order of their names; images are resized by bicubic interpolation.

    Args:
        folder: The folder.
        size: The height and width to resize to.
        channels: Of the left and of the right image: 3 for RGB or 1 for grey.

    Raises:
        FileNotFoundError: If the folder has no such files.
        ValueError: If a file is broken, or not twice as wide as high.
    """
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(
            f"{folder} expects pairs as .jpg files, but has none. Pass as root the unpacked "
            f"archive, with a folder per split, from {PIX2PIX_URL} (edges2shoes.tar.gz or "
            "cityscapes.tar.gz)."
        )
    pairs = PairedImages(
        *(torch.empty(len(files), c, size, size, dtype=torch.uint8) for c in channels)
    )

    def read(index: int) -> None:
        for images, image in zip(pairs, _halves(files[index], size, channels), strict=True):
            images[index] = image

    with ThreadPoolExecutor() as pool:  # decoding and resizing release Python's lock
        for _ in tqdm(
            pool.map(read, range(len(files))), folder.name, len(files), unit="pair", delay=2
        ):
            pass
    return pairs


def _halves(path: Path, size: int, channels: Sequence[int]) -> list[Tensor]:
    try:
        with Image.open(path) as image:
            image.load()
    except OSError as error:
        raise ValueError(f"{path} expects a JPEG file: {error}") from error
    width, height = image.size
    if width != 2 * height:
        raise ValueError(
            f"{path} expects two square images side by side, but is {width}x{height}."
        )
    halves = []
    for left, c in zip((0, height), channels, strict=True):
        half = image.crop((left, 0, left + height, height)).convert("L" if c == 1 else "RGB")
        array = np.array(half.resize((size, size), Image.Resampling.BICUBIC))
        halves.append(torch.from_numpy(array.reshape(size, size, c)).permute(2, 0, 1))
    return halves


def download(name: Name) -> Path:
    """Downloads and unpacks an archive of the pix2pix project, once.

    Returns:
        The folder with one folder per split.

    Raises:
        ValueError: If the download has another hash, or holds what an archive of images does not:
            then unpack it yourself and pass the folder as root.
    """
    cache = Path(pooch.os_cache("factordisc"))
    folder = cache / name
    if folder.exists():
        return folder
    archive = pooch.retrieve(
        f"{PIX2PIX_URL}{name}.tar.gz",
        PIX2PIX_FILES[name],
        fname=f"{name}.tar.gz",
        path=cache,
        progressbar=True,
    )
    # Unpacked beside its place and moved there whole: an interruption leaves nothing half.
    with TemporaryDirectory(dir=cache) as partial:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")  # nothing outside, no links, no devices
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{archive} could not be unpacked: {error}") from error
        unpacked = Path(partial) / name
        if not unpacked.is_dir():
            raise ValueError(f"{archive} expects one folder {name}, but has none.")
        unpacked.rename(folder)
    return folder
