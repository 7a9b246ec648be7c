"""Figures of paired digits: scores over the updates, and against pairs (Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from support.figures import COLOURS, draw_against, draw_published, read_published, save


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
            for model in ("gan", "factorgan-no-cp", "factorgan"):
                colour = COLOURS[model]
                chosen = [r for r in rows if r["lambda"] == same and r["model"] == model]
                level = model == "factorgan-no-cp"  # which sees no pairs
                draw_against(axis, chosen, "paired", key, model, colour, level=level)
                points = [r for r in published if r["lambda"] == str(same) and r["metric"] == key]
                column = model.replace("-", "_")
                pairs = [(int(r["paired"]), float(r[column])) for r in points]
                draw_published(axis, pairs, model, colour)
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
