"""Figures that the experiments share."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import cycle
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
COLOURS = {"gan": "#D55E00", "factorgan-no-cp": "#56B4E9", "factorgan": "#0072B2"}


def draw_learning_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws FID and d_dep over the updates: a line per run, a row of axes per lambda."""
    lambdas = sorted({row["lambda"] for row in rows})
    numbers = sorted({row["paired"] for row in rows})
    styles = dict(zip(numbers, cycle(("-", "--", ":", "-.")), strict=False))
    figure, axes = plt.subplots(
        len(lambdas), 2, figsize=(9, 3.6 * len(lambdas)), layout="constrained", squeeze=False
    )
    for row in rows:
        updates = [point["update"] for point in row["history"]]
        n = "" if len(numbers) == 1 else f", n = {row['paired']}"
        label = row["model"] + ("" if row["model"] == "factorgan-no-cp" else n)
        for axis, key in zip(axes[lambdas.index(row["lambda"])], ("fid", "d_dep"), strict=True):
            axis.plot(
                updates,
                [point[key] for point in row["history"]],
                styles[row["paired"]],
                marker="o" if len(updates) < 15 else "",
                ms=3,
                color=COLOURS[row["model"]],
                label=label if row["seed"] == rows[0]["seed"] else None,
            )
    for same, (left, right) in zip(lambdas, axes, strict=True):
        left.set(title=f"Quality of the digits, lambda {same}", yscale="log")
        left.set_ylabel("FID (log scale, lower is better)")
        right.set(title=f"Dependence between the digits, lambda {same}")
        right.set_ylabel("$d_{dep}$ (lower is better)")
        right.set_ylim(0, min(right.get_ylim()[1], 3))
        for axis in (left, right):
            axis.set_xlabel("updates of the generator")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


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
    save(figure, path)


def grid(images: Tensor, columns: int = 12) -> np.ndarray:
    """Lays images (N, H, W) out in rows, N a multiple of `columns`."""
    # a light frame of two pixels sets the samples apart
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.25)
    rows = framed.unflatten(0, (-1, columns))  # (R, C, H, W)
    return rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).numpy()


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure and closes it; of several processes the first writes."""
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_figure1(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws FID and d_dep against the number of pairs, with the published curves (Figure 1).

    A point is the mean over seeds, a bar their range.
    """
    published = read_published("paired_mnist.csv")
    lambdas = sorted({row["lambda"] for row in rows})
    pairings = sorted({row["pairing"] for row in rows})
    figure, axes = plt.subplots(
        len(lambdas), 2, figsize=(10, 4 * len(lambdas) + 0.8), layout="constrained", squeeze=False
    )
    labels = {"fid": "FID (log scale, lower is better)", "d_dep": "$d_{dep}$ (lower is better)"}
    for same, pair in zip(lambdas, axes, strict=True):
        for axis, (key, label) in zip(pair, labels.items(), strict=True):
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
            axis.set(xlabel="pairs n", ylabel=label, title=f"lambda = {same}")
            axis.grid(alpha=0.3)
        pair[1].set_ylim(bottom=0)
    axes[0, 1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    updates = " and ".join(f"{n:,}" for n in sorted({row["updates"] for row in rows}))
    note = (
        "their pairs were redrawn too"
        if pairings == ["redrawn"]
        else "not comparable: theirs were redrawn in every epoch, and trained for 200,000 updates"
    )
    figure.suptitle(
        f"Paired digits, {updates} updates, pairs {' and '.join(pairings)}\n"
        f"Published curves: {note}",
        fontsize=10,
    )
    save(figure, path)


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
    save(figure, path)
