"""Sequences of which most were cut: days of hourly temperatures at a New York airport.

A generator makes whole days, in eight steps of three hours. A few of its training days are
complete, all others were cut after 6, 12 or 18 hours. A GAN can use only the complete ones; an
autoregressive, a Markov and a causal factorisation use everything (Stoller et al. (2020),
Section A.3.2, Eq. 8 and 9).

    train     one model
    sweep     all models, for several numbers of complete days and several seeds
    plot      the table and the figures of a sweep
    describe  the data and the models: what real days score, and how far back a step looks
    speed     how long an update of each model takes
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from sklearn.linear_model import Ridge
from sklearn.model_selection import StratifiedKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor, nn

from factordisc import (
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Observations,
    Partition,
    markov,
)
from support import figures, processes
from support.intervals import mean_interval
from support.recurrent import CausalNetwork, MarkovGenerator, RecurrentGenerator, framed
from support.results import environment, read_rows, table, write_json
from support.series import HOURS, airport_days, cut, split_weeks
from support.sweeps import sweep as run_all
from support.training import Machine, Run, Training, uniform_noise

Model = Literal["gan", "autoregressive", "markov", "causal"]
MODELS: tuple[Model, ...] = ("gan", "autoregressive", "markov", "causal")
Generator = Literal["recurrent", "markov"]
VARIANTS: list[tuple[Model, Generator]] = [
    *((model, "recurrent") for model in MODELS),
    ("markov", "markov"),
]
STEPS = 8  # of three hours: 24 would be 70 terms, whose neighbours are nearly equal
BLOCK = HOURS // STEPS
CUTS = (2, 4, 6)  # after 6, 12 and 18 hours
LATE = CUTS[-1] * BLOCK  # the first hour that no cut day shows
NOISE = 8  # per step, uniform in [-1, 1]
CENTRE, SCALE = 12.0, 10.0  # °C: about the mean and the deviation of the year
DRAWS = 5  # generated samples, of the size of the test set, of a scoring
PARTITION = Partition.steps(STEPS, names=[f"{hour:02}h" for hour in range(0, HOURS, BLOCK)])
COLOURS = {  # of Okabe and Ito, as in the other figures
    "gan": "#D55E00",
    "autoregressive": "#0072B2",
    "markov": "#56B4E9",
    "causal": "#009E73",
}
METRICS = {
    "c2st": "two-sample test, whole days (accuracy)",
    "c2st_late": f"two-sample test, hours {LATE} to {HOURS} (accuracy)",
    "covariance": "error of the covariance (relative)",
    "wasserstein": "Wasserstein distance per hour (°C)",
}


@dataclass(frozen=True)
class Settings:
    """One training run."""

    model: Model = "causal"
    generator: Generator = "recurrent"
    """A GRU, or a chain whose steps depend on the one before only: then the Markov model may
    assume that of the generated days too."""
    complete: int = 20
    """The number n of complete days; all others are cut."""
    seed: int = 0
    updates: int = 800
    """Updates of the generator."""
    batch_size: int = 32
    learning_rate: float = 1e-3
    """Of Adam, with betas (0.5, 0.999)."""
    discriminator_updates: int = 2
    """Updates of the discriminators for each of the generator."""
    width: int = 32
    """The features of the discriminators' layers; the generator has twice as many."""
    average: float = 0.99
    """Score an exponential moving average of the generator's weights with this decay (0: none)."""
    scorings: int = 4
    """How often the generator is scored, evenly over the updates."""


SMOKE = {"updates": 4, "scorings": 1, "batch_size": 16}


def to_steps(temperatures: Tensor) -> Tensor:
    """Makes steps (N, 8, 3) of temperatures (N, 24) in °C: changes from hour to hour, in °C.

    The first hour of the first step is its temperature, in units of 10 °C from 12 °C. A one-to-one
    map, of the beginning of a day too, so that it leaves density ratios alone. Of temperatures,
    every step would tell the next almost entirely (a correlation of 0.99): both dependencies of a
    step would be vast, and their difference lost in their errors.
    """
    first = (temperatures[:, :1] - CENTRE) / SCALE
    changes = temperatures.diff(dim=1)
    return torch.cat([first, changes], 1).unflatten(1, (STEPS, BLOCK))


