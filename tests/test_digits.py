"""Handwritten digits: files, downloads, and partners whose classes depend on each other."""

import functools
import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from support import digits as digit_data
from support import metrics

MNIST = Path(__file__).parent.parent.parent / "shared" / "data" / "mnist"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("same", [0.1, 0.9])
def test_the_partner_has_the_same_class_with_probability_lambda_and_else_any_other(same):
    number = 100_000
    labels = torch.randint(10, (number,), generator=seeded())
    pool = torch.randint(10, (5000,), generator=seeded(1))
    chosen = pool[digit_data.partners(labels, pool, same, seeded(2))]
    table = metrics.class_table(labels, chosen, 10)
    expected = torch.full((10, 10), (1 - same) / 9, dtype=torch.float64).fill_diagonal_(same)
    given_upper = table / table.sum(1, keepdim=True)
    # five standard deviations of a share among about number/10 rows
    bound = 5 * (expected * (1 - expected) / (number / 10)).sqrt()
    assert ((given_upper - expected).abs() < bound).all()


def test_partners_are_drawn_evenly_among_the_images_of_a_class():
    pool = torch.tensor([3, 3, 3, 3, 7])
    chosen = digit_data.partners(torch.full((40_000,), 3), pool, 1.0, seeded())
    counts = torch.bincount(chosen, minlength=5)
    assert counts[4] == 0
    assert ((counts[:4] - 10_000).abs() < 5 * (40_000 * 0.25 * 0.75) ** 0.5).all()


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_plain_and_gzipped(tmp_path, zipped):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for name in digit_data.MNIST_FILES:
        array = images if "images" in name else np.array([3, 9], np.uint8)
        header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
        content = header + array.tobytes()
        path = tmp_path / (name if zipped else name.removesuffix(".gz"))
        path.write_bytes(gzip.compress(content) if zipped else content)
    train, test = digit_data.mnist(tmp_path)
    np.testing.assert_allclose(train.images.numpy(), images / 255, rtol=1e-6)
    assert test.labels.tolist() == [3, 9]


def test_idx_files_that_are_missing_or_broken_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks train-images-idx3-ubyte\.gz"):
        digit_data.mnist(tmp_path)
    broken = tmp_path / "t10k-labels-idx1-ubyte"
    broken.write_bytes(b"\0\0\x08\x01\0\0\0\x05abc")
    with pytest.raises(ValueError, match=r"announces shape \(5,\), but holds 3 bytes"):
        digit_data.read_idx(broken)
    broken.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="expects the IDX format"):
        digit_data.read_idx(broken)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of MNIST on this machine, of which one file has been tampered with."""
    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    hashes = {}
    for name in digit_data.MNIST_FILES:
        array = np.full((2, 28, 28) if "images" in name else 2, len(hashes), np.uint8)
        header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
        content = gzip.compress(header + array.tobytes())
        hashes[name] = "md5:" + hashlib.md5(content).hexdigest()
        (served / name).write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(digit_data, "MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(digit_data, "MNIST_FILES", hashes)
    monkeypatch.setattr(digit_data.pooch, "os_cache", lambda _: cache)
    yield served
    server.shutdown()
    server.server_close()


def test_mnist_is_downloaded_once(mirror):
    train, test = digit_data.mnist()
    assert train.images.shape == (2, 28, 28)
    assert test.labels.tolist() == [3, 3]
    for file in mirror.iterdir():
        file.unlink()
    assert digit_data.mnist()[1].labels.tolist() == [3, 3]


def test_a_download_with_another_hash_is_refused_and_not_kept(mirror):
    name = "train-labels-idx1-ubyte.gz"
    (mirror / name).write_bytes(gzip.compress(b"tampered"))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"hash of downloaded file .*{name}"):
            digit_data.mnist()


@pytest.mark.skipif(not MNIST.exists(), reason="needs MNIST in ../shared/data")
def test_mnist_is_the_official_one():
    train, test = digit_data.mnist(MNIST)
    official = {
        "6bbc9ace898e44ae57da46a324031adb": train.images,
        "2646ac647ad5339dbf082846283269ea": test.images,
    }
    for md5, images in official.items():
        content = (images * 255).round().to(torch.uint8).numpy()
        header = b"\0\0\x08\x03" + np.array(content.shape, ">i4").tobytes()
        assert hashlib.md5(header + content.tobytes()).hexdigest() == md5
