"""Experiment 4: the form of its discriminators, who sees which songs, and whole runs in small."""

import json
from pathlib import Path

import pytest
import soundfile
import torch
from sounds import write_clips
from torch.testing import assert_close

import source_separation
from factordisc import Factorisation, shared
from source_separation import Settings
from support import audio
from support.figures import read_published
from support.training import Machine

PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "reference" / "source_separation.csv"
CPU = Machine("cpu")


def run(*arguments):
    """Runs a command of the script as from a shell, but in this process, which has torch."""
    source_separation.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight singers of two songs; those of two singers are for testing."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, singers=8, songs=2)
    return folder


# --- models ---


def small(model):
    return source_separation.Settings(model=model, filters=2, paired=5)


def test_a_bounded_dependency_stays_within_the_logarithm_of_the_songs():
    d = source_separation.make_discriminator(small("factorgan-bounded"))
    with torch.no_grad():
        for network in d.networks.values():
            network[-1].parametrizations.weight.original.mul_(0).add_(1)
        terms = d.eval().terms(1000 * torch.rand(3, 3, 256, 128))
    for name in ("p_dependency", "q_dependency"):
        assert_close(terms[name].abs(), torch.full((3,), 5.0).log())
    assert (terms["vocals"].abs() > 2).all()


def test_the_form_is_equation_6():
    known = shared("m", given=["a", "v"])
    form = Factorisation.flat(["m", "a", "v"], assuming=[known])
    # without the mixture it is the flat form over the sources
    flat = Factorisation.flat(["a", "v"])
    content = [{(t.sign, t.numerator, t.denominator) for t in f.terms} for f in (form, flat)]
    assert content[0] == content[1]
    d = source_separation.make_discriminator(small("factorgan"))
    assert list(d.networks) == ["accompaniment", "vocals", "p_dependency", "q_dependency"]
    gan = source_separation.make_discriminator(small("gan"))
    assert list(gan.networks) == ["joint"]
    x = torch.rand(3, 3, 256, 128)
    other = torch.cat([torch.rand(3, 1, 256, 128), x[:, 1:]], dim=1)
    for model in (d.eval(), gan.eval()):
        assert model(x).shape == (3,)
        assert torch.equal(model(x), model(other))  # the mixture is looked at by none


