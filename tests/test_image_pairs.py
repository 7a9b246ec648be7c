"""The experiment on image pairs: its models, its data, and whole runs in small."""

import csv
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import image_pairs
from image_pairs import Settings
from support import figures
from support.images import PairedImages, load_pairs
from support.pair_figures import pictures
from support.training import Machine

SHARED = Path(__file__).parent.parent.parent / "shared"


def run(*arguments):
    """Runs a command of the script as from a shell, but in this process, which has torch."""
    image_pairs.main(list(map(str, arguments)))


def count(network):
    return sum(p.numel() for p in network.parameters())


# --- models ---


def table_5(channels, filters):
    """The parameters of the discriminator of Table 5 for 64x64 images, from the table."""
    widths = [channels] + [filters * 2**i for i in range(5)]
    weights = sum(16 * a * b for a, b in pairwise(widths))
    return weights + sum(widths[1:]) + 2 * 2 * widths[-1]


def test_the_models_are_those_of_the_paper():
    gan = image_pairs.make_discriminator(Settings("gan"))
    assert {name: count(d) for name, d in gan.networks.items()} == {"joint": table_5(4, 32)}
    big = image_pairs.make_discriminator(Settings("gan-big"))
    assert {name: count(d) for name, d in big.networks.items()} == {"joint": table_5(4, 64)}
    factorgan = image_pairs.make_discriminator(Settings("factorgan"))
    assert {name: count(d) for name, d in factorgan.networks.items()} == {
        "edge": table_5(1, 32),
        "photo": table_5(3, 32),
        "p_dependency": table_5(4, 32),
        "q_dependency": table_5(4, 32),
    }
    streets = image_pairs.make_discriminator(Settings("factorgan", "cityscapes"))
    assert {name: count(d) for name, d in streets.networks.items()} == {
        "scene": table_5(3, 32),
        "map": table_5(3, 32),
        "p_dependency": table_5(6, 32),
        "q_dependency": table_5(6, 32),
    }


@pytest.mark.parametrize("data", ["edges2shoes", "cityscapes"])
def test_the_large_gan_matches_the_size_of_factorgan(data):
    big, factorgan = (
        count(image_pairs.make_discriminator(Settings(model, data)))
        for model in ("gan-big", "factorgan")
    )
    assert big == pytest.approx(factorgan, rel=0.01)


def test_bounded_dependencies_say_at_most_the_logarithm_of_the_number_of_pairs():
    d = image_pairs.make_discriminator(
        Settings("factorgan-bounded", paired=50, discriminator_filters=2)
    )
    terms = d.terms(1000 * torch.rand(8, 4, 64, 64))  # far from any image
    for name in ("p_dependency", "q_dependency"):
        assert 0 < terms[name].abs().max() <= math.log(50) + 1e-6
    assert terms["photo"].abs().max() > math.log(50)


# --- data ---


