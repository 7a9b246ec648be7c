"""Experiment 2, pairs of images: edges and shoes, street scenes and maps (paper, Section 4.2).

A generator draws both images of a pair. Few of its training samples are pairs; all others are
single images of either kind. A GAN can use only the pairs, FactorGAN uses everything.

    train     one model; by default the paper's recipe
    evaluate  the least-squares distance of a checkpoint
    sweep     the grid of Figure 2, several runs at a time
    plot      Figure 2, with the published values beside ours, and samples of all models
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from factordisc import (
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Observations,
    Partition,
)
from support import figures, processes
from support.images import PARTS, Name, PairedImages, UnitImages, load_pairs, subset
from support.intervals import confidence_interval
from support.least_squares import LeastSquaresDistance
from support.networks import NOISE, bounded, make_critic, make_generator
from support.pair_figures import LABELS, draw_figure2, draw_pairs, pictures
from support.results import environment, read_rows, table, write_json, write_tensors
from support.sweeps import sweep as run_all
from support.training import Machine, Run, Training, load_checkpoint, uniform_noise

Model = Literal[
    "gan", "gan-big", "factorgan", "factorgan-bounded", "factorgan-anchored", "factorgan-remainder"
]
MODELS: tuple[Model, ...] = ("gan", "gan-big", "factorgan")  # of the paper
SIZE = 64
SHOWN = 12  # pairs in a figure of samples
COLUMNS = {
    "data": "",
    "model": "",
    "paired": "",
    "seed": "",
    "updates": "",
    "ls": ".3f",
    "ls_interval": ".3f",
    "seconds": ".0f",
}


@dataclass(frozen=True)
class Settings:
    """One training run. The defaults are the paper's recipe."""

    model: Model = "factorgan"
    """gan-big has twice the filters in every layer of its discriminator, which makes it as large
    as the four of factorgan together. Three are not in the paper: factorgan-bounded keeps the
    outputs of both dependencies within log n nats, factorgan-anchored shows them the generator's
    samples too, and factorgan-remainder has one network in place of both, given the marginals."""
    data: Name = "edges2shoes"
    paired: int | Literal["all"] = 100
    """The number n of complete samples."""
    seed: int = 0
    """Of the choice of the pairs, the networks and the noise."""
    updates: int = 200_000
    """Updates of the generator."""
    batch_size: int = 25
    learning_rate: float = 1e-4
    """Of Adam, with betas (0.5, 0.999)."""
    discriminator_updates: int = 2
    """Updates of the discriminators for each of the generator."""
    generator_filters: int = 64
    """Filters of the generator's last hidden layer; all others scale with it."""
    discriminator_filters: int = 32
    """Filters of a discriminator's first layer; all others scale with it."""
    anchor: float = 0.1
    """Of factorgan-anchored: the weight of the generator's samples on both sides of the
    dependencies."""
    r1: float = 0.0
    """Weight of R1, a gradient penalty at real samples, on terms of complete ones (0: none)."""
    average: float = 0.0
    """Score an exponential moving average of the generator's weights with this decay (0: none)."""
    scorings: int = 8
    """How often the LS distance is measured on the way, by one training of its discriminator."""
    ls_trainings: int = 10
    """Trainings of its discriminator for the LS distance in the end."""
    ls_epochs: int = 40
    """Epochs of each of them."""
    ls_filters: int = 16
    """Filters of its first layer."""


SMOKE = {
    "updates": 4,
    "scorings": 1,
    "generator_filters": 2,
    "discriminator_filters": 2,
    "ls_trainings": 2,
    "ls_epochs": 1,
    "ls_filters": 2,
}


