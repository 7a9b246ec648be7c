"""What a factorisation looks like: LaTeX, and a picture of its parts, terms and data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from factordisc.densities import Density, Ratio
from factordisc.names import maximal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__: list[str] = []

SIGNS = {1: "+", -1: "−", 0: "0"}
# Colours that remain apart for colour-blind readers and in grey (Okabe and Ito).
COLOURS = {"p and q": "#009E73", "p": "#0072B2", "q": "#D55E00"}
MEANINGS = {
    "p and q": "data against generator",
    "p": "dependence in the data",
    "q": "dependence in the generator",
}


def observed_together(terms: Iterable[Ratio]) -> list[tuple[str, ...]]:
    """Returns the largest sets of parts that the data must provide together."""
    densities = (d for term in terms for d in (*term.numerator, *term.denominator))
    groups = (density.parts for density in densities if density.source == "p")
    return maximal(groups, lambda a, b: set(a) < set(b))


def trained_by(term: Ratio) -> str:
    """Says which data train a term."""
    groups = " and ".join(f"({', '.join(parts)})" for parts in observed_together([term]))
    return groups or "the generator"


def latex(parts: Sequence[str], terms: Sequence[Ratio]) -> str:
    """Writes the sum as an `aligned` block, a line per term that is summed."""
    whole = tuple(parts)
    left = _fraction([Density("p", whole)], [Density("q", whole)])
    lines = [left]
    for term in terms:
        if term.sign:
            first = "=" if len(lines) == 1 else "+"
            sign = first if term.sign > 0 else ("= -" if first == "=" else "-")
            ratio = _fraction(term.numerator, term.denominator)
            for name in term.given:
                other = next(t for t in terms if t.name == name)
                fraction = _fraction(other.numerator, other.denominator)
                ratio += f" {'-' if other.sign * term.sign > 0 else '+'} {fraction}"
            end = "" if first == "=" else " \\\\"
            lines[-1] += end
            lines.append(f"{sign}{{}}& {ratio}")
    return "\n".join(["\\begin{aligned}", *lines, "\\end{aligned}"])


def _fraction(numerator: Sequence[Density], denominator: Sequence[Density]) -> str:
    above, below = (
        r" \, ".join(f"{d.source}({','.join(map(_name, d.parts))})" for d in side)
        for side in (numerator, denominator)
    )
    return rf"\log \frac{{{above}}}{{{below}}}"


def _name(part: str) -> str:
    return r"\mathrm{" + re.sub(r"([\\{}_&%$#^~ ])", _escaped, part) + "}"


def _escaped(match: re.Match[str]) -> str:
    special = {"\\": r"\backslash ", "^": r"\wedge ", "~": r"\sim ", " ": r"\ "}
    return special.get(match[0], "\\" + match[0])


def draw(parts: Sequence[str], terms: Sequence[Ratio], axes: Axes | None) -> Axes:
    """Draws the tree of the parts above a row per term: what `Factorisation.draw` does."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.patches import FancyBboxPatch, Patch
    except ImportError as error:
        raise ImportError(
            "Factorisation.draw needs matplotlib, which is not installed: pip install matplotlib."
        ) from error
    column = {name: i for i, name in enumerate(parts)}
    if axes is None:
        widest = max(len(trained_by(term)) for term in terms)
        column_width = max(0.8, 0.13 * max(map(len, parts)))
        size = (1.5 + column_width * len(parts) + 0.08 * widest, 1.8 + 0.32 * len(terms))
        _, axes = plt.subplots(figsize=size, layout="constrained")
    axes.axis("off")
    top = _draw_tree(axes, column, _groups(terms))

    def box(names: Sequence[str], y: float, height: float, **style: Any) -> None:
        """Draws a frame around every run of neighbours, and a line between the runs."""
        columns = sorted(column[name] for name in names)
        starts = [c for c in columns if c - 1 not in columns]
        ends = [c for c in columns if c + 1 not in columns]
        for start, end in zip(starts, ends, strict=True):
            corner, width = (start - 0.4, y - height / 2), end - start + 0.8
            rounded = "round,pad=0,rounding_size=0.1"
            axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=rounded, **style))
        for end, start in zip(ends, starts[1:], strict=False):
            axes.plot([end + 0.4, start - 0.4], [y, y], color=style["edgecolor"], lw=1, zorder=0)

    kinds: dict[str, str] = {}
    for y, term in zip(range(-1, -len(terms) - 1, -1), terms, strict=True):
        sides = (term.numerator, term.denominator)
        sources = " and ".join(sorted({density.source for side in sides for density in side}))
        kinds[MEANINGS.get(sources, sources)] = colour = COLOURS.get(sources, "#777777")
        style = {"edgecolor": colour, "alpha": 1.0 if term.sign else 0.3}
        blocks = max(sides, key=len)
        if len(blocks) > 1:  # what is seen together, around what is drawn apart
            box(term.parts, y, 0.8, facecolor="none", **style)
        for density in blocks:
            box(density.parts, y, 0.5, facecolor=colour, **style)
        axes.text(-0.7, y, f"{SIGNS[term.sign]} {term.name}", ha="right", va="center")
        axes.text(len(parts) - 0.3, y, trained_by(term), va="center", color="0.3")
    axes.text(-0.7, 0, "term", ha="right", va="center", weight="bold")
    axes.text(len(parts) - 0.3, 0, "trained by", va="center", weight="bold")
    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in kinds.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        frameon=False,
    )
    axes.set(xlim=(-0.6, len(parts) - 0.4), ylim=(-len(terms) - 0.6, top))
    return axes


def _groups(terms: Sequence[Ratio]) -> list[tuple[str, ...]]:
    """The groups of a tree: the blocks of several parts in dependencies.

    The windows of a Markov assumption cross each other and are no groups; the other source,
    if nothing is assumed of it, still has the groups.
    """

    def uncrossed(source: str) -> list[tuple[str, ...]]:
        sides = [side for term in terms for side in (term.numerator, term.denominator)]
        densities = [d for side in sides if len(side) > 1 for d in side if d.source == source]
        blocks = {frozenset(density.parts): density.parts for density in densities}
        return [
            parts
            for block, parts in blocks.items()
            if len(parts) > 1 and all(not block & b or block <= b or b <= block for b in blocks)
        ]

    return max(uncrossed("p"), uncrossed("q"), key=len)


def _draw_tree(axes: Axes, column: dict[str, int], groups: list[tuple[str, ...]]) -> float:
    """Draws the parts' names and the groups above them; returns the height."""
    ends: dict[tuple[str, ...], tuple[float, float]] = {}
    y = 0.4
    for name, x in column.items():
        axes.text(x, 0, name, ha="center", va="center", weight="bold")
        ends[name,] = (x, y)
    for group in sorted([*groups, tuple(column)], key=len):
        units = [unit for unit in ends if set(unit) <= set(group)]
        xs, ys = zip(*(ends.pop(unit) for unit in units), strict=True)
        y = max(ys) + 0.45
        axes.vlines(xs, ys, y, color="0.4", lw=1)
        axes.hlines(y, min(xs), max(xs), color="0.4", lw=1)
        ends[group] = ((min(xs) + max(xs)) / 2, y)
    return y + 0.2