def to_celsius(steps: Tensor) -> Tensor:
    """Makes temperatures (N, 24) in °C of steps (N, 8, 3)."""
    first, changes = steps.flatten(1).split([1, HOURS - 1], 1)
    return torch.cat([first * SCALE + CENTRE, changes], 1).cumsum(1)


def with_levels(steps: Tensor, first: int) -> Tensor:
    """Appends to steps (N, k, 3) the temperature of every hour in units of 10 °C: (N, k, 6).

    Counted from 12 °C if the first of the steps is the first of the day, else from the unknown
    temperature before it.
    """
    changes = steps.flatten(1) / SCALE
    if first == 0:
        changes = torch.cat([steps[:, 0, :1], changes[:, 1:]], 1)
    return torch.cat([steps, changes.cumsum(1).unflatten(1, (-1, BLOCK))], 2)


def make_factorisation(model: Model, generator: Generator) -> Factorisation:
    """The models differ in nothing but their factorisation."""
    names = PARTITION.names
    if model == "gan":
        return Factorisation.joint(names)
    if model == "causal":
        return Factorisation.causal(names, prefixes=CUTS)
    if model == "autoregressive":
        return Factorisation.autoregressive(names)
    sources = ("p", "q") if generator == "markov" else ("p",)
    return Factorisation.autoregressive(names, [markov(1, under=source) for source in sources])


