"""Readers of image pairs, on small files and, where they are, on the real ones."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import images
from support.images import PairedImages, load_folder_pairs, load_npz_pairs, load_pairs

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def save_pair(path, left, right, height=256):
    """Writes two images of one colour side by side, as pix2pix does."""
    picture = Image.new("RGB", (2 * height, height))
    picture.paste(Image.new("RGB", (height, height), left), (0, 0))
    picture.paste(Image.new("RGB", (height, height), right), (height, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=95)


@pytest.fixture
def folder(tmp_path):
    save_pair(tmp_path / "train" / "2_AB.jpg", (0, 0, 255), (0, 255, 0))
    save_pair(tmp_path / "train" / "10_AB.jpg", (255, 0, 0), (10, 20, 30))
    save_pair(tmp_path / "val" / "1_AB.jpg", (255, 255, 255), (0, 0, 0))
    return tmp_path


def test_the_halves_of_a_picture_become_a_pair(folder):
    a, b = load_pairs("cityscapes", folder, "train")
    assert a.shape == b.shape == (2, 3, 64, 64)
    assert a.dtype == b.dtype == torch.uint8
    # by name, as text: 10_AB before 2_AB; JPEG is off by two levels, and more where halves meet
    expected = torch.tensor([[255, 0, 0], [0, 0, 255]]), torch.tensor([[10, 20, 30], [0, 255, 0]])
    for part, colours in zip((a, b), expected, strict=True):
        difference = part.int() - colours[:, :, None, None]
        assert difference[..., 4:60].abs().max() <= 2
    assert load_pairs("cityscapes", folder, "val").a.shape == (1, 3, 64, 64)


def test_an_edge_map_has_one_channel_of_the_luma(folder):
    edge, photo = load_pairs("edges2shoes", folder, "train")
    assert edge.shape == (2, 1, 64, 64)
    assert photo.shape == (2, 3, 64, 64)
    luma = torch.tensor([0.299 * 255, 0.114 * 255])
    assert ((edge[:, 0, 32, 32] - luma).abs() <= 2).all()


def test_resizing_is_that_of_the_pix2pix_loader(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1_AB.jpg")
    decoded = Image.open(tmp_path / "1_AB.jpg")
    expected = decoded.crop((128, 0, 256, 128)).resize((64, 64), Image.Resampling.BICUBIC)
    _, b = load_folder_pairs(tmp_path, 64)
    assert (b[0].permute(1, 2, 0).numpy() == np.array(expected)).all()


def test_broken_and_wrong_pictures_are_refused_by_name(folder):
    whole = (folder / "train" / "2_AB.jpg").read_bytes()
    bad = folder / "train" / "3_AB.jpg"
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"3_AB\.jpg expects a JPEG file: .*truncated"):
        load_pairs("cityscapes", folder, "train")
    bad.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"3_AB\.jpg expects a JPEG file: cannot identify"):
        load_pairs("cityscapes", folder, "train")
    Image.new("RGB", (256, 256)).save(bad)
    with pytest.raises(ValueError, match=r"3_AB\.jpg expects two square .* but is 256x256"):
        load_pairs("cityscapes", folder, "train")


def test_an_empty_folder_says_where_the_archives_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train expects pairs .*edges2shoes\.tar\.gz"):
        load_pairs("edges2shoes", tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere expects .* but does not exist"):
        load_pairs("edges2shoes", tmp_path / "nowhere", "train")


def arrays(number=3, size=64):
    rng = np.random.default_rng(0)
    return {
        "train_edge": rng.integers(0, 256, (number, size, size), dtype=np.uint8),
        "train_photo": rng.integers(0, 256, (number, size, size, 3), dtype=np.uint8),
        "train_id": np.arange(number),
    }


def test_arrays_become_channels_first(tmp_path):
    content = arrays()
    np.savez(tmp_path / "pairs.npz", **content)
    edge, photo = load_pairs("edges2shoes", tmp_path / "pairs.npz", "train")
    assert (edge[:, 0].numpy() == content["train_edge"]).all()
    assert (photo.permute(0, 2, 3, 1).numpy() == content["train_photo"]).all()
    labels = {"val_photo": content["train_photo"], "val_label": content["train_photo"][::-1]}
    np.savez(tmp_path / "labels.npz", **labels)
    scene, label = load_npz_pairs(tmp_path / "labels.npz", "val")
    assert (scene.flip(0) == label).all()


def test_wrong_arrays_are_refused(tmp_path):
    path = tmp_path / "pairs.npz"
    content = arrays()
    np.savez(path, **content)
    with pytest.raises(ValueError, match="expects val_edge and val_photo or val_photo and val_la"):
        load_npz_pairs(path, "val")
    with pytest.raises(ValueError, match=r"cityscapes expects images of \[\(3, 64, 64\)"):
        load_pairs("cityscapes", path, "train")
    np.savez(path, **content | {"train_edge": content["train_edge"][1:]})
    with pytest.raises(ValueError, match=r"as many images .*\(2, 1, 64, 64\) and \(3, 3, 64, 64"):
        load_npz_pairs(path, "train")
    np.savez(path, **content | {"train_edge": content["train_edge"] / 255})
    with pytest.raises(ValueError, match=r"uint8, but holds \(3, 64, 64, 1\), float64"):
        load_npz_pairs(path, "train")
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"pairs\.npz expects an \.npz file"):
        load_npz_pairs(path, "train")


def test_a_subset_is_seeded_and_grows():
    chosen = images.subset(50, 1099, seed=0)
    assert torch.equal(chosen, images.subset(100, 1099, seed=0)[:50])
    assert not torch.equal(chosen, images.subset(50, 1099, seed=1))
    assert len(chosen.unique()) == 50
    assert images.subset(3, 3, 0).sort().values.tolist() == [0, 1, 2]
    for wrong in (0, 1100):
        with pytest.raises(ValueError, match=f"between 1 and all 1099 pairs, but got {wrong}"):
            images.subset(wrong, 1099, 0)


def test_bytes_are_scaled_when_they_are_loaded():
    pairs = PairedImages(
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.full((2, 3, 4, 4), 255).byte()
    )
    data = images.UnitImages(pairs.joined())
    assert data.images.dtype == torch.uint8
    assert len(data) == 2
    expected = torch.tensor([0.0, 1, 1, 1]).reshape(4, 1, 1).expand(4, 4, 4)
    assert torch.equal(data[1], expected)
    assert data[0].dtype == torch.float32


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of the archives on this machine; returns a function that puts one there."""
    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(images, "PIX2PIX_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(images.pooch, "os_cache", lambda _: cache)

    def serve(names):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in names.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        (served / "cityscapes.tar.gz").write_bytes(buffer.getvalue())
        md5 = hashlib.md5(buffer.getvalue()).hexdigest()
        monkeypatch.setitem(images.PIX2PIX_FILES, "cityscapes", f"md5:{md5}")

    serve.served, serve.cache = served, cache
    yield serve
    server.shutdown()
    server.server_close()


def test_an_archive_is_downloaded_and_unpacked_once(mirror, folder):
    names = ("train/2_AB.jpg", "train/10_AB.jpg", "val/1_AB.jpg")
    mirror({f"cityscapes/{name}": (folder / name).read_bytes() for name in names})
    expected = load_pairs("cityscapes", folder, "train")
    assert torch.equal(load_pairs("cityscapes", None, "train").joined(), expected.joined())
    (mirror.served / "cityscapes.tar.gz").unlink()
    assert torch.equal(load_pairs("cityscapes", None, "train").joined(), expected.joined())


def test_an_archive_with_another_hash_is_refused(mirror):
    mirror({"cityscapes/train/1.jpg": b""})
    (mirror.served / "cityscapes.tar.gz").write_bytes(b"tampered")
    with pytest.raises(ValueError, match=r"hash of downloaded file .*cityscapes\.tar\.gz"):
        images.download("cityscapes")


def test_an_archive_cannot_write_outside_its_folder(mirror, tmp_path):
    mirror({"cityscapes/train/1.jpg": b"", "../../outside.txt": b"no"})
    with pytest.raises(ValueError, match=r"could not be unpacked: .*outside"):
        images.download("cityscapes")
    assert not (tmp_path / "outside.txt").exists()
    assert [path.name for path in mirror.cache.iterdir()] == ["cityscapes.tar.gz"]
    mirror({"elsewhere/1.jpg": b""})
    with pytest.raises(ValueError, match="expects one folder cityscapes"):
        images.download("cityscapes")


@pytest.mark.skipif(not DATA.exists(), reason="needs the real pairs in ../shared/data")
def test_real_pairs():
    edge, photo = load_pairs("edges2shoes", DATA / "edges2shoes64.npz", "train")
    assert edge.shape == (1099, 1, 64, 64)
    assert photo.shape == (1099, 3, 64, 64)
    # both halves are the same shoe: where edges are drawn, the photograph is not white
    drawn = edge < 128
    assert photo.float().mean(1, keepdim=True)[drawn].mean() < photo.float().mean() - 30
    scene, label = load_pairs("cityscapes", DATA / "cityscapes64.npz", "val")
    assert scene.shape == label.shape == (50, 3, 64, 64)
