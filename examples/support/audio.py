"""Recordings whose accompaniment and vocals are known, and mixtures to be separated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SOURCES = ("accompaniment", "vocals")

# What the files of a song's folder may be called: MUSDB18-HQ has four sources, of which three
# are the accompaniment; demonstrations of separators often have the two.
LAYOUTS = (
    (("drums.wav", "bass.wav", "other.wav"), "vocals.wav"),
    (("accompaniment_true.mp3",), "vocals_true.mp3"),
)
STEMS = ".stem.mp4"
KARAOKE = (".wav", ".flac")


@dataclass(frozen=True)
class Recording:
    """A recording in which accompaniment and vocals are known apart.

    Attributes:
        path: A folder with a file per source, a `.stem.mp4`, or a stereo file with the
            accompaniment on the left and the vocals on the right.
        name: What it is called; no two of a folder are called the same.
        song: What it is a recording of: several clips may be of one song.
        artist: Who performs it.
    """

    path: Path
    name: str
    song: str
    artist: str

    def files(self) -> list[Path]:
        """Returns all files that the recording consists of."""
        if not self.path.is_dir():
            return [self.path]
        accompaniment, vocals = _layout(self.path)
        return [self.path / name for name in (*accompaniment, vocals)]

    def read(self) -> tuple[np.ndarray, int]:
        """Reads both sources, whose sum is the mixture.

        Returns:
            Accompaniment and vocals with shape (2, T, C), float32 in about [-1, 1], for T
            samples in C channels; and the sampling rate in Hz.

        Raises:
            ValueError: If the files do not fit each other, or are not of their layout.
        """
        if self.path.is_dir():
            return _read_folder(self.path)
        if self.path.name.endswith(STEMS):
            return _read_stems(self.path)
        return _read_karaoke(self.path)


def find_recordings(folder: Path) -> list[Recording]:
    """Lists the recordings in a folder, sorted by name.

    Three layouts are known, and may stand side by side:

    - folders "artist - title" with drums.wav, bass.wav, other.wav and vocals.wav (MUSDB18-HQ), or
      with accompaniment_true.mp3 and vocals_true.mp3;
    - "artist - title.stem.mp4" files (MUSDB18);
    - stereo WAV or FLAC files "singer_song_clip", left accompaniment, right voice (MIR-1K).

    Raises:
        ValueError: If the folder does not exist, or holds nothing of the kind.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Pass the folder of the recordings.")
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _layout(path):
            found.append(_titled(path, path.name))
        elif path.name.endswith(STEMS):
            found.append(_titled(path, path.name.removesuffix(STEMS)))
        elif path.suffix in KARAOKE:
            # "amy_10_01": the singer, the song, the clip of it
            song = path.stem.rpartition("_")[0] or path.stem
            singer = song.rpartition("_")[0] or song
            found.append(Recording(path, path.stem, song, singer))
    if not found:
        raise ValueError(
            f"{folder} expects folders of songs with vocals.wav, drums.wav, bass.wav and "
            "other.wav (MUSDB18-HQ), .stem.mp4 files (MUSDB18) or stereo WAV or FLAC files "
            "(MIR-1K), but has none of them."
        )
    return found


