"""Experiment 3: the three models, their data and scores, and whole runs in small."""

import json
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import segmentation
from factordisc import Observations
from segmentation import NOISE, Settings
from support import figures, streets
from support.cyclegan import Translators
from support.labels import CITYSCAPES
from support.training import Machine

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
SKY, ROAD, CAR = (70, 130, 180), (128, 64, 128), (0, 0, 142)
SMALL = {"size": 32, "filters": 2, "batch_size": 4, "paired": 5}


def run(*arguments):
    """Runs a command of the script as from a shell, but in this process, which has torch."""
    segmentation.main(list(map(str, arguments)))


@pytest.fixture
def root(tmp_path):
    """Scenes of noise above and stripes below, and maps of sky and road: 12 and 7 pairs."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, number in (("train", 12), ("val", 7)):
        scenes = rng.integers(256, size=(number, 32, 32, 3), dtype=np.uint8)
        maps = np.empty((number, 32, 32, 3), np.uint8)
        maps[:, :16], maps[:, 16:] = SKY, ROAD
        arrays |= {f"{split}_photo": scenes, f"{split}_label": maps}
    path = tmp_path / "streets.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def train_pairs(root):
    return streets.load_streets("cityscapes", root, "train", 32)


# --- networks ---


def critic_parameters(channels, side, filters=32):
    """The parameters that Table 5 adds up to: no biases in the last layer."""
    widths = [channels, *(filters * 2**i for i in range(5))]
    convolutions = sum(16 * a * b + b for a, b in pairwise(widths))
    return convolutions + (side // 32) ** 2 * widths[-1]


def test_the_models_have_the_terms_and_the_parameters_of_the_paper():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    marginal, pair = critic_parameters(3, 128), critic_parameters(6, 128)
    expected = {
        "gan": {"joint": pair},
        "factorgan": {"map": marginal, "p_dependency": pair, "q_dependency": pair},
        "factorgan-bounded": {"map": marginal, "p_dependency": pair, "q_dependency": pair},
        "cyclegan": {"scene": marginal, "map": marginal},
    }
    for model, terms in expected.items():
        networks = segmentation.make_discriminator(Settings(model)).networks
        assert {name: count(network) for name, network in networks.items()} == terms
    unet = 3_510_389  # worked out in test_unet.py
    assert count(segmentation.make_generator(Settings("factorgan"))) == unet
    assert count(segmentation.make_generator(Settings("cyclegan"))) == 2 * unet


@pytest.mark.parametrize("model", get_args(segmentation.Model))
def test_discriminators_take_scene_and_map_and_generators_give_images(model):
    torch.manual_seed(0)
    settings = Settings(model, **SMALL)
    scene, map_ = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    d = segmentation.make_discriminator(settings).eval()
    # another map of a scene, or another scene of a map, makes another log ratio
    assert d((scene, map_)).shape == (4,)
    assert not torch.isclose(d((scene, map_)), d((scene, map_.flip(0)))).any()
    assert not torch.isclose(d((scene, map_)), d((scene.flip(0), map_))).any()
    generator = segmentation.make_generator(settings)
    noise = torch.rand(4, NOISE)
    if model == "cyclegan":
        images = generator(scene, map_, torch.cat([noise, noise], dim=1))
    else:
        images = [generator(scene, noise)]
    for each in images:
        assert each.shape == (4, 3, 32, 32)
        assert 0 <= each.min() <= each.max() <= 1


def test_bounded_dependencies_stay_below_log_n_and_the_marginal_does_not():
    torch.manual_seed(0)
    d = segmentation.make_discriminator(Settings("factorgan-bounded", **SMALL)).eval()
    free = segmentation.make_discriminator(Settings("factorgan", **SMALL)).eval()
    free.load_state_dict(d.state_dict())
    for scale in (1e-3, 1e3):
        x = scale * torch.randn(8, 3, 32, 32), scale * torch.randn(8, 3, 32, 32)
        terms, unbounded = d.terms(x), free.terms(x)
        for name in ("p_dependency", "q_dependency"):
            expected = unbounded[name] if scale < 1 else unbounded[name].sign() * np.log(5)
            torch.testing.assert_close(terms[name], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(terms["map"], unbounded["map"])
    assert terms["map"].abs().max() > np.log(5)


# --- data ---


def test_each_model_sees_what_it_may(train_pairs):
    seen = {}
    for model in segmentation.MODELS:
        settings = Settings(model, **SMALL)
        loader = segmentation.load_observations(settings, train_pairs, Machine("cpu"))
        seen[model] = set(next(iter(loader)))
    assert seen == {
        "gan": {"joint"},
        "cyclegan": {"scene", "map"},
        "factorgan": {"joint", "scene", "map"},
        "factorgan-bounded": {"joint", "scene", "map"},
    }


def row_of(image, images):
    """The number of an image in [0, 1] among images of bytes."""
    return next(i for i, other in enumerate(images) if torch.equal(image, other / 255))


def test_n_pairs_stay_together_and_unpaired_images_do_not(train_pairs):
    # Maps that can be told apart, to see which comes with which scene.
    pairs = train_pairs._replace(b=train_pairs.a.flip(1))
    loader = segmentation.load_observations(Settings(**SMALL), pairs, Machine("cpu"))
    stream = iter(loader)
    paired, together, scenes = set(), 0, set()
    for _ in range(30):
        real = next(stream)
        for scene, map_ in zip(*real["joint"], strict=True):
            assert torch.equal(scene, map_.flip(0))
            paired.add(row_of(scene, pairs.a))
        for scene, map_ in zip(real["scene"], real["map"], strict=True):
            together += torch.equal(scene, map_.flip(0))
            scenes.add(row_of(scene, pairs.a))
    assert len(paired) == 5
    assert len(scenes) == 12
    # 120 rows: 10 meet by chance, five standard deviations above are 25; all would, if paired
    assert together < 26


class Plus(torch.nn.Module):
    """A generator that adds a number to its images."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, images, noise):
        assert noise.shape == (len(images), NOISE)
        return images + self.number