def make_discriminator(settings: Settings) -> FactorisedDiscriminator:
    """The models differ in nothing but their factorisation and, for gan-big, their filters."""
    channels = PARTS[settings.data]
    partition = Partition(channels, dim=1)
    if settings.model in ("gan", "gan-big"):
        factorisation = Factorisation.joint(partition.names)
    elif settings.model == "factorgan-remainder":
        factorisation = Factorisation.remainder(partition.names)
    else:
        factorisation = Factorisation.flat(partition.names)
    filters = settings.discriminator_filters * (2 if settings.model == "gan-big" else 1)
    networks = {
        term.name: make_critic((sum(channels[part] for part in term.parts), SIZE, SIZE), filters)
        for term in factorisation.terms
    }
    logit = None
    if settings.model == "factorgan-bounded":
        bound = partial(bounded, bound=math.log(settings.paired))
        logit = {term.name: bound for term in factorisation.terms if len(term.parts) > 1}
    return FactorisedDiscriminator(partition, factorisation, networks, logit=logit)


def load_observations(
    settings: Settings, pairs: PairedImages, machine: Machine
) -> ObservationLoader:
    """The n pairs, and for FactorGAN every image of all pairs by itself."""
    joint = pairs.joined()[subset(settings.paired, len(pairs.a), settings.seed)]
    datasets: dict[Any, Any] = {"joint": UnitImages(joint)}
    if settings.model not in ("gan", "gan-big"):
        datasets |= zip(PARTS[settings.data], map(UnitImages, pairs), strict=True)
    with warnings.catch_warnings():
        # Fewer pairs than a batch are what this experiment is about.
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        # The marginals' sets contain the pairs already, as in the paper's protocol: no pooling.
        return ObservationLoader(
            datasets,
            Partition(PARTS[settings.data], dim=1),
            settings.batch_size,
            pool=False,
            rng=torch.Generator().manual_seed(settings.seed),
            workers=machine.workers,
            pin_memory=machine.device.startswith("cuda"),
        )


class Scores:
    """The LS distance of a generator to the validation pairs.

    Args:
        settings: How the distance is measured.
        validation: The validation pairs.
        device: Where to compute.
    """

    def __init__(self, settings: Settings, validation: PairedImages, device: torch.device) -> None:
        self.trainings = settings.ls_trainings
        self.device = device
        self.distance = LeastSquaresDistance(
            validation.joined(), device, settings.ls_filters, settings.ls_epochs
        )

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """Scores the generator roughly, by one training."""
        return {"ls": self._measure(generator, 1)[0]}

    def in_full(self, generator: nn.Module) -> dict[str, Any]:
        """Scores the generator by all trainings: their mean, and its 95% interval."""
        values = self._measure(generator, self.trainings)
        return {
            "ls": mean(values),
            "ls_interval": confidence_interval(stdev(values), len(values)),
            "ls_values": values,
        }

    def _measure(self, generator: nn.Module, trainings: int) -> list[float]:
        rng = torch.Generator().manual_seed(1)  # the same noise for every generator

        def sample(number: int) -> Tensor:
            return generator(uniform_noise(number, NOISE, rng, self.device))

        return self.distance(sample, trainings)


@torch.no_grad()
def generate(generator: nn.Module, number: int, device: torch.device) -> Tensor:
    """Draws samples, always from the same noise, with shape (number, C, 64, 64)."""
    noise = uniform_noise(number, NOISE, torch.Generator().manual_seed(1), device)
    return torch.cat([generator(batch) for batch in noise.split(100)])


def draw_grid(data: Name) -> Callable[[nn.Module], Any]:
    """Makes what draws a grid of 24 samples."""

    def draw(generator: nn.Module) -> Any:
        samples = generate(generator, 24, next(generator.parameters()).device)
        return figures.grid(pictures(samples, data), columns=6)

    return draw