def make_discriminator(factorisation: Factorisation, width: int) -> FactorisedDiscriminator:
    """One causal network for each kind of term: p over q, dependency under p, and under q.

    A term of p over q counts the logits of all its steps; a dependency that of its last step,
    which sees the others. Terms of one kind are laid out alike and evaluated in one call.
    """
    kinds = {
        term.name: "".join(side[0].source for side in (term.numerator, term.denominator))
        for term in factorisation.terms
    }
    lengths: dict[str, int] = {}
    for term in factorisation.terms:
        lengths[kinds[term.name]] = max(lengths.get(kinds[term.name], 0), len(term.parts))
    shared = {
        kind: CausalNetwork(2 * BLOCK + STEPS, length, width) for kind, length in lengths.items()
    }

    def layout(name: str, first: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        kind = kinds[name]
        lay_out = partial(
            framed, first=first, total=STEPS, length=lengths[kind], last=kind != "pq"
        )
        return lambda steps: lay_out(with_levels(steps, first))

    return FactorisedDiscriminator(
        PARTITION,
        factorisation,
        {name: shared[kind] for name, kind in kinds.items()},
        logit=lambda logits: logits.sum(1),
        inputs={
            term.name: layout(term.name, PARTITION.names.index(term.parts[0]))
            for term in factorisation.terms
        },
    )


def make_generator(kind: Generator, width: int) -> RecurrentGenerator | MarkovGenerator:
    """Noise to steps (N, 8, 3)."""
    network = RecurrentGenerator if kind == "recurrent" else MarkovGenerator
    return network(STEPS, BLOCK, NOISE, 2 * width)


def load_observations(settings: Settings, days: Tensor, machine: Machine) -> ObservationLoader:
    """The n complete days, and for all models but the GAN the days that were cut."""
    rng = torch.Generator().manual_seed(settings.seed)
    observed = cut(to_steps(days), settings.complete, CUTS, rng)
    datasets: dict[Any, Any] = {
        PARTITION.names[:length]: sequences
        for length, sequences in observed.items()
        if settings.model != "gan" or length == STEPS
    }
    with warnings.catch_warnings():
        # Fewer complete days than a batch are what this experiment is about.
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        # Pooled: a complete day, or one that was cut later, is an example of its beginning too.
        return ObservationLoader(
            datasets,
            PARTITION,
            settings.batch_size,
            rng=rng,
            workers=machine.workers,
            pin_memory=machine.device.startswith("cuda"),
        )


class Scores:
    """How far days are from the days of the test weeks; for a generator, over several draws.

    Args:
        real: Temperatures of real days, with shape (M, 24), in °C.
    """

    def __init__(self, real: Tensor) -> None:
        self.real = real.numpy()

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """Scores a generator on noise that is the same in every call."""
        days = generate(generator, DRAWS * len(self.real)).numpy()
        return self.of(days)

    def of(self, days: np.ndarray) -> dict[str, float]:
        """Scores days (D, 24), in °C.

        Returns:
            "c2st" and "c2st_late": the accuracy with which a support vector machine tells real
            from generated days it was not trained on, by their temperatures and hourly changes,
            in [0, 1]; 0.5 is best. "covariance": the Frobenius norm of the difference of both
            covariances over that of the real one; 0 is best. "wasserstein": the distance of the
            distributions of an hour's temperature, in °C, mean over hours; 0 is best.
        """
        pieces = np.array_split(days, -(-len(days) // len(self.real)))
        real, generated = (np.cov(x, rowvar=False) for x in (self.real, days))
        distances = map(wasserstein_distance, self.real.T, days.T)
        return {
            "c2st": np.mean([two_sample_accuracy(self.real, piece) for piece in pieces]).item(),
            "c2st_late": np.mean(
                [two_sample_accuracy(self.real[:, LATE:], piece[:, LATE:]) for piece in pieces]
            ).item(),
            "covariance": (np.linalg.norm(generated - real) / np.linalg.norm(real)).item(),
            "wasserstein": np.mean(list(distances)).item(),
        }


def two_sample_accuracy(one: np.ndarray, other: np.ndarray) -> float:
    """Returns how often a classifier tells two samples apart that it was not trained on.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz and Oquab, 2017).

    Args:
        one: Series, with shape (M, T).
        other: Series, with shape (N, T).

    Returns:
        The accuracy of 5-fold cross-validation, each sample weighing the same: 0.5 if they
        cannot be told apart.
    """
    features = np.concatenate([one, other])
    features = np.concatenate([features, np.diff(features, axis=1)], axis=1)
    labels = np.repeat([0, 1], [len(one), len(other)])
    classifier = make_pipeline(StandardScaler(), SVC(class_weight="balanced"))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_score(classifier, features, labels, cv=folds, scoring="balanced_accuracy")
    return scores.mean().item()


@torch.no_grad()
def generate(generator: nn.Module, number: int) -> Tensor:
    """Draws days, always from the same noise, with shape (number, 24), in °C, on the CPU."""
    device = next(generator.parameters()).device
    rng = torch.Generator().manual_seed(1)
    noise = uniform_noise(number, NOISE * (STEPS + 1), rng, device)
    return to_celsius(generator(noise)).cpu()


def draw_days(generator: nn.Module) -> np.ndarray:
    """24 days as rows of a picture, black at -15 and white at 40 °C."""
    return ((generate(generator, 24) + 15) / 55).clamp(0, 1).numpy()


def make_training(settings: Settings, days: Tensor, machine: Machine) -> Training:
    """Puts the networks, the data and the optimisers of a run together."""
    torch.manual_seed(settings.seed)
    generator = make_generator(settings.generator, settings.width)
    factorisation = make_factorisation(settings.model, settings.generator)
    device = torch.device(machine.device)

    def make_fake(generator: nn.Module, real: Observations, rng: torch.Generator) -> Tensor:
        return generator(uniform_noise(settings.batch_size, NOISE * (STEPS + 1), rng, device))

    return Training(
        generator,
        make_discriminator(factorisation, settings.width),
        load_observations(settings, days, machine),
        make_fake,
        {"lr": settings.learning_rate, "betas": (0.5, 0.999)},
        settings.discriminator_updates,
        settings.seed,
        machine,
        settings.average,
    )


def train(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/sequences/run"),
    resume: bool = False,
    smoke: bool = False,
) -> dict[str, Any] | None:
    """Trains one model. Ctrl-C and SIGTERM save first; `--resume` goes on exactly.

    Args:
        settings: What is trained.
        machine: On what.
        out: The folder for checkpoint.pt, result.json, days.png and TensorBoard's events.
        resume: Go on from the folder's checkpoint, if there is one.
        smoke: Do 4 updates only, to see that everything works.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    processes.join(torch.device(machine.device))
    training_days, test_days = split_weeks(airport_days())
    training = make_training(settings, training_days, machine)
    title = f"{settings.model}, {settings.complete} complete days"
    run = Run(training, out, asdict(settings), Scores(test_days), draw_days, title)
    if run.checkpoint.exists() and not resume:
        raise SystemExit(f"{out} holds a run already. Pass --resume, or another --out.")
    run.resume()
    if not run.train(settings.updates, settings.scorings):
        print(f"Stopped and saved at update {training.update}. Go on with --resume.")
        return None
    days = generate(training.result.eval(), 24)
    row = {
        **asdict(settings),
        **training.history[-1],
        **training.summary(),
        "days": [[round(degrees, 2) for degrees in day] for day in days.tolist()],
        **environment(),
    }
    write_json(out / "result.json", row)
    draw_days_of([row], test_days, out / "days.png")
    return row


def sweep(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/sequences"),
    models: tuple[Model, ...] = MODELS,
    generators: tuple[Generator, ...] = ("recurrent",),
    numbers: tuple[int, ...] = (20, 50, 100),
    seeds: tuple[int, ...] = (0, 1, 2),
    processes: int = 1,
    smoke: bool = False,
) -> None:
    """Trains a grid; finished runs are skipped and interrupted ones go on.

    Started twice, on one machine or on several that share the folder, it trains no run twice.

    Args:
        settings: What all runs share.
        machine: On what each run is trained.
        out: The folder for one folder per run; each has a log.txt.
        models: The models.
        generators: The generators.
        numbers: The numbers n of complete days.
        seeds: The seeds.
        processes: How many runs to train at a time.
        smoke: Do 4 updates of each only.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    grid = [
        replace(settings, model=model, generator=generator, complete=n, seed=seed)
        for seed, n, generator, model in product(seeds, numbers, generators, models)
    ]
    runs = {
        out / f"{run.generator}-n{run.complete}-{run.model}-seed{run.seed}": run for run in grid
    }
    run_all(__file__, runs, machine, processes, {"smoke": smoke}, finish=lambda: plot(out))


def plot(out: Path = Path("out/sequences")) -> None:
    """Prints the table of a sweep and draws its figures.

    Args:
        out: The folder of the sweep. results.json, scores.png and days.png are written there.
    """
    rows = read_rows(sorted(out.glob("*/result.json")))
    if not rows:
        raise SystemExit(f"{out} has no finished runs.")
    write_json(out / "results.json", rows)
    training_days, test_days = split_weeks(airport_days())
    floor = Scores(test_days).of(training_days.numpy())
    draw_scores(rows, floor, out / "scores.png")
    fewest = min(row["complete"] for row in rows)
    first: dict[str, Mapping[str, Any]] = {}  # the first seed of each
    for row in sorted(rows, key=lambda r: (_place(r), r["seed"])):
        if row["complete"] == fewest:
            first.setdefault(label(row), row)
    draw_days_of(list(first.values()), test_days, out / "days.png")
    print(table(summarised(rows), dict.fromkeys(("model", "n", *METRICS), "")))


def label(row: Mapping[str, Any]) -> str:
    """Returns what a run is called in tables and figures."""
    return row["model"] + (", Markov generator" if row["generator"] == "markov" else "")


def _place(row: Mapping[str, Any]) -> tuple[bool, int]:
    """Returns where a run's model stands in tables and figures."""
    return row["generator"] != "recurrent", MODELS.index(row["model"])


def summarised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns a row per model and n: mean and 95% interval over seeds of every metric."""
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["complete"], _place(r))):
        cells.setdefault((row["complete"], label(row)), []).append(row)
    summary = []
    for (number, name), runs in cells.items():
        line = {"model": name, "n": str(number)}
        for key in METRICS:
            mean, half = mean_interval([run[key] for run in runs])
            line[key] = f"{mean:.3f} ± {half:.3f}"
        summary.append(line)
    return summary


def draw_scores(rows: Sequence[Mapping[str, Any]], floor: Mapping[str, float], path: Path) -> None:
    """Draws every metric against the number of complete days: seeds, mean and 95% interval."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=_place):
        series.setdefault(label(row), []).append(row)
    ticks = sorted({row["complete"] for row in rows})
    for axis, (key, title) in zip(axes.flat, METRICS.items(), strict=True):
        for i, (name, runs) in enumerate(series.items()):
            aside = 1.05 ** (i - (len(series) - 1) / 2)  # beside each other
            style = {"color": COLOURS[runs[0]["model"]]}
            style["linestyle"] = "-" if runs[0]["generator"] == "recurrent" else "--"
            numbers = sorted({run["complete"] for run in runs})
            points = [mean_interval([r[key] for r in runs if r["complete"] == n]) for n in numbers]
            means, halves = zip(*points, strict=True)
            places = [n * aside for n in numbers]
            axis.errorbar(places, means, halves, marker="o", ms=6, capsize=3, label=name, **style)
            places = [run["complete"] * aside * 1.015 for run in runs]
            seeds = [run[key] for run in runs]
            axis.plot(places, seeds, "k.", ms=4, label=None if i else "a single run")
        axis.axhline(floor[key], color="grey", ls=":", label="real days of the training weeks")
        # by the runs: of three seeds, an interval may be wider than what a score can be
        values = [floor[key], *(row[key] for row in rows)]
        margin = 0.15 * (max(values) - min(values))
        axis.set_ylim(max(0, min(values) - margin), max(values) + margin)
        axis.set(xscale="log", xlabel="complete days n", title=title, ylabel="lower is better")
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figures.save(figure, path)


def draw_days_of(rows: Sequence[Mapping[str, Any]], real: Tensor, path: Path) -> None:
    """Draws 24 real days and 24 of every run, as lines over the hours."""
    spread = torch.linspace(0, len(real) - 1, 24).long()  # from all the year
    panels = {"real, test weeks": real[spread].tolist()}
    panels |= {f"{label(row)}, n = {row['complete']}": row["days"] for row in rows}
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.6 * across, 3 * down), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False)
    for axis, (title, days) in zip(axes.flat, panels.items(), strict=False):
        for i, day in enumerate(days):
            axis.plot(range(HOURS), day, lw=0.8, color=colormaps["viridis"](i / len(days)))
        axis.axvline(LATE - 0.5, color="grey", ls=":", lw=1)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="hour of the day", xticks=range(0, HOURS, 6))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("temperature (°C)")
    figures.save(figure, path)


