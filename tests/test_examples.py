"""The example experiments: data, metrics and whole runs in small."""

import functools
import gzip
import hashlib
import http.server
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import gaussian_ratio
import paired_mnist
from support import digits as digit_data
from support import metrics
from support.classifier import DigitClassifier
from support.training import Machine

EXAMPLES = Path(__file__).parent.parent / "examples"
MNIST = Path(__file__).parent.parent.parent / "shared" / "data" / "mnist"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(*arguments):
    """Runs a command of the script as from a shell, but in this process, which has torch."""
    paired_mnist.main(list(map(str, arguments)))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The trained classifier of the 8x8 digits, which every run looks for beside its folder."""
    folder = tmp_path_factory.mktemp("classifier")
    settings = paired_mnist.Settings(data="digits")
    digits, test = paired_mnist.load_digits(settings, None)
    _, accuracy = paired_mnist.load_classifier(digits, test, folder, torch.device("cpu"))
    assert accuracy > 0.95
    return folder / "classifier8.pt"


@pytest.fixture
def out(tmp_path, classifier):
    shutil.copy(classifier, tmp_path)
    return tmp_path


# --- pairs of digits ---


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


def test_unpaired_parts_are_drawn_independently_of_each_other():
    train, _ = digit_data.embedded()
    settings = paired_mnist.Settings(data="digits", paired=50, batch_size=64)
    loader = paired_mnist.load_observations(settings, train, Machine("cpu"))
    pairs = digit_data.stacked(train, settings.same, seeded(settings.seed))
    rows = {image.numpy().tobytes(): i for i, image in enumerate(pairs)}
    together = 0
    stream = iter(loader)
    for _ in range(20):
        real = next(stream)
        joined = torch.cat([real["top"], real["bottom"]], dim=1)
        together += sum(image.numpy().tobytes() in rows for image in joined)
        assert all(image.numpy().tobytes() in rows for image in real["joint"])
    # Of 1,280 rows 1,280 would be pairs if drawn together; about one is by chance.
    assert together < 15


def test_redrawn_partners_change_and_fixed_ones_do_not():
    train, _ = digit_data.embedded()
    seen = {}
    for pairing in ("fixed", "redrawn"):
        settings = paired_mnist.Settings(
            model="gan", data="digits", paired=20, batch_size=20, pairing=pairing
        )
        stream = iter(paired_mnist.load_observations(settings, train, Machine("cpu")))
        batches = [next(stream)["joint"] for _ in range(10)]
        seen[pairing] = {image.numpy().tobytes() for batch in batches for image in batch}
        uppers = {image[:8].numpy().tobytes() for batch in batches for image in batch}
        assert uppers == {image.numpy().tobytes() for image in train.images[:20]}
    assert len(seen["fixed"]) == 20
    assert len(seen["redrawn"]) > 150


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


# --- networks ---


def test_architectures_are_those_of_tables_1_to_3():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    generator = paired_mnist.make_generator(28)
    assert generator(torch.zeros(2, 50)).shape == (2, 56, 28)
    assert count(generator) == (50 * 128 + 128) + (128 * 128 + 128) + (128 * 1568 + 1568)
    d = paired_mnist.make_discriminator("factorgan", 28)
    for name, pixels in {"top": 784, "bottom": 784, "p_dependency": 1568}.items():
        expected = (pixels * 128 + 128) + (128 * 128 + 128) + (128 + 1)
        assert count(d.networks[name]) == expected
    assert list(paired_mnist.make_discriminator("gan", 28).networks) == ["joint"]
    assert "p_dependency" not in paired_mnist.make_discriminator("factorgan-no-cp", 28).networks
    classifier = DigitClassifier(28)
    images = torch.zeros(2, 28, 28)
    assert classifier.features(images).shape == (2, 50)
    assert classifier(images).shape == (2, 10)
    convolutions = (25 * 10 + 10) + (25 * 10 * 20 + 20)
    assert count(classifier) == convolutions + (320 * 50 + 50) + (50 * 10 + 10)


def test_every_discriminator_layer_is_spectrally_normalised():
    d = paired_mnist.make_discriminator("factorgan", 8)
    for network in d.networks.values():
        for layer in network:
            if isinstance(layer, torch.nn.Linear):
                assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")


# --- metrics ---


def test_dependency_error_of_tables_worked_by_hand():
    # Two classes, always equal: ratios 2 on the diagonal, 0 off it. Independent: 1 everywhere.
    equal = metrics.class_table(torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    independent = metrics.class_table(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 2)
    assert metrics.dependency_error(equal, equal) == 0
    assert metrics.dependency_error(equal, independent) == pytest.approx(1.0)
    # Unequal marginals tell the outer product from its transpose: upper class 0 with
    # probability 3/4, lower with 1/2; ratios (2/3, 4/3; 2, 0) for the table below.
    skew = metrics.class_table(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0]), 2)
    expected = (abs(2 / 3 - 1) + abs(4 / 3 - 1) + abs(2 - 1) + abs(0 - 1)) / 4
    assert metrics.dependency_error(skew, independent) == pytest.approx(expected)


def test_a_class_that_is_never_generated_counts_as_a_ratio_of_zero():
    real = torch.full((10, 10), 0.01, dtype=torch.float64)
    generated = metrics.class_table(torch.zeros(5).long(), torch.zeros(5).long(), 10)
    # One cell has ratio 1 in both; the other 99 have 1 against 0.
    assert metrics.dependency_error(real, generated) == pytest.approx(0.99)


def test_frechet_distance_against_scipy():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(50, 50))
    real = rng.normal(size=(2000, 50)) @ mix
    generated = rng.normal(size=(3000, 50)) @ (mix + 0.2 * rng.normal(size=(50, 50))) + 0.3
    covariances = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = real.mean(0) - generated.mean(0)
    expected = difference @ difference + np.trace(sum(covariances) - 2 * root)
    distance = metrics.FrechetDistance(torch.from_numpy(real).float())
    # float32 features, and eigenvalues in place of a matrix root
    assert distance(torch.from_numpy(generated).float()) == pytest.approx(expected, rel=1e-3)
    assert distance(torch.from_numpy(real).float()) == pytest.approx(0, abs=1e-2)


# --- whole runs ---

TINY = ("--data", "digits", "--paired", 20, "--updates", 30, "--scorings", 3, "--scored", 500)


def test_the_demo_writes_a_table_and_two_figures(tmp_path, capsys):
    run("demo", "--smoke", "--out", tmp_path)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["model"] for row in rows] == ["gan", "factorgan-no-cp", "factorgan"]
    for row in rows:
        expected = {"model", "paired", "lambda", "seed", "updates", "fid", "d_dep", "seconds"}
        assert expected <= set(row)
        assert row["model"] in printed
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def state_of(folder):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    return {key: value for key, value in saved.items() if key != "seconds"}


def assert_equal_states(one, other):
    flat, _ = torch.utils._pytree.tree_flatten(one)
    flat_other, _ = torch.utils._pytree.tree_flatten(other)
    assert len(flat) == len(flat_other)
    for a, b in zip(flat, flat_other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("options", [(), ("--pairing", "redrawn", "--workers", 1)])
def test_a_stopped_and_resumed_run_ends_bit_equal(out, options):
    run("train", *TINY, *options, "--out", out / "whole")
    # in the middle of an epoch, between two scorings
    run("train", *TINY, *options, "--updates", 13, "--scorings", 1, "--out", out / "parts")
    torch.manual_seed(1234)  # what another process would have
    run("train", *TINY, *options, "--resume", "--out", out / "parts")
    whole, parts = state_of(out / "whole"), state_of(out / "parts")
    assert whole["update"] == 30
    scores = whole.pop("history"), parts.pop("history")
    assert scores[0][-1] == scores[1][-1]
    assert_equal_states(whole, parts)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_run_can_go_on(out, number):
    arguments = [sys.executable, str(EXAMPLES / "paired_mnist.py"), "train", *map(str, TINY)]
    arguments += ["--updates", "1000000", "--scorings", "1", "--out", str(out / "run")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown = b""
    while not re.search(rb" [1-9]\d*/1000000 ", shown):  # what the progress bar says
        shown += process.stderr.read(1)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert b"Stopped and saved at update" in printed
    saved = state_of(out / "run")
    assert 0 < saved["update"] < 1_000_000
    longer = saved["update"] + 5
    run("train", *TINY, "--updates", longer, "--resume", "--out", out / "run")
    assert state_of(out / "run")["update"] == longer


def test_a_run_is_evaluated_as_in_training_not_overwritten_and_not_mixed_up(out):
    run("train", *TINY, "--out", out / "run")
    run("evaluate", "--checkpoint", out / "run" / "checkpoint.pt")
    result = json.loads((out / "run" / "result.json").read_text())
    evaluation = json.loads((out / "run" / "evaluation.json").read_text())
    assert evaluation["update"] == 30
    assert evaluation["fid"] == pytest.approx(result["fid"], rel=1e-5)
    assert evaluation["d_dep"] == result["d_dep"]
    with pytest.raises(SystemExit, match="holds a run already"):
        run("train", *TINY, "--out", out / "run")
    with pytest.raises(ValueError, match=r"a run with same 0\.9, but this one has 0\.1"):
        run("train", *TINY, "--lambda", 0.1, "--resume", "--out", out / "run")


def test_a_sweep_skips_what_is_finished_and_draws_figure_1(tmp_path, capsys):
    grid = ("--data", "digits", "--lambdas", 0.1, "--processes", 2, "--out", tmp_path)
    models = ("--models", "gan", "factorgan-no-cp")
    run("sweep", "--smoke", *grid, "--pairs", 10, 20, *models)
    rows = json.loads((tmp_path / "results.json").read_text())
    # the model without p-dependency sees no pairs: one run
    assert [(r["model"], r["paired"]) for r in rows] == [
        ("factorgan-no-cp", 10),
        ("gan", 10),
        ("gan", 20),
    ]
    assert (tmp_path / "figure1.png").stat().st_size > 10_000
    run("sweep", "--smoke", *grid, "--pairs", 10, *models)
    assert "2 of 2 runs are finished." in capsys.readouterr().out


# torch's own tracer looks at .grad of the tensors that it meets
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", [("--compile",), ("--precision", "bf16-mixed"), ("--precision", "16-mixed")])
def test_options_of_speed_run(out, options, monkeypatch):
    # the same graphs as the default backend, without minutes of the C++ compiler
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    run("train", *TINY, *options, "--updates", 4, "--scorings", 1, "--out", out / "run")
    assert state_of(out / "run")["update"] == 4


def test_gaussian_ratios_are_compared_and_drawn(tmp_path, capsys):
    grid = ("--updates", 20, "--pairs", 20, 200, "--seeds", 0, "--held-out", 200)
    gaussian_ratio.main([str(a) for a in (*grid, "--out", tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(r["model"], r["pairs"]) for r in rows] == [
        ("joint", 20),
        ("factorised", 20),
        ("joint", 200),
        ("factorised", 200),
    ]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
