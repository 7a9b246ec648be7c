"""Figures of separated sound: spectrograms, and SDR against the number of songs (Figure 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from support.audio import SOURCES
from support.figures import COLOURS, draw_against, draw_published, read_published, save
from support.spectrograms import HOP, SAMPLE_RATE

RANGE = 70.0  # dB below the loudest that are shown


def decibels(magnitudes: np.ndarray, reference: float) -> np.ndarray:
    """Returns levels in dB relative to a magnitude, of at least -`RANGE`."""
    return 20 * np.log10(np.maximum(magnitudes / reference, 10 ** (-RANGE / 20)))


def image(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Lays magnitudes (256, frames) side by side: an image in [0, 1], low frequencies below."""
    joined = np.concatenate(panels, axis=1)
    return 1 + decibels(joined, float(joined.max()))[::-1] / RANGE


def draw_spectrograms(
    true: Mapping[str, np.ndarray], estimates: Mapping[str, Mapping[str, np.ndarray]], path: Path
) -> None:
    """Draws magnitudes (256, frames): a row for the truth, and one for each model's estimates.

    Args:
        true: Those of mixture, accompaniment and vocals, by name.
        estimates: Those that a model gives, by the model's title and by name; where it gives none,
            as of the mixture, the place stays empty.
        path: The file.
    """
    rows = {"truth": true, **estimates}
    reference = max(float(magnitudes.max()) for magnitudes in true.values())
    frames = next(iter(true.values())).shape[1]
    extent = (0, frames * HOP / SAMPLE_RATE, 0, SAMPLE_RATE / 2000)
    given = np.array([[name in panels for name in true] for panels in rows.values()])
    figure, axes = plt.subplots(
        *given.shape,
        figsize=(3.4 * len(true) + 0.8, 2.2 * len(rows) + 0.3),
        layout="constrained",
        squeeze=False,
    )
    for (row, column), axis in np.ndenumerate(axes):
        if not given[row, column]:
            axis.axis("off")
            continue
        (title, panels), name = list(rows.items())[row], list(true)[column]
        shown = axis.imshow(
            decibels(panels[name], reference),
            origin="lower",
            aspect="auto",
            extent=extent,
            vmin=-RANGE,
            vmax=0,
            cmap="magma",
        )
        axis.set_title(f"{name}: {title}", fontsize=9)
        if not given[row, :column].any():
            axis.set_ylabel("frequency (kHz)")
        if not given[row + 1 :, column].any():
            axis.set_xlabel("time (s)")
    figure.colorbar(shown, ax=axes, label="level (dB)", shrink=0.8)
    save(figure, path)


def draw_figure6(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws median SDR against the number of songs with known sources, per source (Figure 6).

    A point is the mean over seeds, a bar their range. The published medians are beside them, and
    what masks give on the same test recordings that need no learning.
    """
    published = read_published("source_separation.csv")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, source in zip(axes, reversed(SOURCES), strict=True):
        key = f"{source}_median"
        for model in dict.fromkeys(row["model"] for row in rows):
            chosen = [row for row in rows if row["model"] == model]
            draw_against(axis, chosen, "paired", key, model, COLOURS[model])
            points = [
                (int(row["songs"]), float(row["median"]))
                for row in published
                if (row["model"], row["source"]) == (model, source)
            ]
            if points:
                draw_published(axis, points, f"{model}, MUSDB18", COLOURS[model])
        for name, style in (("ideal_mask", "-."), ("even_mask", ":")):
            level = rows[0][name][key]
            axis.axhline(level, color="0.4", ls=style, lw=1, label=name.replace("_", " "))
        axis.set(xlabel="songs with known sources", ylabel="median SDR (dB)", title=source)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)
