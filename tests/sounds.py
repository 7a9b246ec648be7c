"""Recordings for tests, made of tones."""

import numpy as np
import soundfile


def tone(frequency, seconds, rate, channels=1):
    """A tone of amplitude 0.2, with shape (T, C); channels differ in phase."""
    time = np.arange(round(seconds * rate)) / rate
    phases = np.arange(channels)
    return (0.2 * np.sin(2 * np.pi * frequency * time[:, None] + phases)).astype(np.float32)


def write_karaoke(path, low=220, high=1760, seconds=2.0, rate=16_000):
    """A stereo file with a low tone on the left and a high one, the voice, on the right."""
    samples = np.hstack([tone(low, seconds, rate), tone(high, seconds, rate)])
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return samples


def write_clips(folder, singers=5, songs=2, seconds=2.0):
    """Clips of several singers, all of them different."""
    for singer in range(singers):
        for song in range(songs):
            low = 200 + 20 * singer + 5 * song
            write_karaoke(folder / f"singer{singer}_{song}_01.wav", low, 8 * low, seconds)
