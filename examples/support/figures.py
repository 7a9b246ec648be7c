"""Figures that the experiments share: samples, and scores against the number of pairs."""

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

from support import processes

# Colours that remain apart in grey and for colour-blind readers (Okabe and Ito).
COLOURS = {
    "gan": "#D55E00",
    "gan-big": "#E69F00",
    "cyclegan": "#009E73",
    "factorgan-no-cp": "#56B4E9",
    "factorgan": "#0072B2",
    "factorgan-bounded": "#56B4E9",
    "factorgan-anchored": "#CC79A7",
    "factorgan-remainder": "#000000",
}


def grid(images: Tensor, columns: int = 12) -> np.ndarray:
    """Lays images in [0, 1] out in rows.

    Args:
        images: Grey images (N, H, W) or (N, 1, H, W), or colour images (N, 3, H, W); N a multiple
            of `columns`.
        columns: The number of images in a row.

    Returns:
        One image, with shape (height, width), or (height, width, 3) of colour images.

    Raises:
        ValueError: If the last row is not full.
    """
    if len(images) % columns:
        raise ValueError(
            f"grid expects a multiple of {columns} images, but got {len(images)}. "
            "Pass another number of `columns`."
        )
    if images.dim() == 3:
        images = images.unsqueeze(1)
    # a light frame of two pixels sets the samples apart
    frame = 0.25 if images.shape[1] == 1 else 0.75  # grey images are shown dark on light
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=frame)
    rows = framed.unflatten(0, (-1, columns))  # (R, columns, C, H, W)
    laid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (R * H, columns * W, C)
    return laid.squeeze(2).cpu().numpy()


def draw_samples(samples: Mapping[str, Tensor], path: Path, columns: int = 12) -> None:
    """Draws a grid of images, as `grid` takes them, per title, side by side."""
    grids = {title: grid(images, columns) for title, images in samples.items()}
    height, width = next(iter(grids.values())).shape[:2]
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
    save(figure, path)


def draw_against(
    axis: plt.Axes,
    rows: Sequence[Mapping[str, Any]],
    by: str,
    key: str,
    label: str,
    colour: str,
    *,
    level: bool = False,
) -> None:
    """Draws a score against the number of pairs: the mean over seeds, and their range as a bar.

    Args:
        axis: Where to draw.
        rows: The results of one model; without any, nothing is drawn.
        by: The key of the number of pairs.
        key: The key of the score.
        label: What the legend says.
        colour: The colour, of `COLOURS`.
        level: Draw one level line, for a model that sees no pairs.
    """
    if not rows:
        return
    numbers = [None] if level else sorted({row[by] for row in rows})
    values = [[row[key] for row in rows if level or row[by] == n] for n in numbers]
    means = [sum(v) / len(v) for v in values]
    if level:
        axis.axhline(means[0], color=colour, label=label)
        return
    below = [mean - min(v) for mean, v in zip(means, values, strict=True)]
    above = [max(v) - mean for mean, v in zip(means, values, strict=True)]
    axis.errorbar(
        numbers, means, (below, above), fmt="o-", ms=4, capsize=3, color=colour, label=label
    )


def draw_published(
    axis: plt.Axes,
    points: Sequence[tuple[float, float]],
    label: str,
    colour: str,
    bars: Sequence[float] | None = None,
) -> None:
    """Draws what the authors published beside ours: a thin, dashed line.

    Args:
        axis: Where to draw.
        points: The number of pairs and the score; without any, nothing is drawn.
        label: Whose results they are.
        colour: The colour, of `COLOURS`.
        bars: The half widths of error bars, where they published any.
    """
    if not points:
        return
    numbers, scores = zip(*points, strict=True)
    style = {"fmt": "s--", "ms": 3, "lw": 1, "capsize": 3, "color": colour}
    axis.errorbar(numbers, scores, bars, label=f"{label}, published", **style)


def read_published(name: str) -> list[dict[str, str]]:
    """Reads figures that the authors published, from examples/published/."""
    path = Path(__file__).parent.parent / "published" / name
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure and closes it; of several processes the first writes."""
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    plt.close(figure)