def describe() -> None:
    """Prints what the models are and use, what real days score, and how far back a step looks."""
    for model, generator in VARIANTS:
        factorisation = make_factorisation(model, generator)
        print(f"{model}, {generator} generator\n{factorisation}\n")
    training_days, test_days = split_weeks(airport_days())
    print(f"{len(training_days)} days of the training weeks, {len(test_days)} of the test weeks")
    scores = Scores(test_days).of(training_days.numpy())
    print("real days of the training weeks:", {k: round(v, 3) for k, v in scores.items()})
    changes = to_steps(torch.cat([training_days, test_days])).flatten(1).numpy()
    print("\nRMS error (°C) of a linear forecast of the change over a step, cross-validated,")
    print("from none of the steps before, the last one, the last two, and all")
    for step in range(1, STEPS):
        target = changes[:, step * BLOCK : (step + 1) * BLOCK].sum(1)
        errors = [target.std()]
        for back in (1, 2, step):
            past = changes[:, max(0, step - back) * BLOCK : step * BLOCK]
            forecast = cross_val_predict(Ridge(), past, target, cv=10)
            errors.append(np.sqrt(np.mean((forecast - target) ** 2)))
        print(f"{PARTITION.names[step]}  " + "  ".join(f"{error:.2f}" for error in errors))


def speed(settings: Settings = Settings(), timed: int = 20, repeats: int = 5) -> None:
    """Prints how long an update of each model takes on the processor, with one thread.

    Args:
        settings: What all models share.
        timed: How many updates are timed together.
        repeats: How often; the least counts, since other processes only slow down.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    days, _ = split_weeks(airport_days())
    for model, generator in VARIANTS:
        run = replace(settings, model=model, generator=generator)
        training = make_training(run, days, Machine("cpu"))
        training.step()
        milliseconds = []
        for _ in range(repeats):
            started = time.process_time()
            for _ in range(timed):
                training.step()
            milliseconds.append(1000 * (time.process_time() - started) / timed)
        print(f"{label(asdict(run))}: {min(milliseconds):.1f} ms", flush=True)
    torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"train": train, "sweep": sweep, "plot": plot, "describe": describe, "speed": speed},
        args=arguments,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


if __name__ == "__main__":
    main()
