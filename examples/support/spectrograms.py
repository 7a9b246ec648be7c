"""Magnitude spectrograms of recordings: computed once, kept on disk, drawn in snippets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from support.audio import SOURCES, Recording, mono, resampled

SAMPLE_RATE = 22_050  # Hz
WINDOW = 512  # samples
HOP = 256  # samples
BINS = WINDOW // 2  # the topmost of 257 is left out, so that the networks can halve the height
FRAMES = 128  # of a snippet, which are 1.5 seconds
STRIDE = 64  # frames from one snippet to the next

# The channels of a snippet, which are the parts of an observation.
CHANNELS = ("mixture", *SOURCES)


def spectrum(signals: Tensor) -> Tensor:
    """Computes the complex spectrogram of signals (*, T), with shape (*, 256, frames)."""
    rows = signals.reshape(-1, signals.shape[-1])
    window = torch.hann_window(WINDOW, dtype=signals.dtype, device=signals.device)
    transformed = torch.stft(rows, WINDOW, HOP, window=window, return_complex=True)
    return transformed[:, :BINS].reshape(*signals.shape[:-1], BINS, -1)


def waveform(spectra: Tensor, length: int) -> Tensor:
    """Computes signals (*, length) of complex spectrograms (*, 256, frames).

    It is the inverse of `spectrum` but for the topmost bin, which is taken as silent.
    """
    whole = torch.nn.functional.pad(spectra, (0, 0, 0, 1))
    rows = whole.reshape(-1, *whole.shape[-2:])
    window = torch.hann_window(WINDOW, dtype=spectra.real.dtype, device=spectra.device)
    signals = torch.istft(rows, WINDOW, HOP, window=window, length=length)
    return signals.reshape(*spectra.shape[:-2], length)


def normalised(magnitudes: Tensor) -> Tensor:
    """Compresses magnitudes to log(1 + m), the scale on which the networks see them."""
    return magnitudes.log1p()


def magnitudes(normalised: Tensor) -> Tensor:
    """Undoes `normalised`."""
    return normalised.expm1()


def snippets_of(recording: Recording) -> Tensor:
    """Computes what a recording gives for training.

    Returns:
        Normalised magnitudes of mixture, accompaniment and vocals, with shape (frames, 3, 256),
        float32: a snippet is `FRAMES` rows of it.

    Raises:
        ValueError: If the recording is shorter than one snippet.
    """
    sources, rate = recording.read()
    signals = torch.from_numpy(resampled(mono(sources), rate, SAMPLE_RATE))
    if signals.shape[-1] // HOP + 1 < FRAMES:
        raise ValueError(
            f"{recording.path} expects at least {FRAMES * HOP / SAMPLE_RATE:.2f} s, one snippet, "
            f"but lasts {signals.shape[-1] / SAMPLE_RATE:.2f} s. Leave it out."
        )
    mixed = torch.cat([signals.sum(0, keepdim=True), signals])
    return normalised(spectrum(mixed).abs()).permute(2, 0, 1).contiguous()


def cached(recordings: Sequence[Recording], folder: Path) -> dict[Recording, Path]:
    """Computes `snippets_of` recordings, or finds what was computed of the same files before.

    A file of the cache is named by the content of its recording and by all parameters above, and
    appears only when it is complete. So any number of processes may share a folder, and one that
    is killed leaves nothing that would be read.

    Args:
        recordings: The recordings.
        folder: The cache. A minute of audio takes 16 MB.

    Returns:
        The file of every recording, for `read_cached`.
    """
    files = {}
    for recording in tqdm(recordings, desc="spectrograms", unit="recording", leave=False):
        path = folder / f"{_key(recording)}.pt"
        if not path.exists():
            content = snippets_of(recording)
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as partial:
                torch.save(content, partial)
            Path(partial.name).replace(path)
        files[recording] = path
    return files


@cache
def read_cached(path: Path) -> Tensor:
    """Opens a file of the cache, with shape (frames, 3, 256); it is read where it is looked at."""
    return torch.load(path, mmap=True, weights_only=True)


def _key(recording: Recording) -> str:
    parameters = (SAMPLE_RATE, WINDOW, HOP, BINS, CHANNELS)
    digest = hashlib.blake2b(repr(parameters).encode(), digest_size=16)
    for path in recording.files():
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Songs(Dataset):
    """Songs, of each of which one snippet is drawn whenever it is loaded.

    Snippets of one song are no independent draws, so it is songs that the loader shuffles: no two
    rows of a batch are of the same one. Each has the same weight, however long it is.

    Args:
        recordings: Recordings, of which several may be of one song.
        files: Their files in the cache, as `cached` gives them.
        parts: Which channels to give: "mixture", "accompaniment", "vocals".
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        files: Mapping[Recording, Path],
        parts: Sequence[str],
    ) -> None:
        songs: dict[str, list[Path]] = {}
        for recording in recordings:
            songs.setdefault(recording.song, []).append(files[recording])
        self.songs = list(songs.values())
        self.channels = [CHANNELS.index(part) for part in parts]

    def __len__(self) -> int:
        return len(self.songs)

    def __getitem__(self, index: int) -> Tensor:
        """Draws a snippet of a song, with shape (parts, 256, 128), by the global generator.

        All snippets of the song, which start every `STRIDE` frames, are equally likely.
        """
        starts = [
            (path, start)
            for path in self.songs[index]
            for start in range(0, len(read_cached(path)) - FRAMES + 1, STRIDE)
        ]
        # the global generator, which the loader seeds for every step
        path, start = starts[int(torch.randint(len(starts), ()))]
        snippet = read_cached(path)[start : start + FRAMES, self.channels]
        return snippet.permute(1, 2, 0).contiguous()