def test_every_discriminator_layer_is_spectrally_normalised():
    d = source_separation.make_discriminator(small("factorgan"))
    layers = [m for m in d.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 4 * 6
    for layer in layers:
        assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")


def test_only_factorgan_sees_the_songs_that_are_not_paired(clips, tmp_path):
    known, _ = audio.split_recordings(clips)
    sizes = {}
    for model in source_separation.MODELS:
        settings = Settings(model=model, paired=3)
        loader = source_separation.load_observations(settings, known, tmp_path, CPU)
        sizes[model] = loader.state_dict()["sizes"]
    pairs = "('accompaniment', 'vocals')"
    assert sizes["gan"] == {pairs: 3, "mixture": 3}
    assert sizes["factorgan"] == {pairs: 3, "mixture": 12, "accompaniment": 12, "vocals": 12}


def test_the_paired_songs_are_drawn_by_the_seed(clips, tmp_path):
    known, _ = audio.split_recordings(clips)

    def paired(seed):
        settings = Settings(model="gan", paired=2, seed=seed)
        loader = source_separation.load_observations(settings, known, tmp_path, CPU)
        means = next(iter(loader))["accompaniment", "vocals"].mean((2, 3))
        return sorted(map(tuple, means.tolist()))

    assert paired(0) == paired(0)
    assert paired(0) != paired(1)


@pytest.mark.parametrize("number", [1, 13])
def test_a_number_of_songs_that_cannot_be_is_refused(clips, tmp_path, number):
    known, _ = audio.split_recordings(clips)
    with pytest.raises(SystemExit, match=f"2 songs to the 12 .* training, but got {number}"):
        source_separation.load_observations(Settings(paired=number), known, tmp_path, CPU)


# --- whole runs ---


@pytest.fixture
def common(clips, tmp_path):
    """The options of a run of seconds."""
    return ("--root", clips, "--cache", tmp_path / "cache", "--device", "cpu", "--paired", 3)


def state_of(folder):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    return {key: value for key, value in saved.items() if key not in ("seconds", "history")}


def test_a_stopped_and_resumed_run_ends_bit_equal(common, tmp_path):
    tiny = (*common, "--filters", 2, "--batch-size", 4, "--scorings", 1, "--average", 0.9)
    run("train", *tiny, "--updates", 5, "--out", tmp_path / "whole")
    run("train", *tiny, "--updates", 2, "--out", tmp_path / "parts")
    torch.manual_seed(1234)  # what another process would have
    run("train", *tiny, "--updates", 5, "--resume", "--out", tmp_path / "parts")
    assert state_of(tmp_path / "whole")["averaged"] is not None
    flat, _ = torch.utils._pytree.tree_flatten(state_of(tmp_path / "whole"))
    other, _ = torch.utils._pytree.tree_flatten(state_of(tmp_path / "parts"))
    assert len(flat) == len(other)
    for one, two in zip(flat, other, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_a_run_is_evaluated_as_in_training_and_separates_songs(common, clips, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", *common, "--smoke", "--out", out)
    result = json.loads((out / "result.json").read_text())
    assert len(result["tested"]) == 4
    assert [point["update"] for point in result["history"]] == [0, 2, 4]
    assert result["ideal_mask"]["vocals_median"] > 15
    assert result["even_mask"]["vocals_median"] == pytest.approx(3.01, abs=0.05)
    with pytest.raises(SystemExit, match="holds a run already"):
        run("train", *common, "--smoke", "--out", out)

    checkpoint = ("--checkpoint", out / "checkpoint.pt", "--device", "cpu")
    run("evaluate", *checkpoint, "--root", clips)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["update"] == 4
    for key in ("vocals_median", "accompaniment_mean"):
        assert evaluation[key] == pytest.approx(result[key], abs=1e-4)
    assert (out / "spectrograms.png").stat().st_size > 10_000
    assert "ideal_mask" in capsys.readouterr().out
    run("evaluate", *checkpoint, "--root", clips, "--whole")
    assert len(json.loads((out / "evaluation.json").read_text())["tested"]) == 16
    with pytest.raises(SystemExit, match="from 0 to 3, got 4"):
        run("evaluate", *checkpoint, "--root", clips, "--example", 4)

    song = clips / "singer0_0_01.wav"
    run("separate", *checkpoint, "--song", song, "--out", tmp_path / "separated")
    mixture, rate = audio.read_mixture(song)
    estimates = []
    for name in audio.SOURCES:
        samples, found = soundfile.read(tmp_path / "separated" / f"{name}.wav")
        assert found == rate
        estimates.append(samples)
    # 16 bits, and the filters of two changes of the rate
    inner = slice(1000, -1000)
    error = sum(estimates)[inner] - audio.mono(mixture)[inner]
    assert abs(error).max() < 2e-3


def test_a_sweep_skips_what_is_finished_and_draws_figure_6(clips, tmp_path, capsys):
    grid = ("--root", clips, "--cache", tmp_path / "cache", "--out", tmp_path / "runs")
    grid += ("--device", "cpu", "--smoke", "--songs", 3, "--processes", 2)
    run("sweep", *grid)
    rows = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [(row["model"], row["paired"]) for row in rows] == [("factorgan", 3), ("gan", 3)]
    assert (tmp_path / "runs" / "figure6.png").stat().st_size > 10_000
    run("sweep", *grid, "--models", "gan")
    assert "1 of 1 runs are finished." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no finished runs"):
        run("plot", "--out", tmp_path / "nothing")


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the authors' figures in ../shared")
def test_published_figures_are_the_authors():
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    authors = [line.split(",") for line in lines[1:]]
    assert [list(row.values()) for row in read_published("source_separation.csv")] == authors
