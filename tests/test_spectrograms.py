"""Spectrograms, their cache on disk, and the snippets that a batch is made of."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sounds import tone, write_karaoke

from factordisc import ObservationLoader, Partition
from support import audio, spectrograms
from support.spectrograms import CHANNELS, FRAMES, HOP, SAMPLE_RATE, STRIDE

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def nothing_is_open():
    """Every test opens files of its own."""
    spectrograms.read_cached.cache_clear()


# --- the transform ---


def test_a_signal_comes_back_from_its_spectrogram():
    rng = torch.Generator().manual_seed(0)
    faded = torch.hann_window(20_000, dtype=torch.float64)
    spectra = torch.fft.rfft(faded * torch.randn(3, 20_000, generator=rng, dtype=torch.float64))
    spectra[:, 9500:] = 0  # nothing near the topmost frequency, which the transform leaves out
    signals = torch.fft.irfft(spectra, 20_000)
    spectrum = spectrograms.spectrum(signals)
    assert spectrum.shape == (3, 256, 20_000 // HOP + 1)
    back = spectrograms.waveform(spectrum, 20_000)
    # a Hann window leaks little over twelve bins
    torch.testing.assert_close(back, signals, atol=2e-4, rtol=0)


@pytest.mark.parametrize("number", [1, 20, 200])
def test_a_tone_is_in_the_bin_of_its_frequency(number):
    frequency = number * SAMPLE_RATE / 512
    signal = torch.from_numpy(tone(frequency, 1.0, SAMPLE_RATE)[:, 0])
    magnitudes = spectrograms.spectrum(signal).abs()[:, 10:-10]
    assert (magnitudes.argmax(0) == number).all()
    # amplitude times half the sum of the window, which is 256
    torch.testing.assert_close(
        magnitudes[number], torch.full_like(magnitudes[number], 0.2 * 128), rtol=1e-2, atol=0
    )


def test_normalising_is_undone():
    values = torch.tensor([0.0, 1e-4, 1.0, 128.0])
    torch.testing.assert_close(
        spectrograms.normalised(values),
        torch.tensor([0.0, 1e-4, 0.6931, 4.8598]),
        rtol=1e-4,
        atol=0,
    )
    torch.testing.assert_close(spectrograms.magnitudes(spectrograms.normalised(values)), values)


# --- the cache ---


def recordings_in(folder):
    return audio.find_recordings(folder)


def test_a_recording_gives_mixture_accompaniment_and_vocals(tmp_path):
    write_karaoke(
        tmp_path / "amy_1_01.wav", low=10 * SAMPLE_RATE / 512, high=50 * SAMPLE_RATE / 512
    )
    values = spectrograms.snippets_of(recordings_in(tmp_path)[0])
    assert values.shape == (2 * SAMPLE_RATE // HOP + 1, 3, 256)
    inner = values[20:-20]
    assert (inner[:, 1].argmax(1) == 10).all()
    assert (inner[:, 2].argmax(1) == 50).all()
    mixture = spectrograms.magnitudes(inner)
    torch.testing.assert_close(mixture[:, 0, 10], mixture[:, 1, 10], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixture[:, 0, 50], mixture[:, 2, 50], rtol=1e-3, atol=1e-3)


def test_spectrograms_are_computed_once_and_known_by_content(tmp_path, monkeypatch):
    write_karaoke(tmp_path / "a" / "amy_1_01.wav")
    write_karaoke(tmp_path / "b" / "amy_1_01.wav")
    cache = tmp_path / "cache"
    (recording,) = recordings_in(tmp_path / "a")
    (moved,) = recordings_in(tmp_path / "b")
    computed = []
    whole = spectrograms.snippets_of
    monkeypatch.setattr(
        spectrograms,
        "snippets_of",
        lambda recording: computed.append(recording) or whole(recording),
    )
    path = spectrograms.cached([recording], cache)[recording]
    assert spectrograms.cached([recording, moved], cache)[moved] == path
    assert computed == [recording]
    assert torch.equal(spectrograms.read_cached(path), whole(recording))
    write_karaoke(tmp_path / "a" / "amy_1_01.wav", low=300)
    assert spectrograms.cached([recording], cache)[recording] != path
    monkeypatch.setattr(spectrograms, "HOP", 128)
    assert spectrograms.cached([moved], cache)[moved] != path
    assert len(computed) == 3


def test_a_recording_that_is_too_short_is_refused(tmp_path):
    write_karaoke(tmp_path / "amy_1_01.wav", seconds=1.0)
    with pytest.raises(ValueError, match=r"at least 1\.49 s, one snippet, but lasts 1\.00 s"):
        spectrograms.cached(recordings_in(tmp_path), tmp_path / "cache")


WORKER = """
import io, os, signal, sys, time
from pathlib import Path
import torch
from support import audio, spectrograms

