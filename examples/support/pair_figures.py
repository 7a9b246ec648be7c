"""Figures of image pairs: the LS distance against pairs (Figure 2), and samples (Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from support import figures
from support.figures import draw_published, draw_samples, read_published, save
from support.images import PARTS, Name, unit
from support.intervals import confidence_interval

LABELS = {
    "gan": "GAN",
    "gan-big": "GAN (big)",
    "factorgan": "FactorGAN",
    "factorgan-bounded": "FactorGAN, bounded",
    "factorgan-anchored": "FactorGAN, anchored",
    "factorgan-remainder": "FactorGAN, remainder",
}
TITLES: dict[Name, str] = {"edges2shoes": "Edges2Shoes", "cityscapes": "Cityscapes"}
# Of one number of pairs, the models are drawn side by side, so that no bar hides another.
SHIFTS = dict(zip(LABELS, (0.87, 0.92, 0.97, 1.03, 1.08, 1.14), strict=True))


def pictures(images: Tensor, data: Name) -> Tensor:
    """Lays the images of pairs side by side.

    Args:
        images: Pairs, with shape (N, C, H, W), in [0, 1].
        data: The data set, which says how many channels each image has.

    Returns:
        Colour images, with shape (N, 3, H, 2W).
    """
    parts = images.split(list(PARTS[data].values()), dim=1)
    return torch.cat([part.expand(-1, 3, -1, -1) for part in parts], dim=3)


def draw_pairs(samples: Mapping[str, Tensor], data: Name, path: Path) -> None:
    """Draws a grid of pairs (N, C, H, W), uint8, per title; N is a multiple of four."""
    shown = {title: pictures(unit(images), data) for title, images in samples.items()}
    draw_samples(shown, path, columns=4)


def draw_figure2(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the LS distance against the number of pairs, with the published values.

    A point is one generator, its bar the 95% interval over the trainings of the discriminators
    that measure the distance; lines join the means over seeds.
    """
    published = read_published("image_pairs.csv")
    panels = [data for data in TITLES if any(row["data"] == data for row in rows)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.8 + 4.8 * len(panels), 4.2), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, data in zip(axes.flat, panels, strict=True):
        for model in LABELS:
            _draw_model(axis, [r for r in rows if (r["data"], r["model"]) == (data, model)], model)
        for model, label in LABELS.items():
            known = [r for r in published if (r["data"], r["model"]) == (data, model)]
            draw_published(
                axis,
                [(float(r["paired"]) * SHIFTS[model], float(r["ls"])) for r in known],
                label,
                figures.COLOURS[model],
                [
                    confidence_interval(float(r["ls_deviation"]), int(r["trainings"]))
                    for r in known
                ],
            )
        axis.axhline(0.5, color="grey", ls=":", lw=1)
        axis.set(xscale="log", xlabel="pairs n", title=TITLES[data])
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="LS distance (higher is better)")
    axes[0, 0].set_ylim(bottom=0)
    # of the panel with the most models
    handles = max(
        (axis.get_legend_handles_labels() for axis in axes.flat), key=lambda h: len(h[0])
    )
    figure.legend(*handles, loc="outside right center", fontsize=9)
    updates = " and ".join(f"{n:,}" for n in sorted({row["updates"] for row in rows}))
    figure.suptitle(
        f"Ours: {updates} updates; published: 200,000. Bars: 95% intervals over trainings of the "
        "LS discriminator.\nDotted: it cannot tell generated from real",
        fontsize=10,
    )
    save(figure, path)


def _draw_model(axis: Axes, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    if not rows:
        return
    for row in rows:
        axis.errorbar(
            row["paired"] * SHIFTS[model],
            row["ls"],
            row["ls_interval"],
            fmt="o",
            ms=5,
            capsize=3,
            color=figures.COLOURS[model],
            label=LABELS[model] if row is rows[0] else None,
        )
    numbers = sorted({row["paired"] for row in rows})
    means = [mean(row["ls"] for row in rows if row["paired"] == n) for n in numbers]
    axis.plot([n * SHIFTS[model] for n in numbers], means, color=figures.COLOURS[model])
