"""Figures 4 and 5: scores of predicted label maps against pairs, and the maps themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import figures
from support.images import unit

LABELS = {
    "gan": "GAN",
    "cyclegan": "CycleGAN",
    "factorgan": "FactorGAN",
    "factorgan-bounded": "FactorGAN, bounded",
    "factorgan-anchored": "FactorGAN, anchored",
    "factorgan-remainder": "FactorGAN, remainder",
}

# By the key of a score: its name in examples/published/, and the label of its axis.
PANELS = {
    "mse": ("mse", "MSE in RGB (lower is better)"),
    "accuracy_unambiguous": ("accuracy", "pixel accuracy (%, higher is better)"),
}


def draw_figure4(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws error and accuracy against the number of pairs, with the published points.

    A row of axes per data set and size. The accuracy is the one that can be compared with the
    published: without cars and poles in Cityscapes.
    """
    published = figures.read_published("segmentation.csv")
    sets = sorted({(row["data"], row["size"]) for row in rows})
    figure, axes = figures.plt.subplots(
        len(sets), 2, figsize=(10, 0.8 + 3.6 * len(sets)), layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for (data, size), pair in zip(sets, axes, strict=True):
        alike = [row for row in rows if (row["data"], row["size"]) == (data, size)]
        numbers = {row["paired"] for row in alike} - {0}
        if data == "cityscapes":
            numbers |= {int(point["paired"]) for point in published}
        for axis, (key, (metric, label)) in zip(pair, PANELS.items(), strict=True):
            for model, name in LABELS.items():
                colour = figures.COLOURS[model]
                chosen = [row for row in alike if row["model"] == model]
                level = model == "cyclegan"  # it sees no pairs
                figures.draw_against(axis, chosen, "paired", key, name, colour, level=level)
                points = [
                    (float(point["paired"]), float(point[model]))
                    for point in published
                    if data == "cityscapes" and point["metric"] == metric and point.get(model)
                ]
                figures.draw_published(axis, points, name, colour)
            axis.set(xscale="log", xlabel="pairs n", ylabel=label)
            axis.set_title(f"{data}, {size} x {size}")
            axis.set_xticks(sorted(numbers), [f"{n:,}" for n in sorted(numbers)])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    ordered = sorted(handles, key=lambda label: ("published" in label, list(handles).index(label)))
    figure.legend([handles[label] for label in ordered], ordered, loc="outside right center")
    figure.suptitle(
        "Ours: mean and range over seeds. Published: 128 x 128, 2,975 scenes, 200,000 updates",
        fontsize=10,
    )
    figures.save(figure, path)


def draw_learning_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws error and accuracy over the updates: a line per run, a row of axes per data set."""
    sets = sorted({(row["data"], row["size"]) for row in rows})
    figure, axes = figures.plt.subplots(
        len(sets), 2, figsize=(10, 0.8 + 3.2 * len(sets)), layout="constrained", squeeze=False
    )
    for row in rows:
        pair = axes[sets.index((row["data"], row["size"]))]
        updates = [point["update"] for point in row["history"]]
        for axis, key in zip(pair, ("mse", "accuracy"), strict=True):
            scores = [point[key] for point in row["history"]]
            axis.plot(updates, scores, ".-", color=figures.COLOURS[row["model"]])
    for (data, size), pair in zip(sets, axes, strict=True):
        for axis, label in zip(pair, (PANELS["mse"][1], "pixel accuracy (%)"), strict=True):
            axis.set(xlabel="updates of the generator", ylabel=label)
            axis.set_title(f"{data}, {size} x {size}")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    for model, name in LABELS.items():
        if any(row["model"] == model for row in rows):
            axes[0, 0].plot([], [], ".-", color=figures.COLOURS[model], label=name)
    figure.legend(loc="outside right center")
    figures.save(figure, path)


def draw_figure5(shown: Mapping[str, Tensor], path: Path) -> None:
    """Draws rows of images (N, 3, S, S), uint8, each under its title."""
    number = len(next(iter(shown.values())))
    figure, axes = figures.plt.subplots(
        len(shown), 1, figsize=(6.5, (0.25 + 6.5 / number) * len(shown)), layout="constrained"
    )
    for axis, (title, images) in zip(axes, shown.items(), strict=True):
        # nearest: a pixel of a map is a class, and no mixture of two
        axis.imshow(figures.grid(unit(images), columns=number), interpolation="nearest")
        axis.set_title(title, fontsize=9, loc="left")
        axis.axis("off")
    figures.save(figure, path)


def image(shown: Mapping[str, Tensor]) -> np.ndarray:
    """Lays the same rows out as one image (height, width, 3) in [0, 1]."""
    number = len(next(iter(shown.values())))
    return figures.grid(unit(torch.cat(list(shown.values()))), columns=number)