folder, cache, act = sys.argv[1:]
if act == "die":
    def save(content, file):
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save
elif act == "wait":
    whole = torch.save
    def save(content, file):
        buffer = io.BytesIO()
        whole(content, buffer)
        file.write(buffer.getvalue()[:1000])
        file.flush()
        Path(cache, f"{os.getpid()}.ready").touch()
        while len(list(Path(cache).glob("*.ready"))) < 2:
            time.sleep(0.01)
        file.write(buffer.getvalue()[1000:])
    torch.save = save
spectrograms.cached(audio.find_recordings(Path(folder)), Path(cache))
"""


def start_worker(folder, cache, act):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, "-c", WORKER, str(folder), str(cache), act]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    write_karaoke(tmp_path / "amy_1_01.wav")
    cache = tmp_path / "cache"
    worker = start_worker(tmp_path, cache, "die")
    worker.communicate(timeout=60)
    assert worker.returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.read_bytes() == b"half of it"
    (recording,) = recordings_in(tmp_path)
    path = spectrograms.cached([recording], cache)[recording]
    assert path != left
    assert torch.equal(spectrograms.read_cached(path), spectrograms.snippets_of(recording))


def test_two_processes_may_compute_the_same(tmp_path):
    write_karaoke(tmp_path / "amy_1_01.wav")
    cache = tmp_path / "cache"
    # both are in the middle of writing
    workers = [start_worker(tmp_path, cache, "wait") for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
    (recording,) = recordings_in(tmp_path)
    path = spectrograms.cached([recording], cache)[recording]
    assert [p for p in cache.iterdir() if p.suffix != ".ready"] == [path]
    assert torch.equal(spectrograms.read_cached(path), spectrograms.snippets_of(recording))


# --- snippets ---


def numbered(tmp_path, songs, clips, frames):
    """Recordings whose spectrograms say which song (mixture) and clip (accompaniment) they are
    of, and which frame (vocals)."""
    files = {}
    for song in range(songs):
        for clip in range(clips):
            values = torch.empty(frames + 64 * clip, 3, 256)
            values[:, 0], values[:, 1] = song, clip
            values[:, 2] = torch.arange(len(values))[:, None]
            recording = audio.Recording(tmp_path, f"{song}_{clip}", f"song {song}", "someone")
            files[recording] = tmp_path / f"{song}_{clip}.pt"
            torch.save(values, files[recording])
    return files


def test_all_snippets_of_a_song_are_equally_likely(tmp_path):
    files = numbered(tmp_path, songs=1, clips=2, frames=200)  # 2 and 3 snippets
    songs = spectrograms.Songs(list(files), files, CHANNELS)
    torch.manual_seed(0)
    draws = torch.stack([songs[0] for _ in range(1000)])
    assert draws.shape == (1000, 3, 256, FRAMES)
    starts = draws[:, 2, 0, 0]
    assert torch.equal(draws[:, 2, 7], starts[:, None] + torch.arange(FRAMES))
    kinds, counts = torch.stack([draws[:, 1, 0, 0], starts]).unique(dim=1, return_counts=True)
    assert kinds.T.tolist() == [[0, 0], [0, STRIDE], [1, 0], [1, STRIDE], [1, 2 * STRIDE]]
    # five standard deviations of a count
    assert ((counts - 200).abs() < 5 * (1000 * 0.2 * 0.8) ** 0.5).all()


def test_parts_are_given_as_asked_for(tmp_path):
    files = numbered(tmp_path, songs=2, clips=1, frames=128)
    songs = spectrograms.Songs(list(files), files, ("accompaniment", "mixture"))
    assert len(songs) == 2
    snippet = songs[1]
    assert snippet.shape == (2, 256, FRAMES)
    assert snippet[:, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_batch_has_two_snippets_of_one_song(tmp_path, workers):
    files = numbered(tmp_path, songs=7, clips=4, frames=300)
    partition = Partition(dict.fromkeys(CHANNELS, 1), dim=1)
    datasets = {part: spectrograms.Songs(list(files), files, CHANNELS[:1]) for part in CHANNELS}
    rng = torch.Generator().manual_seed(0)
    loader = ObservationLoader(datasets, partition, 4, pool=False, rng=rng, workers=workers)
    stream = iter(loader)
    seen = set()
    for _ in range(20):
        for batch in next(stream).values():
            songs = batch[:, 0, 0, 0].tolist()
            assert len(set(songs)) == 4
            seen |= set(songs)
    assert len(seen) == 7
    del stream


def test_snippets_are_drawn_by_the_step_alone(tmp_path):
    files = numbered(tmp_path, songs=5, clips=2, frames=400)
    partition = Partition(dict.fromkeys(CHANNELS, 1), dim=1)
    batches = []
    for workers in (0, 1):
        songs = spectrograms.Songs(list(files), files, CHANNELS)
        rng = torch.Generator().manual_seed(0)
        loader = ObservationLoader({"joint": songs}, partition, 3, rng=rng, workers=workers)
        torch.manual_seed(workers)  # what the processes have is of no account
        batches.append(next(iter(loader))["joint"])
    assert torch.equal(*batches)
