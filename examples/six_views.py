"""Six views, rarely together: digits in six feature sets, of which few objects have all.

A generator draws all six views of an object at once. Few real objects are complete, some are seen
in one pair of views, all are seen in single views. A GAN can use the complete ones only; the flat
form of FactorGAN also the single views; the hierarchical form the pairs of views, too, since a
group of two views has dependency terms of its own (Stoller et al. (2020), Eq. 7).

    train     one model
    sweep     all models over the number of complete objects
    plot      the figure and the table of a sweep
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from factordisc import (
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Observations,
    Partition,
)
from support import figures, processes
from support.intervals import mean_interval
from support.results import environment, read_rows, table, write_json
from support.sweeps import sweep as run_all
from support.training import Machine, Run, Training, uniform_noise
from support.views import Objects, ViewScores, load_objects

Model = Literal["gan", "flat", "hierarchical"]
MODELS: tuple[Model, ...] = ("gan", "flat", "hierarchical")
GROUPS = {"shape": ("fou", "zer"), "profile": ("fac", "mor"), "pixels": ("kar", "pix")}
NOISE = 64  # uniform in [-1, 1]
GENERATED = 2000  # objects per scoring


@dataclass(frozen=True)
class Settings:
    """One training run."""

    model: Model = "hierarchical"
    complete: int = 50
    """The number n of training objects that are seen in all views together."""
    pairs: int = 300
    """Further training objects per group that are seen in the two views of the group together;
    others for every group."""
    seed: int = 0
    """Of the choice of objects, the networks and the training. The test objects are always the
    same."""
    components: int = 5
    """Whitened principal components per view."""
    budget: int = 100_000
    """Parameters of all networks of a discriminator together, at most: their common width is the
    largest that this allows, so that no form has an advantage in size."""
    slope: float = 3.0
    """The steepest that a term's log ratio can be, in nats per standard deviation of a component:
    spectral normalisation bounds a network to 1, and its output is multiplied by this."""
    updates: int = 1000
    """Updates of the generator."""
    batch_size: int = 128
    learning_rate: float = 2e-3
    """Of the discriminators' Adam, with betas (0.5, 0.999)."""
    generator_learning_rate: float = 7e-4
    """Of the generator's. It is the smaller (two time scales, Heusel et al. (2017)): otherwise the
    marginal discriminators do not keep up, and the dependency terms alone drive the generator."""
    discriminator_updates: int = 2
    """Updates of the discriminators for each of the generator."""
    average: float = 0.99
    """Score an exponential moving average of the generator's weights with this decay (0: none)."""
    scorings: int = 2
    """How often the scores are measured, evenly over the updates."""


SMOKE = {"updates": 10, "scorings": 1}


def make_factorisation(model: Model) -> Factorisation:
    """The three models differ in nothing but this, and in what data it lets them use."""
    views = [view for group in GROUPS.values() for view in group]
    if model == "gan":
        return Factorisation.joint(views)
    if model == "flat":
        return Factorisation.flat(views)
    return Factorisation.hierarchical(GROUPS)


