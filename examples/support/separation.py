"""Separating mixtures by masks, and how good the result is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from support.audio import SOURCES, Recording, mono, resampled
from support.spectrograms import FRAMES, SAMPLE_RATE, magnitudes, normalised, spectrum, waveform

# From magnitudes of the mixture (256, frames) to the accompaniment's mask of the same shape.
Mask = Callable[[Tensor], Tensor]
# From the true sources (2, T) and their rate in Hz to what is made of their sum, (2, T).
Estimate = Callable[[np.ndarray, int], np.ndarray]

SDR_WINDOW = 15.0  # seconds


class Separator(nn.Module):
    """The generator of Section A.2: it divides the mixture, so that the sources add up to it.

    A network computes a mask b in [0, 1] from the normalised mixture and noise. In magnitudes m of
    the mixture, accompaniment and vocals are b * m and (1 - b) * m (the paper prints (b - 1) * m).
    So p(m | a, v) = q(m | a, v), and no discriminator needs to learn how output and input belong
    together (Eq. 6).

    Args:
        network: From mixtures (N, 1, 256, 128) and noise to logits of b, of the mixtures' shape.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, mixture: Tensor, noise: Tensor) -> Tensor:
        """Returns mixture, accompaniment and vocals, normalised, with shape (N, 3, 256, 128)."""
        m = magnitudes(mixture)
        accompaniment = self.mask(mixture, noise) * m
        return torch.cat(
            [mixture, normalised(torch.cat([accompaniment, m - accompaniment], 1))], 1
        )

    def mask(self, mixture: Tensor, noise: Tensor) -> Tensor:
        """Returns b for normalised mixtures (N, 1, 256, 128), with their shape."""
        return self.network(mixture, noise).float().sigmoid()


class NetworkMask:
    """The mask that a generator gives to whole songs, snippet after snippet.

    Args:
        separator: The generator, in eval mode.
        noise: One row of noise (1, Z), used for all snippets, so that they fit each other.
        batch_size: How many snippets are computed at a time.
    """

    def __init__(self, separator: Separator, noise: Tensor, batch_size: int = 16) -> None:
        self.separator = separator
        self.noise = noise
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, mixture: Tensor) -> Tensor:
        """Returns the mask for magnitudes (256, frames); the last snippet ends in silence."""
        frames = mixture.shape[-1]
        padded = torch.nn.functional.pad(normalised(mixture), (0, -frames % FRAMES))
        snippets = padded.unflatten(-1, (-1, FRAMES)).permute(1, 0, 2)[:, None]  # (N, 1, 256, 128)
        masks = [
            self.separator.mask(batch.to(self.noise.device), self.noise.expand(len(batch), -1))
            for batch in snippets.split(self.batch_size)
        ]
        return torch.cat(masks)[:, 0].permute(1, 0, 2).flatten(1)[:, :frames].to(mixture)


def separate(mixture: np.ndarray, rate: int, mask: Mask) -> np.ndarray:
    """Separates a song: its magnitudes by a mask, with its phase.

    Args:
        mixture: The samples of one channel, with shape (T,).
        rate: Their sampling rate, in Hz.
        mask: Gives the accompaniment's mask.

    Returns:
        Accompaniment and vocals at the rate of the mixture, with shape (2, T), float32. Above
        11,025 Hz they are silent.
    """
    mixed = _spectra(mixture, rate)
    b = mask(mixed.abs())
    length = len(resampled(mixture, rate, SAMPLE_RATE))
    estimates = waveform(torch.stack([b * mixed, (1 - b) * mixed]), length).numpy()
    return _fitted(resampled(estimates, SAMPLE_RATE, rate), mixture.shape[-1])


def sdr(sources: np.ndarray, estimates: np.ndarray, rate: int) -> np.ndarray:
    """Returns the signal-to-distortion ratio per source and window, in dB.

    It is that of BSSEval version 4 ("images"), 10 log10(sum s^2 / sum (s - e)^2), in windows of 15
    seconds that do not overlap. What is left at the end is dropped; audio that is shorter is one
    window. Where any source, or any estimate, is silent in a window, all are NaN there.

    Args:
        sources: The true sources, with shape (S, T, C).
        estimates: The estimates, with shape (S, T, C), or (S, T, 1) for all channels alike.
        rate: Their sampling rate, in Hz.

    Returns:
        The ratios, with shape (S, windows), float64.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if sources.ndim != 3 or sources.shape[:2] != estimates.shape[:2]:
        raise ValueError(
            "sdr expects sources (S, T, C) and estimates (S, T, C) or (S, T, 1), but got "
            f"{sources.shape} and {estimates.shape}."
        )
    size = min(int(SDR_WINDOW * rate), sources.shape[1])
    true = _windows(sources, size)
    estimated = _windows(np.broadcast_to(estimates, sources.shape), size)
    energy = (true**2).sum((2, 3))
    error = ((true - estimated) ** 2).sum((2, 3))
    silent = (energy == 0).any(0) | ((estimated**2).sum((2, 3)) == 0).any(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # perfect estimates are infinitely good
        return np.where(silent, np.nan, 10 * np.log10(energy / error))


def score(recording: Recording, estimate: Estimate) -> np.ndarray:
    """Returns the SDR of estimates from a recording's mixture, as `sdr` does, in dB.

    The estimates have one channel, which stands for every one of the sources'.
    """
    sources, rate = recording.read()
    return sdr(sources, estimate(mono(sources), rate)[..., None], rate)


def by_mask(mask: Mask) -> Estimate:
    """Makes estimates by a mask that knows the mixture only."""
    return lambda sources, rate: separate(sources.sum(0), rate, mask)


def by_ideal_mask(sources: np.ndarray, rate: int) -> np.ndarray:
    """Makes estimates by the ideal ratio mask: about the best that any mask can do."""
    accompaniment, vocals = _spectra(sources, rate).abs()
    mask = accompaniment / (accompaniment + vocals).clamp_min(torch.finfo(vocals.dtype).tiny)
    return separate(sources.sum(0), rate, lambda mixture: mask)


def by_mixture(sources: np.ndarray, rate: int) -> np.ndarray:
    """Takes the mixture itself for both sources: no separation at all."""
    return sources.sum(0, keepdims=True).repeat(2, axis=0)


def summary(scores: Iterable[np.ndarray]) -> dict[str, float]:
    """Sums up the SDR (2, windows) of recordings.

    Returns:
        Per source, median, mean and median absolute deviation over the windows of all recordings,
        in dB. Windows without a value are left out.
    """
    values = np.concatenate(list(scores), axis=1)
    result = {}
    for source, row in zip(SOURCES, values, strict=True):
        median = np.nanmedian(row)
        result[f"{source}_median"] = float(median)
        result[f"{source}_mean"] = float(np.nanmean(row))
        result[f"{source}_mad"] = float(np.nanmedian(np.abs(row - median)))
    return result


def _spectra(signals: np.ndarray, rate: int) -> Tensor:
    return spectrum(torch.from_numpy(resampled(signals, rate, SAMPLE_RATE)))


def _fitted(signals: np.ndarray, length: int) -> np.ndarray:
    """Cuts or pads signals by the few samples that two changes of the rate may add or lose."""
    missing = max(0, length - signals.shape[-1])
    return np.pad(signals, [(0, 0), (0, missing)])[:, :length]


def _windows(signals: np.ndarray, size: int) -> np.ndarray:
    """Cuts (S, T, C) into (S, windows, size, C), in double precision."""
    number = signals.shape[1] // size
    cut = signals[:, : number * size].astype(np.float64)
    return cut.reshape(len(signals), number, size, signals.shape[2])
