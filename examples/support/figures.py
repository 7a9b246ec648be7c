"""Figures that the experiments share."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

# Colours that remain apart in grey and for colour-blind readers (Okabe and Ito).
COLOURS = {"gan": "#D55E00", "factorgan-no-cp": "#56B4E9", "factorgan": "#0072B2"}


def draw_learning_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws FID and d_dep over the updates of the generator, one line per model."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for row in rows:
        updates = [point["update"] for point in row["history"]]
        for axis, key in zip(axes, ("fid", "d_dep"), strict=True):
            values = [point[key] for point in row["history"]]
            axis.plot(updates, values, "o-", ms=3, color=COLOURS[row["model"]], label=row["model"])
    axes[0].set(title="Quality of the digits", ylabel="FID (log scale, lower is better)")
    axes[0].set_yscale("log")
    axes[1].set(title="Dependence between the digits", ylabel="$d_{dep}$ (lower is better)")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("updates of the generator")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    _save(figure, path)


def draw_samples(samples: Mapping[str, Tensor], path: Path, columns: int = 12) -> None:
    """Draws a grid of images (N, H, W) in [0, 1] per title, side by side."""
    grids = {title: grid(images.cpu(), columns) for title, images in samples.items()}
    height, width = next(iter(grids.values())).shape
    across = min(2, len(grids))
    down = -(-len(grids) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(6 * across, (6 * height / width + 0.3) * down),
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, image) in zip(axes.flat, grids.items(), strict=False):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    _save(figure, path)


def grid(images: Tensor, columns: int = 12) -> np.ndarray:
    """Lays images (N, H, W) out in rows, N a multiple of `columns`."""
    # a light frame of two pixels sets the samples apart
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.25)
    rows = framed.unflatten(0, (-1, columns))  # (R, C, H, W)
    return rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).numpy()


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_figure1(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws FID and d_dep against the number of pairs, with the published curves (Figure 1).

    A point is the mean over seeds, a bar their range.
    """
    published = read_published("paired_mnist.csv")
    lambdas = sorted({row["lambda"] for row in rows})
    pairing = " and ".join(sorted({row["pairing"] for row in rows}))
    figure, axes = plt.subplots(
        2, len(lambdas), figsize=(5 * len(lambdas), 7), layout="constrained", squeeze=False
    )
    for column, same in enumerate(lambdas):
        for axis, key, label in zip(
            axes[:, column], ("fid", "d_dep"), ("FID", "$d_{dep}$"), strict=True
        ):
            for model, colour in COLOURS.items():
                chosen = [r for r in rows if r["lambda"] == same and r["model"] == model]
                _draw_against_pairs(axis, chosen, "paired", key, model, colour)
                points = [r for r in published if r["lambda"] == str(same) and r["metric"] == key]
                axis.plot(
                    [int(r["paired"]) for r in points],
                    [float(r[model.replace("-", "_")]) for r in points],
                    "--",
                    color=colour,
                    lw=1,
                    label=f"{model}, published",
                )
            axis.set(xscale="log", yscale="log" if key == "fid" else "linear")
            axis.set(xlabel="pairs n", ylabel=f"{label} (lower is better)")
            axis.set_title(f"lambda = {same}")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    comparable = (
        "comparable" if pairing == "redrawn" else "not comparable: their pairs were redrawn"
    )
    figure.suptitle(f"Paired MNIST, pairing {pairing} (published curves: {comparable})")
    _save(figure, path)


def _draw_against_pairs(
    axis: plt.Axes, rows: Sequence[Mapping[str, Any]], by: str, key: str, label: str, colour: str
) -> None:
    """Draws the mean over seeds and their range; a level line for what sees no pairs."""
    numbers = sorted({row[by] for row in rows})
    if not numbers:
        return
    values = [[row[key] for row in rows if row[by] == n] for n in numbers]
    means = [sum(v) / len(v) for v in values]
    if label == "factorgan-no-cp":
        axis.axhline(means[0], color=colour, label=label)
        return
    spread = [
        [m - min(v) for m, v in zip(means, values, strict=True)],
        [max(v) - m for m, v in zip(means, values, strict=True)],
    ]
    axis.errorbar(numbers, means, spread, fmt="o-", ms=4, capsize=3, color=colour, label=label)


def read_published(name: str) -> list[dict[str, str]]:
    """Reads figures that the authors published, from examples/published/."""
    path = Path(__file__).parent.parent / "published" / name
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def draw_ratio_errors(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws how well a joint and a factorised classifier recover a log ratio, against pairs."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = {"correlation": "correlation with the truth", "error": "mean absolute error (nats)"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for model, colour in (("joint", COLOURS["gan"]), ("factorised", COLOURS["factorgan"])):
            chosen = [row for row in rows if row["model"] == model]
            _draw_against_pairs(axis, chosen, "pairs", key, model, colour)
        axis.set(xscale="log", xlabel="complete observations (pairs)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(
        "log p − log q of two Gaussians on held-out points (mean and range over seeds)"
    )
    _save(figure, path)