def make_generator(outputs: int, width: int = 256) -> nn.Module:
    """Noise (N, 64) to the components of all views (N, outputs), unbounded."""
    return nn.Sequential(
        nn.Linear(NOISE, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def make_network(inputs: int, width: int) -> nn.Module:
    """An MLP with spectral normalisation on every layer, as all discriminators of the paper."""
    return nn.Sequential(
        spectral_norm(nn.Linear(inputs, width)),
        nn.LeakyReLU(),
        spectral_norm(nn.Linear(width, width)),
        nn.LeakyReLU(),
        spectral_norm(nn.Linear(width, 1)),
    )


def matched_width(inputs: Sequence[int], budget: int) -> int:
    """Returns the largest width at which networks with these inputs keep within a budget."""
    size = sum(inputs)
    # inputs * w + w, w * w + w, w + 1 in each network: a quadratic in w
    a, b, c = len(inputs), size + 3 * len(inputs), len(inputs) - budget
    return int((-b + (b * b - 4 * a * c) ** 0.5) / (2 * a))


def make_discriminator(settings: Settings, sizes: Mapping[str, int]) -> FactorisedDiscriminator:
    """Makes one network per term of the model's factorisation, all of one width."""
    factorisation = make_factorisation(settings.model)
    inputs = {t.name: sum(sizes[view] for view in t.parts) for t in factorisation.terms}
    width = matched_width(list(inputs.values()), settings.budget)
    networks = {name: make_network(size, width) for name, size in inputs.items()}
    return FactorisedDiscriminator(
        Partition(sizes),
        factorisation,
        networks,
        logit=lambda output: settings.slope * output.squeeze(1),
    )


def load_observations(
    settings: Settings, train: Objects, partition: Partition, machine: Machine
) -> ObservationLoader:
    """What of the training objects a model can use: complete, in pairs of views, in single views.

    Raises:
        SystemExit: If there are not enough training objects for the complete ones and the pairs.
    """
    needed = settings.complete + len(GROUPS) * settings.pairs
    if needed > len(train.labels):
        raise SystemExit(
            f"{settings.complete} complete objects and {settings.pairs} pairs in each of "
            f"{len(GROUPS)} groups need {needed} training objects, but there are "
            f"{len(train.labels)}. Lower --complete or --pairs."
        )
    rng = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(train.labels), generator=rng)
    complete, *apart = order[:needed].split([settings.complete, *[settings.pairs] * len(GROUPS)])
    datasets: dict[Any, Tensor] = {"joint": train.values[complete]}
    if settings.model == "hierarchical":
        for views, others in zip(GROUPS.values(), apart, strict=True):
            seen = train.values[torch.cat([complete, others])]
            datasets[views] = partition.take(seen, views)
    if settings.model != "gan":
        datasets |= {view: partition.take(train.values, view) for view in partition.names}
    with warnings.catch_warnings():
        # Fewer complete objects than a batch are what this experiment is about.
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        # The sets of fewer views contain those of more already: no pooling.
        return ObservationLoader(
            datasets,
            partition,
            settings.batch_size,
            pool=False,
            rng=rng,
            workers=machine.workers,
            pin_memory=machine.device.startswith("cuda"),
        )


@torch.no_grad()
def generate(generator: nn.Module, number: int) -> Tensor:
    """Draws objects, always from the same noise, with shape (number, D)."""
    device = next(generator.parameters()).device
    noise = uniform_noise(number, NOISE, torch.Generator().manual_seed(1), device)
    return generator(noise)


def make_training(
    settings: Settings, train: Objects, sizes: Mapping[str, int], machine: Machine
) -> Training:
    """Puts the networks, the data and the optimisers of a run together."""
    torch.manual_seed(settings.seed)
    generator = make_generator(sum(sizes.values()))
    discriminator = make_discriminator(settings, sizes)
    device = torch.device(machine.device)

    def make_fake(generator: nn.Module, real: Observations, rng: torch.Generator) -> Tensor:
        return generator(uniform_noise(settings.batch_size, NOISE, rng, device))

    return Training(
        generator,
        discriminator,
        load_observations(settings, train, discriminator.partition, machine),
        make_fake,
        {"lr": settings.learning_rate, "betas": (0.5, 0.999)},
        settings.discriminator_updates,
        settings.seed,
        machine,
        settings.average,
        generator_adam={"lr": settings.generator_learning_rate},
    )


def train(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/six_views/run"),
    data: Path | None = None,
    resume: bool = False,
    smoke: bool = False,
) -> dict[str, Any] | None:
    """Trains one model. Ctrl-C and SIGTERM save first; `--resume` goes on exactly.

    Args:
        settings: What is trained.
        machine: On what.
        out: The folder for checkpoint.pt, result.json, samples.png and TensorBoard's events.
        data: An .npz file with the six views and "y". By default they are downloaded.
        resume: Go on from the folder's checkpoint, if there is one.
        smoke: Do 10 updates only, to see that everything works.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    processes.join(torch.device(machine.device))
    objects, test, projection = load_objects(data, settings.components)
    scores = ViewScores(objects, test, projection.sizes, GROUPS)
    training = make_training(settings, objects, projection.sizes, machine)

    def draw(generator: nn.Module) -> Any:
        return figures.grid(projection.images(generate(generator, 24)))

    title = f"{settings.model}, {settings.complete} complete"
    run = Run(
        training,
        out,
        asdict(settings),
        lambda generator: scores(generate(generator, GENERATED)),
        draw,
        title,
    )
    if run.checkpoint.exists() and not resume:
        raise SystemExit(f"{out} holds a run already. Pass --resume, or another --out.")
    run.resume()
    if not run.train(settings.updates, settings.scorings):
        print(f"Stopped and saved at update {training.update}. Go on with --resume.")
        return None
    row = {
        **asdict(settings),
        **training.history[-1],
        "real": {**scores(objects.values), **scores.real()},
        "accuracies": scores.accuracies,
        "explained": projection.kept,
        **training.summary(),
        **environment(),
    }
    write_json(out / "result.json", row)
    images = projection.images(generate(training.result.eval(), 48))
    figures.draw_samples({f"{title}: the view of pixels": images}, out / "samples.png")
    return row


def sweep(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/six_views"),
    data: Path | None = None,
    models: tuple[Model, ...] = MODELS,
    numbers: tuple[int, ...] = (20, 50, 100, 300),
    seeds: tuple[int, ...] = (0, 1, 2),
    processes: int = 1,
    smoke: bool = False,
) -> None:
    """Trains the grid of the figure; finished runs are skipped and interrupted ones go on.

    Args:
        settings: What all runs share.
        machine: On what each run is trained.
        out: The folder for one folder per run; each has a log.txt.
        data: An .npz file with the six views and "y". By default they are downloaded.
        models: The models.
        numbers: The numbers n of complete objects.
        seeds: The seeds.
        processes: How many runs to train at a time.
        smoke: Do 10 updates of each only.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    runs = {
        out / f"n{n}-{model}-seed{seed}": replace(settings, model=model, complete=n, seed=seed)
        for seed, n, model in product(seeds, numbers, models)
    }
    options = {"data": data, "smoke": smoke}
    run_all(__file__, runs, machine, processes, options, finish=lambda: plot(out))


def plot(out: Path = Path("out/six_views")) -> None:
    """Draws the figure from the finished runs of a sweep, and prints means and 95% intervals.

    Args:
        out: The folder of the sweep. figure.png and results.json are written there.
    """
    rows = read_rows(sorted(out.glob("*/result.json")))
    if not rows:
        raise SystemExit(f"{out} has no finished runs.")
    write_json(out / "results.json", rows)
    draw_scores(rows, out / "figure.png")
    print(table(summary(rows), dict.fromkeys(["model", "complete", "runs", *PANELS], "")))


# What the figure shows: single views above, their dependence below.
PANELS = {
    "c2st_views": "C2ST accuracy, single views (0.5 is best)",
    "frechet_views": "Fréchet distance, single views (0 is best)",
    "label_distance": "total variation of labels (0 is best)",
    "c2st_all": "C2ST accuracy, all views (0.5 is best)",
    "frechet_all": "Fréchet distance, all views (0 is best)",
    "agreement_within": "label agreement within a group",
    "agreement_across": "label agreement across groups",
}
LABELS = {
    "gan": "GAN: complete objects only",
    "flat": "FactorGAN, flat: and single views",
    "hierarchical": "FactorGAN, hierarchical: and pairs of views",
}
COLOURS = {"gan": "#D55E00", "flat": "#56B4E9", "hierarchical": "#0072B2"}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per model and n: means over seeds and their 95% intervals, as text."""
    lines = []
    for model, n in product(MODELS, sorted({row["complete"] for row in rows})):
        runs = [row for row in rows if (row["model"], row["complete"]) == (model, n)]
        if runs:
            scores = {key: mean_interval([run[key] for run in runs]) for key in PANELS}
            cells = {key: f"{mean:.3f} ± {half:.3f}" for key, (mean, half) in scores.items()}
            lines.append({"model": model, "complete": n, "runs": len(runs), **cells})
    return lines


def draw_scores(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws every score against the number of complete objects: means and 95% intervals."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    spots = [axes[0, 0], axes[0, 1], axes[0, 2], *axes[1]]
    for axis, (key, title) in zip(spots, PANELS.items(), strict=True):
        for i, model in enumerate(MODELS):
            chosen = [row for row in rows if row["model"] == model]
            numbers = sorted({row["complete"] for row in chosen})
            points = [
                mean_interval([r[key] for r in chosen if r["complete"] == n]) for n in numbers
            ]
            means, halves = zip(*points, strict=True) if points else ((), ())
            axis.errorbar(
                [n * 1.04 ** (i - 1) for n in numbers],  # bars beside each other
                means,
                halves,
                fmt="o-",
                ms=4,
                capsize=3,
                color=COLOURS[model],
                label=LABELS[model],
            )
        real = np.mean([row["real"][key] for row in rows])
        axis.axhline(real, color="0.4", ls="--", lw=1, label="real objects")
        axis.set(xscale="log", title=title, xlabel="complete objects n")
        axis.set_yscale("log" if key.startswith("frechet") else "linear")
        ticks = sorted({row["complete"] for row in rows})
        axis.set_xticks(ticks, map(str, ticks))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0, 3].axis("off")
    axes[0, 3].legend(*spots[0].get_legend_handles_labels(), loc="center")
    figures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"train": train, "sweep": sweep, "plot": plot},
        args=arguments,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


if __name__ == "__main__":
    main()