def make_training(settings: Settings, pairs: PairedImages, machine: Machine) -> Training:
    """Puts the networks, the data and the optimisers of a run together."""
    torch.manual_seed(settings.seed)
    generator = make_generator(sum(PARTS[settings.data].values()), settings.generator_filters)
    device = torch.device(machine.device)

    def make_fake(generator: nn.Module, real: Observations, rng: torch.Generator) -> Tensor:
        return generator(uniform_noise(settings.batch_size, NOISE, rng, device))

    return Training(
        generator,
        make_discriminator(settings),
        load_observations(settings, pairs, machine),
        make_fake,
        {"lr": settings.learning_rate, "betas": (0.5, 0.999)},
        settings.discriminator_updates,
        settings.seed,
        machine,
        settings.average,
        anchor=settings.anchor if settings.model == "factorgan-anchored" else 0.0,
        r1=settings.r1,
    )


def make_row(settings: Settings, scores: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a run was, and what it gave."""
    return {**asdict(settings), **scores, **more, **environment()}


def train(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/image_pairs/run"),
    root: Path | None = None,
    resume: bool = False,
    smoke: bool = False,
) -> dict[str, Any] | None:
    """Trains one model. Ctrl-C and SIGTERM save first; `--resume` goes on exactly.

    Args:
        settings: What is trained.
        machine: On what.
        out: The folder for checkpoint.pt, result.json, samples.png and TensorBoard's events.
        root: Where the data set lies: the unpacked archive, a folder with the folders train and
            val, or an .npz file. By default the archive is downloaded.
        resume: Go on from the folder's checkpoint, if there is one.
        smoke: Do 4 updates of tiny networks only, to see that everything works.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    pairs, validation = (load_pairs(settings.data, root, s, SIZE) for s in ("train", "val"))
    settings = counted(settings, len(pairs.a))
    device = torch.device(machine.device)
    processes.join(device)
    scores = Scores(settings, validation, device)
    training = make_training(settings, pairs, machine)
    title = f"{settings.model}, {settings.paired} pairs"
    run = Run(training, out, asdict(settings), scores, draw_grid(settings.data), title)
    if run.checkpoint.exists() and not resume:
        raise SystemExit(f"{out} holds a run already. Pass --resume, or another --out.")
    sizes = training.summary()["parameters"]
    print(f"Parameters: {', '.join(f'{side} {number:,}' for side, number in sizes.items())}")
    run.resume()
    if not run.train(settings.updates, settings.scorings):
        print(f"Stopped and saved at update {training.update}. Go on with --resume.")
        return None
    generator = training.result.eval()
    row = make_row(settings, scores.in_full(generator), **training.summary())
    write_json(out / "result.json", row)
    keep_samples(generator, validation, row, out)
    print(f"LS distance {row['ls']:.3f} ± {row['ls_interval']:.3f}")
    return row


def evaluate(
    checkpoint: Path, device: str = Machine.device, root: Path | None = None
) -> dict[str, Any]:
    """Scores the generator of a checkpoint, and writes evaluation.json and samples.png beside it.

    Args:
        checkpoint: A checkpoint.pt that `train` wrote.
        device: Where to compute.
        root: Where the data set lies; by default the archive is downloaded.
    """
    saved = load_checkpoint(checkpoint)
    settings = Settings(**saved["settings"])
    validation = load_pairs(settings.data, root, "val", SIZE)
    generator = load_generator(saved, torch.device(device))
    scores = Scores(settings, validation, torch.device(device)).in_full(generator)
    row = make_row(settings, scores, update=saved["training"]["update"])
    write_json(checkpoint.parent / "evaluation.json", row)
    keep_samples(generator, validation, row, checkpoint.parent)
    print(f"update {row['update']}: LS distance {row['ls']:.3f} ± {row['ls_interval']:.3f}")
    return row


def counted(settings: Settings, total: int) -> Settings:
    """Puts the number of pairs in the place of "all"; refuses more than there are."""
    if settings.paired == "all":
        return replace(settings, paired=total)
    if not 0 < settings.paired <= total:
        raise SystemExit(
            f"{settings.data} has {total} pairs here, but --paired is {settings.paired}. "
            f"Pass 1 to {total}, or all."
        )
    return settings


def load_generator(saved: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Rebuilds the generator of a checkpoint."""
    settings = Settings(**saved["settings"])
    channels = sum(PARTS[settings.data].values())
    generator = make_generator(channels, settings.generator_filters).to(device).eval()
    generator.load_state_dict(saved["training"]["result"])
    return generator


def keep_samples(
    generator: nn.Module, validation: PairedImages, row: Mapping[str, Any], folder: Path
) -> None:
    """Writes samples.pt, generated pairs and as many real ones, and draws them in samples.png."""
    device = next(generator.parameters()).device
    samples = {
        "real": validation.joined()[:SHOWN],
        "generated": (generate(generator, SHOWN, device) * 255).round().byte().cpu(),
    }
    write_tensors(folder / "samples.pt", samples)
    title = f"{LABELS[row['model']]}, {row['paired']} pairs, LS distance {row['ls']:.2f}"
    shown = {"real": samples["real"], title: samples["generated"]}
    draw_pairs(shown, row["data"], folder / "samples.png")


def sweep(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/image_pairs"),
    root: Path | None = None,
    models: tuple[Model, ...] = MODELS,
    pairs: tuple[int | Literal["all"], ...] = (100, 1000, "all"),
    seeds: tuple[int, ...] = (0,),
    processes: int = 1,
    smoke: bool = False,
) -> None:
    """Trains one panel of Figure 2; finished runs are skipped and interrupted ones go on.

    Started twice, on one machine or on several that share the folder, it trains no run twice. A
    sweep of each data set into one folder gives the whole figure.

    Args:
        settings: What all runs share; `data` is the panel.
        machine: On what each run is trained.
        out: The folder for one folder per run; each has a log.txt.
        root: Where the data set lies; by default the archive is downloaded.
        models: The models.
        pairs: The numbers n of complete samples.
        seeds: The seeds.
        processes: How many runs to train at a time.
        smoke: Do 4 updates of each only.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    grid = [
        replace(settings, model=model, paired=n, seed=seed)
        for seed, n, model in product(seeds, pairs, models)
    ]
    runs = {out / folder_name(asdict(run)): run for run in grid}
    options = {"root": root, "smoke": smoke}
    run_all(__file__, runs, machine, processes, options, finish=lambda: plot(out))


def plot(out: Path = Path("out/image_pairs")) -> None:
    """Draws Figure 2 and samples from the finished runs of a sweep, and prints their scores.

    Args:
        out: The folder of the sweep. figure2.png, a samples figure per data set and number of
            pairs, and results.json are written there.
    """
    paths = sorted(out.glob("*/result.json"))
    if not paths:
        raise SystemExit(f"{out} has no finished runs.")
    rows = read_rows(paths)
    folders = {folder_name(row): path.parent for row, path in zip(rows, paths, strict=True)}
    rows.sort(key=lambda r: (r["data"], r["paired"], list(LABELS).index(r["model"]), r["seed"]))
    write_json(out / "results.json", rows)
    draw_figure2(rows, out / "figure2.png")
    for (data, n), group in groupby(rows, key=lambda row: (row["data"], row["paired"])):
        shown: dict[str, Tensor] = {}
        for row in group:
            if LABELS[row["model"]] not in shown:  # the first seed
                path = folders[folder_name(row)] / "samples.pt"
                samples = torch.load(path, weights_only=True)
                shown |= {"real": samples["real"], LABELS[row["model"]]: samples["generated"]}
        draw_pairs(shown, data, out / f"samples-{data}-n{n}.png")
    print(table(rows, COLUMNS))


def folder_name(row: Mapping[str, Any]) -> str:
    """Names the folder of a run in a sweep."""
    return f"{row['data']}-n{row['paired']}-{row['model']}-seed{row['seed']}"


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"train": train, "evaluate": evaluate, "sweep": sweep, "plot": plot},
        args=arguments,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


if __name__ == "__main__":
    main()
