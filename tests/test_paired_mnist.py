"""Experiment 1: its data, its networks, and whole runs in small."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_gans import assert_equal_states

import paired_mnist
from support import digits as digit_data
from support.classifier import DigitClassifier
from support.training import Machine

EXAMPLES = Path(__file__).parent.parent / "examples"


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


# --- data ---


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


# --- whole runs ---

TINY = ("--data", "digits", "--paired", 20, "--updates", 30, "--scorings", 3, "--scored", 500)


def test_the_demo_writes_a_table_and_two_figures(tmp_path, capsys):
    run("demo", "--smoke", "--out", tmp_path)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["model"], row["r1"]) for row in rows] == [
        ("gan", 1.0),
        ("factorgan-no-cp", 0.0),
        ("factorgan", 0.0),
        ("factorgan-remainder", 1.0),
    ]
    for row in rows:
        expected = {"model", "paired", "lambda", "seed", "updates", "fid", "d_dep", "seconds"}
        assert expected <= set(row)
        assert row["model"] in printed
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def state_of(folder):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    return {key: value for key, value in saved.items() if key != "seconds"}


def test_a_resumed_run_ends_bit_equal_with_pairs_redrawn_by_a_worker(out):
    options = ("--pairing", "redrawn", "--workers", 1)
    run("train", *TINY, *options, "--out", out / "whole")
    # in the middle of an epoch, between two scorings
    run("train", *TINY, *options, "--updates", 13, "--scorings", 1, "--out", out / "parts")
    run("train", *TINY, *options, "--resume", "--out", out / "parts")
    whole, parts = state_of(out / "whole"), state_of(out / "parts")
    assert whole["update"] == 30
    scores = whole.pop("history"), parts.pop("history")
    assert scores[0][-1] == scores[1][-1]
    assert_equal_states(whole, parts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_saves_first_and_the_run_can_go_on(out, number):
    """As Ctrl-C sends it, and a launcher: to the processes that load data too."""
    arguments = [sys.executable, str(EXAMPLES / "paired_mnist.py"), "train", *map(str, TINY)]
    arguments += ["--updates", "1000000", "--scorings", "1", "--out", str(out / "run")]
    arguments += ["--workers", "2"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    shown = b""
    while not re.search(rb" [1-9]\d*/1000000 ", shown):  # what the progress bar says
        shown += process.stderr.read(1)
    os.killpg(process.pid, number)
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
    grid = ("--data", "digits", "--lambdas", 0.1, "--pairs", 10, 20, "--out", tmp_path)
    # the model without p-dependency sees no pairs: one run
    run("sweep", "--smoke", *grid, "--models", "factorgan-no-cp")
    (path,) = tmp_path.glob("*/result.json")
    row = json.loads(path.read_text())
    assert (row["model"], row["paired"], row["updates"]) == ("factorgan-no-cp", 10, 20)
    for model in ("gan", "factorgan"):
        for n in (10, 20):
            settings = paired_mnist.Settings(model=model, data="digits", paired=n, same=0.1)
            finished = paired_mnist.folder_of(settings, tmp_path) / "result.json"
            finished.parent.mkdir()
            finished.write_text(json.dumps({**row, "model": model, "paired": n}))
    (tmp_path / "figure1.png").unlink()
    run("sweep", "--smoke", *grid)
    assert "5 of 5 runs are finished." in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5
    assert (tmp_path / "figure1.png").stat().st_size > 10_000


# torch's own tracer looks at .grad of the tensors that it meets
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_options_of_speed_and_of_method_run(out, monkeypatch):
    # the same graphs as the default backend, without minutes of the C++ compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = ("--compile", "--precision", "bf16-mixed", "--channels-last", "--average", 0.9)
    run("train", *TINY, *options, "--updates", 4, "--scorings", 1, "--out", out / "run")
    row = json.loads((out / "run" / "result.json").read_text())
    assert row["update"] == 4
    assert (row["precision"], row["compile"], row["processes"]) == ("bf16-mixed", True, 1)