def numbered(total=40):
    """Pairs of which every image says its number: the edge n, the photo 100 + n."""
    n = torch.arange(total, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return PairedImages(n.expand(-1, 1, 64, 64), 100 + n.expand(-1, 3, 64, 64))


def draws(settings, steps=30):
    loader = image_pairs.load_observations(settings, numbered(), Machine("cpu"))
    stream = iter(loader)
    return [next(stream) for _ in range(steps)]


def test_pairs_are_few_and_whole_and_single_images_are_all_and_independent():
    settings = Settings("factorgan", paired=10, batch_size=8, seed=3)
    pairs, edges, photos, together = set(), set(), set(), 0
    for real in draws(settings):
        assert real["joint"].shape == (8, 4, 64, 64)
        assert real["joint"].dtype == torch.float32
        assert 0 <= real["joint"].min() <= real["joint"].max() <= 1
        joint, edge, photo = (
            (real[key][:, [0, -1], 0, 0] * 255).round().int() for key in ("joint", "edge", "photo")
        )
        assert torch.equal(joint[:, 1], joint[:, 0] + 100)
        pairs |= set(joint[:, 0].tolist())
        edges |= set(edge[:, 0].tolist())
        photos |= set(photo[:, 0].tolist())
        together += int((edge[:, 0] + 100 == photo[:, 0]).sum())
    assert len(pairs) == 10
    assert edges == set(range(40))
    assert photos == set(range(100, 140))
    # Of 240 rows 240 would be pairs if drawn together; six are by chance.
    assert together < 24
    other = draws(Settings("gan", paired=10, batch_size=8, seed=4))
    assert list(other[0]) == ["joint"]
    assert {int(n) for real in other for n in (real["joint"][:, 0, 0, 0] * 255).round()} != pairs


def test_pairs_do_not_count_twice_among_the_single_images():
    settings = Settings("factorgan", paired=10, batch_size=8)
    loader = image_pairs.load_observations(settings, numbered(), Machine("cpu"))
    assert loader.state_dict()["sizes"] == {"joint": 10, "edge": 40, "photo": 40}


def test_both_images_of_a_pair_are_shown_side_by_side():
    a, b = numbered(3)
    shown = pictures(torch.cat([a, b], dim=1).float(), "edges2shoes")
    assert shown.shape == (3, 3, 64, 128)
    assert torch.equal(shown[..., :64], a.float().expand(-1, 3, -1, -1))
    assert torch.equal(shown[..., 64:], b.float())


def test_more_pairs_than_there_are_are_refused():
    assert image_pairs.counted(Settings(paired="all"), 40).paired == 40
    with pytest.raises(
        SystemExit, match=r"has 40 pairs here, but --paired is 41\. Pass 1 to 40, or"
    ):
        image_pairs.counted(Settings(paired=41), 40)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the published figures in ../shared")
def test_published_values_are_copied_without_error():
    lines = (SHARED / "reference" / "image_pairs.csv").read_text().splitlines()
    names = {"FactorGAN": "factorgan", "GAN": "gan", "GAN (big)": "gan-big"}
    expected = [
        [r["dataset"], r["paired"], names[r["model"]], r["ls_mean"], r["ls_std"], r["runs"]]
        for r in csv.DictReader(line for line in lines if not line.startswith("#"))
    ]
    assert [list(r.values()) for r in figures.read_published("image_pairs.csv")] == expected


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(("data", "total"), [("edges2shoes", 1099), ("cityscapes", 200)])
def test_real_pairs_are_loaded(data, total):
    pairs = load_pairs(data, SHARED / "data" / f"{data}64.npz", "train")
    settings = image_pairs.counted(Settings("factorgan", data, "all", batch_size=4), len(pairs.a))
    assert settings.paired == total
    real = next(iter(image_pairs.load_observations(settings, pairs, Machine("cpu"))))
    assert 0.2 < real["joint"].mean() < 0.95


# --- whole runs ---

TINY = (
    *("--generator-filters", 2, "--discriminator-filters", 2, "--ls-filters", 2),
    *("--ls-trainings", 2, "--ls-epochs", 1, "--batch-size", 4, "--scorings", 2),
    *("--device", "cpu", "--paired", 6),
)


@pytest.fixture
def root(tmp_path):
    """A folder with two data sets of noise: 12 pairs for training and 20 for validation."""
    rng = np.random.default_rng(0)
    for data, left in (("edges2shoes", "edge"), ("cityscapes", "label")):
        shapes = {left: (64, 64) if left == "edge" else (64, 64, 3), "photo": (64, 64, 3)}
        arrays = {
            f"{split}_{part}": rng.integers(0, 256, (number, *shape), dtype=np.uint8)
            for split, number in (("train", 12), ("val", 20))
            for part, shape in shapes.items()
        }
        np.savez(tmp_path / f"{data}.npz", **arrays)
    return tmp_path


def state_of(folder):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    return saved["generator"] | saved["discriminator"]


def test_a_run_that_is_stopped_goes_on_and_is_evaluated_as_in_training(tmp_path, root, capsys):
    options = ("--root", root / "edges2shoes.npz", *TINY)
    run("train", *options, "--updates", 6, "--out", tmp_path / "whole")
    run("train", *options, "--updates", 3, "--out", tmp_path / "parts")
    run("train", *options, "--updates", 6, "--resume", "--out", tmp_path / "parts")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = [json.loads((tmp_path / f / "result.json").read_text()) for f in ("whole", "parts")]
    assert rows[0]["ls_values"] == rows[1]["ls_values"]
    assert len(rows[0]["ls_values"]) == 2
    assert rows[0]["ls"] == pytest.approx(np.mean(rows[0]["ls_values"]))
    assert [point["update"] for point in rows[0]["history"]] == [0, 3, 6]
    # it went on, with what was scored before, and did not start again
    assert [point["update"] for point in rows[1]["history"]] == [0, 1, 2, 3, 6]
    sizes = rows[0]["parameters"]
    assert sizes["discriminator"] == 2 * table_5(4, 2) + table_5(1, 2) + table_5(3, 2)
    printed = capsys.readouterr().out
    assert f"generator {sizes['generator']:,}" in printed
    assert f"discriminator {sizes['discriminator']:,}" in printed
    samples = torch.load(tmp_path / "whole" / "samples.pt")
    (tmp_path / "whole" / "samples.pt").unlink()
    run("evaluate", "--checkpoint", tmp_path / "whole" / "checkpoint.pt", *options[:2])
    evaluation = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert evaluation["update"] == 6
    again = torch.load(tmp_path / "whole" / "samples.pt")
    assert torch.equal(again["generated"], samples["generated"])
    assert torch.equal(again["real"], samples["real"])
    assert evaluation["ls"] == pytest.approx(rows[0]["ls"], rel=1e-4)
    assert (tmp_path / "whole" / "samples.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="holds a run already"):
        run("train", *options, "--out", tmp_path / "whole")


def test_options_of_speed_run(tmp_path, root):
    speed = ("--precision", "bf16-mixed", "--channels-last")
    options = ("--root", root / "edges2shoes.npz", "--updates", 2, "--out", tmp_path / "run")
    run("train", *options, *TINY, *speed)
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (row["precision"], row["channels_last"]) == ("bf16-mixed", True)
    # untrained discriminators say 0 or so to everything, which costs them 1
    assert 0 < row["ls"] < 2


def test_a_sweep_draws_figure_2_and_samples(tmp_path, root, capsys):
    out, shoes = tmp_path / "sweep", ("--root", root / "edges2shoes.npz")
    # two as if swept before; in this process, which has torch
    streets = ("--data", "cityscapes", "--paired", "all", "--model", "gan-big")
    folder = out / "cityscapes-n12-gan-big-seed0"
    run("train", "--smoke", *streets, "--root", root / "cityscapes.npz", "--out", folder)
    run("train", "--smoke", *shoes, "--paired", 6, "--out", out / "edges2shoes-n6-factorgan-seed0")
    grid = ("--smoke", "--device", "cpu", *shoes, "--out", out, "--pairs", 6)
    run("sweep", *grid, "--models", "gan", "factorgan")
    assert "1 of 2 runs are finished." in capsys.readouterr().out
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [(r["data"], r["paired"], r["model"]) for r in rows] == [
        ("cityscapes", 12, "gan-big"),
        ("edges2shoes", 6, "gan"),
        ("edges2shoes", 6, "factorgan"),
    ]
    for figure in ("figure2", "samples-edges2shoes-n6", "samples-cityscapes-n12"):
        assert (tmp_path / "sweep" / f"{figure}.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="has no finished runs"):
        run("plot", "--out", tmp_path)