def test_the_generator_is_given_all_scenes_where_there_are_unpaired_ones():
    joint = torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)
    scenes, maps = torch.full((4, 3, 2, 2), 5.0), torch.full((4, 3, 2, 2), 7.0)
    rng = torch.Generator().manual_seed(0)
    scene, _ = segmentation.make_fake(Plus(1), Observations(joint=joint), rng)
    assert torch.equal(scene, joint[0])
    real = Observations(joint=joint, scene=scenes, map=maps)
    scene, map_ = segmentation.make_fake(Plus(1), real, rng)
    assert torch.equal(scene, scenes)
    assert torch.equal(map_, scenes + 1)
    translators = Translators(to_scene=Plus(10), to_map=Plus(1))
    scene, map_ = segmentation.make_unpaired_fake(translators, real, rng)
    assert torch.equal(scene, maps + 10)
    assert torch.equal(map_, scenes + 1)


def test_more_pairs_than_there_are_are_refused(root):
    with pytest.raises(ValueError, match="between 1 and all 12 pairs, but got 13"):
        run("train", "--root", root, "--smoke", "--paired", 13, "--device", "cpu")


def test_cyclegan_alone_has_cycle_losses_and_a_pool_of_fakes(train_pairs, monkeypatch):
    calls, pools = [], {}

    def cycle_loss(noise):
        return lambda generator, real, fake: calls.append((noise, set(real), len(fake)))

    monkeypatch.setattr(segmentation, "CycleLoss", cycle_loss)
    for model in segmentation.MODELS:
        settings = Settings(model, **SMALL)
        training = segmentation.make_training(settings, train_pairs, Machine("cpu"))
        training.step()
        pools[model] = training.pool.size if training.pool else 0
    assert calls == [(NOISE, {"scene", "map"}, 2)]
    assert pools == {"gan": 0, "cyclegan": 50, "factorgan": 0, "factorgan-bounded": 0}


# --- scores ---


