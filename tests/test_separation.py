"""Masks that divide a mixture, and the signal-to-distortion ratio of what they give."""

import importlib
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import tone, write_karaoke

from support import audio, separation
from support.separation import NetworkMask, Separator

EXCERPTS = Path(__file__).parent.parent.parent / "shared" / "data" / "musdb_excerpts"


class Loudness(torch.nn.Module):
    """In place of the U-Net: a logit that depends on the mixture's magnitude alone."""

    def forward(self, mixture, noise):
        return 2 * mixture - 1 + noise.mean(1)[:, None, None, None]


# --- masks ---


def test_the_sources_add_up_to_the_mixture():
    rng = torch.Generator().manual_seed(0)
    mixture = 5 * torch.rand(2, 1, 256, 128, generator=rng)
    mixture[0, 0, 7] = 0
    noise = torch.zeros(2, 50)
    fake = Separator(Loudness())(mixture, noise)
    assert fake.shape == (2, 3, 256, 128)
    assert torch.equal(fake[:, :1], mixture)
    m, a, v = fake.double().expm1().unbind(1)
    # float32, which loses most where the logarithm is largest
    torch.testing.assert_close(a + v, m, rtol=2e-6, atol=1e-6)
    assert (a >= 0).all()
    assert (v >= 0).all()
    b = (2 * mixture - 1).sigmoid()[:, 0].double()
    torch.testing.assert_close(a, b * m, rtol=1e-5, atol=1e-5)