def split_recordings(root: Path) -> tuple[list[Recording], list[Recording]]:
    """Divides recordings into those for training and those for testing.

    Where `root` has the folders "train" and "test", as MUSDB18 has, these are they. Else a fourth
    of the artists, always the same, is kept for testing: no voice is in both.

    Raises:
        ValueError: If there are no recordings, or all are by one artist.
    """
    if (root / "train").is_dir() and (root / "test").is_dir():
        return find_recordings(root / "train"), find_recordings(root / "test")
    recordings = find_recordings(root)
    artists = sorted({recording.artist for recording in recordings})
    if len(artists) < 2:
        raise ValueError(
            f"{root} expects folders 'train' and 'test', or recordings of at least two artists to "
            f"divide, but all are by {artists[0]!r}."
        )
    random.Random(0).shuffle(artists)
    tested = set(artists[: max(1, len(artists) // 4)])
    return (
        [recording for recording in recordings if recording.artist not in tested],
        [recording for recording in recordings if recording.artist in tested],
    )


def read_mixture(path: Path) -> tuple[np.ndarray, int]:
    """Reads a song to be separated: the first stream of a `.stem.mp4`, or any other sound file.

    Returns:
        The samples with shape (T, C), float32, and the sampling rate in Hz.
    """
    if path.name.endswith(STEMS):
        streams, rate = _read_streams(path, 1)
        return streams[0], rate
    return _read_file(path)


def write_audio(path: Path, samples: np.ndarray, rate: int) -> None:
    """Writes samples (T,) or (T, C) as 16-bit WAV; what exceeds full scale is clipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, "PCM_16")


def mono(samples: np.ndarray) -> np.ndarray:
    """Averages the channels: (..., T, C) to (..., T)."""
    return samples.mean(-1)


def resampled(signals: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Changes the sampling rate of signals (..., T), in Hz."""
    if rate == new_rate:
        return signals
    rows = [soxr.resample(row, rate, new_rate) for row in signals.reshape(-1, signals.shape[-1])]
    return np.stack(rows).reshape(*signals.shape[:-1], -1)


def _titled(path: Path, title: str) -> Recording:
    """Makes a recording that is a whole song, called "artist - title"."""
    return Recording(path, title, title, title.partition(" - ")[0])


def _layout(folder: Path) -> tuple[tuple[str, ...], str] | None:
    for accompaniment, vocals in LAYOUTS:
        if all((folder / name).exists() for name in (*accompaniment, vocals)):
            return accompaniment, vocals
    return None


def _read_file(path: Path) -> tuple[np.ndarray, int]:
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} expects a sound file: {error.error_string}") from None
    return samples, rate


def _read_folder(folder: Path) -> tuple[np.ndarray, int]:
    accompaniment, vocals = _layout(folder)
    names = (*accompaniment, vocals)
    read = [_read_file(folder / name) for name in names]
    kinds = {(samples.shape, rate) for samples, rate in read}
    if len(kinds) > 1:
        listed = ", ".join(
            f"{name} {samples.shape} at {rate} Hz"
            for name, (samples, rate) in zip(names, read, strict=True)
        )
        raise ValueError(
            f"{folder} expects files of one length, rate and number of channels, but got {listed}."
        )
    return _paired([samples for samples, _ in read]), read[0][1]


def _read_karaoke(path: Path) -> tuple[np.ndarray, int]:
    samples, rate = _read_file(path)
    if samples.shape[1] != 2:
        raise ValueError(
            f"{path} expects two channels, accompaniment and vocals, but has {samples.shape[1]}."
        )
    return np.ascontiguousarray(samples.T[..., None]), rate


def _read_stems(path: Path) -> tuple[np.ndarray, int]:
    # the mixture, drums, bass, other, vocals
    streams, rate = _read_streams(path, 5)
    return _paired(streams[1:]), rate


def _paired(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sums all but the last, the vocals, to the accompaniment."""
    return np.stack([sum(parts[:-1]), parts[-1]])


def _read_streams(path: Path, number: int) -> tuple[list[np.ndarray], int]:
    """Decodes the first audio streams of a file, each with shape (T, C)."""
    try:
        import av
    except ImportError:
        raise SystemExit(
            f"{path.name} needs PyAV to be read: pip install 'factordisc[stems]'. "
            "Or use the WAV files of MUSDB18-HQ."
        ) from None
    with av.open(str(path)) as container:
        chosen = container.streams.audio[:number]
        if len(chosen) < number:
            raise ValueError(
                f"{path} expects {number} audio streams (mixture, drums, bass, other, vocals), "
                f"but has {len(chosen)}."
            )
        rate = chosen[0].rate
        frames: dict[int, list[np.ndarray]] = {stream.index: [] for stream in chosen}
        for packet in container.demux(*chosen):
            # AAC decodes to float32, with shape (C, T)
            frames[packet.stream.index] += [frame.to_ndarray() for frame in packet.decode()]
    streams = [np.concatenate(pieces, axis=1).T for pieces in frames.values()]
    shortest = min(len(stream) for stream in streams)  # encoders may pad a stream by a frame
    return [stream[:shortest] for stream in streams], rate