def test_scores_of_all_scenes_in_batches_of_any_size(root, monkeypatch):
    validation = streets.load_streets("cityscapes", root, "val", 32)
    scores = segmentation.Scores(validation, CITYSCAPES, torch.device("cpu"))
    truth = validation.b / 255
    assert scores.of(truth) == {"mse": 0, "accuracy": 100, "accuracy_unambiguous": 100}
    # the noise of a scene, and so its map, does not depend on the batch it is in
    torch.manual_seed(0)
    generator = segmentation.make_generator(Settings(**SMALL)).eval()
    whole = scores(generator)
    monkeypatch.setattr(segmentation, "SCORED_AT_ONCE", 3)  # 3, 3 and 1
    assert scores(generator) == pytest.approx(whole, rel=1e-5)
    assert segmentation.predict(generator, scores.scenes).shape == (7, 3, 32, 32)


def test_the_map_of_cyclegan_is_what_is_scored():
    translators = Translators(to_scene=Plus(10), to_map=Plus(1))
    scenes = torch.zeros(2, 3, 4, 4)
    assert torch.equal(segmentation.predict(translators, scenes), scenes + 1)


def test_baselines_worked_by_hand(tmp_path, capsys):
    # Four maps: the left half is road in all, the right half sky in three and a car in one.
    maps = np.empty((4, 32, 32, 3), np.uint8)
    maps[:, :, :16], maps[:, :, 16:], maps[0, :, 16:] = ROAD, SKY, CAR
    arrays = {f"{s}_{kind}": maps for s in ("train", "val") for kind in ("photo", "label")}
    np.savez(tmp_path / "streets.npz", **arrays)
    rows = segmentation.baselines("cityscapes", 32, tmp_path / "streets.npz")
    assert list(rows) == [
        "mean colour of each place",
        "most frequent class of each place",
        "most frequent class",
    ]
    place, overall = rows["most frequent class of each place"], rows["most frequent class"]
    assert place["accuracy"] == pytest.approx(100 * 7 / 8)
    assert place["accuracy_unambiguous"] == 100  # the car could be a licence plate
    assert overall["accuracy"] == pytest.approx(50)
    apart = np.mean(np.square(np.subtract(SKY, CAR) / 255))
    assert place["mse"] == pytest.approx(apart / 8, rel=1e-5)
    # a quarter and three quarters: the variance of the right half
    assert rows["mean colour of each place"]["mse"] == pytest.approx(apart * 3 / 32, rel=1e-5)
    assert "most frequent class of each place" in capsys.readouterr().out


# --- whole runs ---


def state_of(folder):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    return {key: value for key, value in saved.items() if key != "seconds"}


