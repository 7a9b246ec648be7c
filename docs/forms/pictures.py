"""The examples of the forms' pages, and their pictures: python docs/forms/pictures.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from factordisc import Density, Factorisation, Ratio, independent, markov, shared

DAYS = ["mon", "tue", "wed", "thu"]
CITIES = ["berlin", "london", "tokyo"]


def a_sum_of_ones_own() -> Factorisation:
    """The conditional form of a scene and its map, and a check of what it assumes."""
    form = Factorisation.flat(["scene", "map"], assuming=[shared("scene")])
    check = Ratio("check", 0, [Density("p", ("scene",))], [Density("q", ("scene",))])
    return Factorisation(form.parts, [*form.terms, check], form.assuming)


# By page: the factorisation whose equation and picture it shows.
FORMS = {
    "joint": Factorisation.joint(["top", "bottom"]),
    "flat": Factorisation.flat(["top", "bottom"]),
    "remainder": Factorisation.remainder(["top", "bottom"]),
    "conditional": Factorisation.flat(["scene", "map"], assuming=[shared("scene")]),
    "independent": Factorisation.flat(
        ["voice", "drums", "bass"],
        assuming=[independent("voice", ("drums", "bass"), under="p")],
    ),
    "known_conditional": Factorisation.flat(
        ["mix", "band", "voice"], assuming=[shared("mix", given=["band", "voice"])]
    ),
    "hierarchical": Factorisation.hierarchical(
        {"left": ["eye_l", "brow_l"], "right": ["eye_r", "brow_r"]}
    ),
    "autoregressive": Factorisation.autoregressive(DAYS),
    "markov": Factorisation.autoregressive(
        DAYS, assuming=[markov(order=1, under="p"), markov(order=1, under="q")]
    ),
    "causal": Factorisation.causal(DAYS, prefixes=[2, 3]),
    "patterns": Factorisation.from_patterns(
        CITIES,
        ["tokyo", ("berlin", "london"), ("london", "tokyo")],
        assuming=[independent("berlin", "tokyo", given="london", under="p")],
    ),
    "own_terms": a_sum_of_ones_own(),
}


def main() -> None:
    """Draws every form into docs/images/forms/."""
    matplotlib.use("agg")
    folder = Path(__file__).parent.parent / "images" / "forms"
    for name, form in FORMS.items():
        form.draw().figure.savefig(folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