def test_a_mask_near_one_leaves_what_is_left_under_autocast_too():
    mixture = torch.rand(2, 1, 256, 128, generator=torch.Generator().manual_seed(0))
    separator = Separator(torch.nn.Conv2d(1, 1, 1))
    # a sigmoid in bfloat16 would be off by more than half of what is left
    separator.network.forward = lambda mixture, noise: torch.full_like(mixture, 6).bfloat16()
    m, _, v = separator(mixture, torch.zeros(2, 50)).expm1().unbind(1)
    left = 1 / (1 + np.exp(6))
    torch.testing.assert_close(v, left * m, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("frames", [100, 128, 300])
def test_a_song_is_masked_snippet_by_snippet(frames):
    magnitudes = 4 * torch.rand(256, frames, generator=torch.Generator().manual_seed(0))
    noise = torch.full((1, 50), 0.5)
    mask = NetworkMask(Separator(Loudness()), noise, batch_size=2)(magnitudes)
    torch.testing.assert_close(mask, (2 * magnitudes.log1p() - 0.5).sigmoid())


def mixed(rate, seconds=3.0):
    return np.stack([tone(f, seconds, rate)[:, 0] for f in (300, 3000)])


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_tones_are_separated_by_frequency_at_the_mixtures_rate(rate):
    sources = mixed(rate)

    def low(mixture):
        mask = torch.zeros_like(mixture)
        mask[:20] = 1  # up to 840 Hz
        return mask

    estimates = separation.separate(sources.sum(0), rate, low)
    assert estimates.shape == sources.shape
    # the ends apart, where a tone begins at once
    inner = slice(1000, -1000)
    np.testing.assert_allclose(estimates[:, inner], sources[:, inner], atol=2e-3)
    ideal = separation.by_ideal_mask(sources, rate)
    np.testing.assert_allclose(ideal[:, inner], sources[:, inner], atol=2e-3)


def test_whatever_the_mask_the_estimates_add_up_to_the_mixture():
    sources = mixed(22_050)
    rng = torch.Generator().manual_seed(0)
    estimates = separation.separate(
        sources.sum(0), 22_050, lambda m: torch.rand(m.shape, generator=rng)
    )
    inner = slice(1000, -1000)
    np.testing.assert_allclose(estimates.sum(0)[inner], sources.sum(0)[inner], atol=1e-4)


# --- signal-to-distortion ratio ---


def bss_eval():
    """The published implementation, which imports a decoder of ffmpeg's that it does not need."""
    if importlib.util.find_spec("museval") is None:
        pytest.skip("needs museval, the published implementation")
    if shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None:
        for name in ("stempeg", "musdb"):
            sys.modules.setdefault(name, types.ModuleType(name))
    return importlib.import_module("museval.metrics").bss_eval


def reference_sdr(sources, estimates, rate):
    whole = np.broadcast_to(estimates, sources.shape).astype(np.float64)
    window = int(15 * rate)
    return bss_eval()(sources.astype(np.float64), whole, window, window)[0]


@pytest.mark.parametrize("channels", [1, 2])
def test_sdr_is_that_of_museval_with_its_silent_windows(channels):
    rate, rng = 400, np.random.default_rng(0)
    sources = rng.normal(size=(2, 5 * 15 * rate + 100, channels)).astype(np.float32)
    estimates = sources + rng.normal(size=sources.shape) * [[[0.5]], [[2.0]]]
    estimates = estimates.mean(2, keepdims=True)
    sources[1, 15 * rate : 30 * rate] = 0  # a window in which nobody sings
    estimates[0, 45 * rate : 60 * rate] = 0
    ours = separation.sdr(sources, estimates, rate)
    assert ours.shape == (2, 5)
    assert np.isnan(ours).tolist() == [[False, True, False, True, False]] * 2
    # the projection of museval has 512 taps, and floating-point error
    np.testing.assert_allclose(ours, reference_sdr(sources, estimates, rate), atol=0.01)


@pytest.mark.skipif(not EXCERPTS.exists(), reason="needs the MUSDB18 songs in ../shared/data")
def test_sdr_is_that_of_museval_on_a_real_song():
    recording = audio.find_recordings(EXCERPTS)[0]
    sources, rate = recording.read()
    assert (recording.artist, rate) == ("Cristina Vane", 44_100)
    sources = audio.mono(sources)[:, : 16 * rate]
    ideal = separation.by_ideal_mask(sources, rate)[..., None]
    ours = separation.sdr(sources[..., None], ideal, rate)
    assert ours.shape == (2, 1)
    np.testing.assert_allclose(ours, reference_sdr(sources[..., None], ideal, rate), atol=0.01)


def test_sdr_worked_by_hand():
    sources = np.array([[3.0, 4.0], [1.0, 0.0]])[..., None]
    estimates = np.array([[3.0, 3.5], [1.0, 1.0]])[..., None]
    # 25 / 0.25 and 1 / 1, in one window although it is shorter than 15 seconds
    np.testing.assert_allclose(separation.sdr(sources, estimates, 1), [[20], [0]])
    assert np.isposinf(separation.sdr(sources, sources, 1)).all()


def test_sdr_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"but got \(2, 5, 1\) and \(2, 4, 1\)"):
        separation.sdr(np.ones((2, 5, 1)), np.ones((2, 4, 1)), 1)


def test_recordings_are_scored_over_all_their_windows(tmp_path):
    write_karaoke(tmp_path / "amy_1_01.wav", seconds=3.0)
    (recording,) = audio.find_recordings(tmp_path)
    # equal energies: the mixture is wrong by the other source
    np.testing.assert_allclose(separation.score(recording, separation.by_mixture), 0, atol=0.01)
    assert (separation.score(recording, separation.by_ideal_mask) > 20).all()
    half = separation.by_mask(lambda mixture: torch.full_like(mixture, 0.5))
    np.testing.assert_allclose(separation.score(recording, half), 10 * np.log10(2), atol=0.02)
    scores = [np.array([[1.0, 3.0], [0.0, np.nan]]), np.array([[8.0], [-6.0]])]
    assert separation.summary(scores) == {
        "accompaniment_median": 3,
        "accompaniment_mean": 4,
        "accompaniment_mad": 2,
        "vocals_median": -3,
        "vocals_mean": -3,
        "vocals_mad": 3,
    }