def assert_equal_states(one, other):
    flat, _ = torch.utils._pytree.tree_flatten(one)
    flat_other, _ = torch.utils._pytree.tree_flatten(other)
    assert len(flat) == len(flat_other)
    for a, b in zip(flat, flat_other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_all_models_train_are_resumed_evaluated_and_drawn(root, tmp_path, capsys):
    for model in segmentation.MODELS:
        n = 0 if model == "cyclegan" else 5
        folder = tmp_path / "out" / f"cityscapes32-n{n}-{model}-seed0"
        options = ("--model", model, "--paired", 5, "--root", root, "--smoke", "--device", "cpu")
        run("train", *options, "--out", folder)
        result = json.loads((folder / "result.json").read_text())
        assert result["updates"] == 4
        assert result["paired"] == n
        assert [point["update"] for point in result["history"]] == [0, 2, 4]
        assert "Parameters: generator" in capsys.readouterr().out
        assert set(result["parameters"]) == {"generator", "discriminator"}
        with pytest.raises(SystemExit, match="holds a run already"):
            run("train", *options, "--out", folder)
        run("train", *options, "--out", folder, "--resume")
        run(
            "evaluate", "--checkpoint", folder / "checkpoint.pt", "--root", root, "--device", "cpu"
        )
        evaluation = json.loads((folder / "evaluation.json").read_text())
        for key in ("mse", "accuracy", "accuracy_unambiguous"):
            assert evaluation[key] == pytest.approx(result[key], rel=1e-5)
        assert (folder / "predictions.png").stat().st_size > 10_000
        assert_log_ratios_add_up(evaluation["log_ratios"], model)
    capsys.readouterr()
    run("plot", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert all(model in printed for model in segmentation.MODELS)
    written = {path.name for path in (tmp_path / "out").glob("*.*")}
    drawn = {"figure4.png", "curves.png", "figure5-cityscapes32-n5-seed0.png"}
    assert written == {*drawn, "results.json"}


def assert_log_ratios_add_up(rows, model):
    kinds = {"validation pairs", "predicted maps", "training pairs"}
    assert {row.pop("samples") for row in rows} == (
        kinds - {"training pairs"} if model == "cyclegan" else kinds
    )
    for row in rows:
        total = row.pop("all")
        assert total == pytest.approx(sum(row.values()) - 2 * row.get("q_dependency", 0), abs=1e-5)


@pytest.mark.parametrize("model", ["factorgan", "cyclegan"])
def test_a_stopped_and_resumed_run_ends_bit_equal(root, tmp_path, model):
    options = ["--model", model, "--root", root, "--device", "cpu", "--scorings", 1]
    for name, value in SMALL.items():
        options += [f"--{name.replace('_', '-')}", value]
    # long enough to fill CycleGAN's pool of 50, with 8 fakes an update
    run("train", *options, "--updates", 8, "--out", tmp_path / "whole")
    run("train", *options, "--updates", 3, "--out", tmp_path / "parts")
    torch.manual_seed(1234)  # what another process would have
    run("train", *options, "--updates", 8, "--out", tmp_path / "parts", "--resume")
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    scores = whole.pop("history"), parts.pop("history")
    assert [point["update"] for point in scores[1]] == [0, 3, 8]  # it did not start again
    assert scores[0][-1] == scores[1][-1]
    assert_equal_states(whole, parts)


def test_a_sweep_trains_cyclegan_once_per_seed(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(segmentation, "run_all", lambda *a, **k: given.update(runs=a[1]))
    run("sweep", "--pairs", 25, 100, "--seeds", 0, 1, "--out", tmp_path, "--smoke")
    names = sorted(folder.name for folder in given["runs"])
    assert names == sorted(
        f"cityscapes32-{run}-seed{seed}"
        for seed in (0, 1)
        for run in ("n25-gan", "n100-gan", "n0-cyclegan", "n25-factorgan", "n100-factorgan")
    )
    assert {run.updates for run in given["runs"].values()} == {segmentation.SMOKE["updates"]}


def test_a_sweep_from_the_shell_draws_what_it_trained(root, tmp_path, capsys):
    options = ("--root", root, "--smoke", "--device", "cpu", "--models", "factorgan")
    run("sweep", *options, "--pairs", 5, "--out", tmp_path / "out")
    assert "0 of 1 runs are finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "figure4.png").exists()
    run("sweep", *options, "--pairs", 5, "--out", tmp_path / "out")
    assert "1 of 1 runs are finished" in capsys.readouterr().out


def test_there_is_nothing_to_plot_without_runs(tmp_path):
    with pytest.raises(SystemExit, match="has no finished runs"):
        run("plot", "--out", tmp_path)


def test_the_published_points_are_those_of_the_paper():
    rows = figures.read_published("segmentation.csv")
    assert {row["metric"] for row in rows} == {"mse", "accuracy"}
    (few,) = (r for r in rows if (r["paired"], r["metric"]) == ("25", "accuracy"))
    # Section 4.3: 71.6% with 25 pairs, 17.7 above GAN and 14.9 above CycleGAN
    assert float(few["factorgan"]) == pytest.approx(71.6, abs=0.1)
    assert float(few["factorgan"]) - float(few["gan"]) == pytest.approx(17.7, abs=0.05)
    assert float(few["factorgan"]) - float(few["cyclegan"]) == pytest.approx(14.9, abs=0.1)


@pytest.mark.skipif(not DATA.exists(), reason="needs the street scenes in ../shared/data")
@pytest.mark.parametrize("data", ["cityscapes", "camvid"])
def test_real_street_scenes(data, tmp_path):
    options = ("--data", data, "--root", DATA / f"{data}128.npz", "--smoke", "--device", "cpu")
    run("train", *options, "--out", tmp_path)
    assert 0 <= json.loads((tmp_path / "result.json").read_text())["accuracy"] <= 100
