"""Experiment 3, segmentation: label maps of street scenes (paper, Section 4.3).

A generator turns a scene into its label map, as an image. Few scenes come with their map; of all
others there are scenes and maps, but not which belong together. A GAN can use only the pairs,
CycleGAN only the unpaired images, FactorGAN both.

    train      one model; by default the paper's recipe
    evaluate   error and accuracy of a checkpoint
    baselines  what predictions reach that do not look at the scene
    sweep      the grid of Figure 4, several runs at a time
    plot       Figures 4 and 5, with the published points beside ours
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import StackDataset

from factordisc import (
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Observations,
    Partition,
    independent,
    shared,
)
from support import processes, streets
from support.cyclegan import CycleLoss, Translators
from support.images import PairedImages, UnitImages, subset, unit
from support.labels import Palette, mean_squared_error, pixel_accuracy
from support.networks import NOISE, bounded, make_critic
from support.results import environment, read_rows, table, write_json, write_tensors
from support.street_figures import (
    LABELS,
    draw_figure4,
    draw_figure5,
    draw_learning_curves,
    image,
)
from support.sweeps import sweep as run_all
from support.training import Machine, Run, Training, load_checkpoint, uniform_noise
from support.unet import UNet

Model = Literal[
    "gan",
    "cyclegan",
    "factorgan",
    "factorgan-bounded",
    "factorgan-anchored",
    "factorgan-remainder",
]
MODELS: tuple[Model, ...] = ("gan", "cyclegan", "factorgan", "factorgan-bounded")
PARTITION = Partition.fields("scene", "map")
POOL = 50  # fakes that CycleGAN's discriminators remember
SHOWN = 6  # scenes in a figure
SCORED_AT_ONCE = 50  # scenes in a forward pass
COLUMNS = {
    "data": "",
    "model": "",
    "paired": "",
    "seed": "",
    "updates": "",
    "mse": ".4f",
    "accuracy": ".1f",
    "accuracy_unambiguous": ".1f",
    "seconds": ".0f",
}


@dataclass(frozen=True)
class Settings:
    """One training run. The defaults are the paper's recipe."""

    model: Model = "factorgan"
    data: streets.Name = "cityscapes"
    paired: int = 100
    """The number n of scenes whose map is known to belong to them; always 0 for CycleGAN."""
    size: int = 128
    """Height and width of scenes and maps."""
    filters: int = 32
    """Filters of the first layers of U-Net and discriminators."""
    seed: int = 0
    updates: int = 200_000
    """Updates of the generator."""
    batch_size: int = 25
    learning_rate: float = 1e-4
    """Of Adam, with betas (0.5, 0.999)."""
    discriminator_updates: int = 2
    """Updates of the discriminators for each of the generator."""
    anchor: float = 0.1
    """Of factorgan-anchored: the weight of the generator's samples on both sides of the
    dependencies."""
    r1: float = 0.0
    """Weight of R1, a gradient penalty at real samples, on terms of complete ones (0: none)."""
    average: float = 0.0
    """Score an exponential moving average of the generator's weights with this decay (0: none)."""
    scorings: int = 40
    """How often error and accuracy are measured, evenly over the updates."""


SMOKE = {"size": 32, "filters": 4, "batch_size": 4, "updates": 4, "scorings": 2}


class Translator(nn.Module):
    """A U-Net whose output is an image in [0, 1].

    Args:
        size: The height and width of the images.
        filters: The filters of its first block.
    """

    def __init__(self, size: int, filters: int) -> None:
        super().__init__()
        self.unet = UNet(3, 3, size, size, filters, NOISE)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Turns images (N, 3, S, S) and noise (N, 50) into images (N, 3, S, S)."""
        return self.unet(images, noise).sigmoid()


def make_generator(settings: Settings) -> nn.Module:
    """The generator of Table 6, from scenes to maps; two of them for CycleGAN."""
    size, filters = settings.size, settings.filters
    if settings.model == "cyclegan":
        return Translators(Translator(size, filters), Translator(size, filters))
    return Translator(size, filters)


def make_discriminator(settings: Settings) -> FactorisedDiscriminator:
    """The models differ in their factorisation, and CycleGAN in its generators."""
    parts = PARTITION.names
    if settings.model == "gan":
        factorisation = Factorisation.joint(parts)
    elif settings.model == "cyclegan":
        # Images that are not paired: all that can be compared is scenes and maps by themselves.
        factorisation = Factorisation.flat(
            parts, assuming=[independent(*parts, under=source) for source in ("p", "q")]
        )
    elif settings.model == "factorgan-remainder":
        factorisation = Factorisation.remainder(parts, assuming=[shared("scene")])
    else:
        # Equation 4: the generator is given scenes, so p and q agree on them.
        factorisation = Factorisation.flat(parts, assuming=[shared("scene")])
    networks = {
        term.name: make_critic(
            (3 * len(term.parts), settings.size, settings.size), settings.filters
        )
        for term in factorisation.terms
    }
    both = [term.name for term in factorisation.terms if len(term.parts) > 1]
    logit = None
    if settings.model == "factorgan-bounded":
        logit = dict.fromkeys(both, partial(bounded, bound=math.log(settings.paired)))
    inputs = dict.fromkeys(both, stacked)
    return FactorisedDiscriminator(PARTITION, factorisation, networks, inputs=inputs, logit=logit)


def stacked(scene: Tensor, map_: Tensor) -> Tensor:
    """Lays scene and map on top of each other, with shape (N, 6, S, S)."""
    return torch.cat([scene, map_], dim=1)


def load_streets(
    settings: Settings, root: Path | None
) -> tuple[PairedImages, PairedImages, Palette]:
    """Returns the training and the validation pairs, and the palette of their maps."""
    train, validation = (
        streets.load_streets(settings.data, root, split, settings.size)
        for split in ("train", "val")
    )
    return train, validation, streets.PALETTES[settings.data]


def load_observations(
    settings: Settings, train: PairedImages, machine: Machine
) -> ObservationLoader:
    """The n pairs, or all images of either kind by themselves, or both."""
    scenes, maps = (UnitImages(images) for images in train)
    datasets: dict[Any, Any] = {}
    if settings.model != "cyclegan":
        chosen = subset(settings.paired, len(train.a), settings.seed)
        datasets["joint"] = StackDataset(*(UnitImages(images[chosen]) for images in train))
    if settings.model != "gan":
        datasets |= {"scene": scenes, "map": maps}
    with warnings.catch_warnings():
        # Fewer pairs than a batch are what this experiment is about.
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        # The sets of images contain the pairs already, as in the paper's protocol: no pooling.
        return ObservationLoader(
            datasets,
            PARTITION,
            settings.batch_size,
            pool=False,
            rng=torch.Generator().manual_seed(settings.seed),
            workers=machine.workers,
            pin_memory=machine.device.startswith("cuda"),
        )


def make_fake(
    generator: nn.Module, real: Observations, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Maps of real scenes: of all scenes where there are unpaired ones, else of the paired."""
    scene = real["scene"] if "scene" in real else real["joint"][0]
    return scene, generator(scene, uniform_noise(len(scene), NOISE, rng, scene.device))


def make_unpaired_fake(
    generator: nn.Module, real: Observations, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scenes of real maps, and maps of real scenes."""
    scene, map_ = real["scene"], real["map"]
    noise = uniform_noise(len(scene), 2 * NOISE, rng, scene.device)
    return generator(scene, map_, noise)


class Scores:
    """Error and accuracy of predicted maps on the validation set.

    Args:
        validation: The pairs.
        palette: The labels that count.
        device: Where to compute.
    """

    def __init__(self, validation: PairedImages, palette: Palette, device: torch.device) -> None:
        self.scenes, self.maps = (unit(images).to(device) for images in validation)
        self.palette = palette

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """Scores the generator on noise that is the same in every call."""
        return self.of(predict(generator, self.scenes))

    def of(self, predicted: Tensor) -> dict[str, float]:
        """Scores maps (N, 3, S, S) in [0, 1]: MSE, and accuracy in per cent.

        The accuracy named unambiguous leaves out cars and poles in Cityscapes, as the published
        one does: see `pixel_accuracy`.
        """
        return {
            "mse": mean_squared_error(predicted, self.maps),
            "accuracy": pixel_accuracy(predicted, self.maps, self.palette),
            "accuracy_unambiguous": pixel_accuracy(
                predicted, self.maps, self.palette, ambiguous=False
            ),
        }

    def show(self, generator: nn.Module) -> dict[str, Tensor]:
        """Returns some scenes, their maps and the predicted maps, each (N, 3, S, S), uint8."""
        number = len(self.scenes)
        chosen = torch.linspace(0, number - 1, min(SHOWN, number)).long()
        rows = {
            "scene": self.scenes[chosen],
            "truth": self.maps[chosen],
            "predicted": predict(generator, self.scenes)[chosen],
        }
        return {title: (255 * x).round().to(torch.uint8).cpu() for title, x in rows.items()}

    def draw(self, generator: nn.Module) -> np.ndarray:
        """Draws the same for TensorBoard."""
        return image(self.show(generator))

    def save(self, generator: nn.Module, row: Mapping[str, Any], folder: Path) -> None:
        """Writes the same as predictions.pt and predictions.png."""
        shown = self.show(generator)
        write_tensors(folder / "predictions.pt", shown)
        draw_figure5(titled(shown, row), folder / "predictions.png")


def titled(shown: Mapping[str, Tensor], row: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names what a run predicted after it and its score."""
    pairs = f"{row['paired']} pairs" if row["paired"] else "no pairs"
    title = f"{LABELS[row['model']]}, {pairs}: accuracy {row['accuracy']:.0f}%"
    return {"scene": shown["scene"], "truth": shown["truth"], title: shown["predicted"]}


@torch.no_grad()
def predict(generator: nn.Module, scenes: Tensor) -> Tensor:
    """Predicts maps (N, 3, S, S) of scenes in [0, 1], always with the same noise."""
    to_map = generator.to_map if isinstance(generator, Translators) else generator
    noise = uniform_noise(len(scenes), NOISE, torch.Generator().manual_seed(1), scenes.device)
    batches = zip(scenes.split(SCORED_AT_ONCE), noise.split(SCORED_AT_ONCE), strict=True)
    return torch.cat([to_map(*batch) for batch in batches])


def make_training(settings: Settings, train: PairedImages, machine: Machine) -> Training:
    """Puts the networks, the data and the optimisers of a run together."""
    torch.manual_seed(settings.seed)
    unpaired = settings.model == "cyclegan"
    return Training(
        make_generator(settings),
        make_discriminator(settings),
        load_observations(settings, train, machine),
        make_unpaired_fake if unpaired else make_fake,
        {"lr": settings.learning_rate, "betas": (0.5, 0.999)},
        settings.discriminator_updates,
        settings.seed,
        machine,
        settings.average,
        regulariser=CycleLoss(NOISE) if unpaired else None,
        pool=POOL if unpaired else 0,
        anchor=settings.anchor if settings.model == "factorgan-anchored" else 0.0,
        r1=settings.r1,
    )


def make_row(settings: Settings, scores: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """What a run was, and what it gave."""
    return {**asdict(settings), **scores, **more, **environment()}


def train(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/segmentation/run"),
    root: Path | None = None,
    resume: bool = False,
    smoke: bool = False,
) -> dict[str, Any] | None:
    """Trains one model. Ctrl-C and SIGTERM save first; `--resume` goes on exactly.

    Args:
        settings: What is trained.
        machine: On what.
        out: The folder for checkpoint.pt, result.json, predictions.pt and .png and TensorBoard's
            events.
        root: Where the data set lies: see `support/streets.py`. By default Cityscapes is
            downloaded in the form of the pix2pix project.
        resume: Go on from the folder's checkpoint, if there is one.
        smoke: Do 4 updates of small networks only, to see that everything works.
    """
    settings = settled(settings, smoke)
    pairs, validation, palette = load_streets(settings, root)
    processes.join(torch.device(machine.device))
    scores = Scores(validation, palette, torch.device(machine.device))
    training = make_training(settings, pairs, machine)
    title = f"{settings.model}, {settings.paired} pairs"
    run = Run(training, out, asdict(settings), scores, scores.draw, title)
    if run.checkpoint.exists() and not resume:
        raise SystemExit(f"{out} holds a run already. Pass --resume, or another --out.")
    run.resume()
    sizes = training.summary()["parameters"]
    print(f"Parameters: {', '.join(f'{side} {number:,}' for side, number in sizes.items())}")
    if not run.train(settings.updates, settings.scorings):
        print(f"Stopped and saved at update {training.update}. Go on with --resume.")
        return None
    row = make_row(settings, training.history[-1], **training.summary())
    write_json(out / "result.json", row)
    scores.save(training.result.eval(), row, out)
    return row


def settled(settings: Settings, smoke: bool) -> Settings:
    """Returns what is trained: small networks for a smoke test, CycleGAN without pairs."""
    settings = replace(settings, **SMOKE) if smoke else settings
    return replace(settings, paired=0) if settings.model == "cyclegan" else settings


def evaluate(
    checkpoint: Path, device: str = Machine.device, root: Path | None = None
) -> dict[str, Any]:
    """Scores a checkpoint, and writes evaluation.json and its predictions beside it.

    Besides error and accuracy it says what the discriminator's terms make of real pairs and of
    predicted maps: see `mean_log_ratios`.

    Args:
        checkpoint: A checkpoint.pt that `train` wrote.
        device: Where to compute.
        root: Where the data set lies, as for `train`.
    """
    saved = load_checkpoint(checkpoint)
    settings = Settings(**saved["settings"])
    pairs, validation, palette = load_streets(settings, root)
    generator = make_generator(settings).to(device).eval()
    generator.load_state_dict(saved["training"]["result"])
    discriminator = make_discriminator(settings).to(device).eval()
    discriminator.load_state_dict(saved["training"]["discriminator"])
    scores = Scores(validation, palette, torch.device(device))
    samples = {
        "validation pairs": (scores.scenes, scores.maps),
        "predicted maps": (scores.scenes, predict(generator, scores.scenes)),
    }
    if settings.paired:
        chosen = subset(settings.paired, len(pairs.a), settings.seed)
        samples["training pairs"] = tuple(unit(images[chosen]).to(device) for images in pairs)
    ratios = [
        {"samples": name, **mean_log_ratios(discriminator, batch)}
        for name, batch in samples.items()
    ]
    more = {"log_ratios": ratios, "update": saved["training"]["update"]}
    row = make_row(settings, scores(generator), **more)
    write_json(checkpoint.parent / "evaluation.json", row)
    scores.save(generator, row, checkpoint.parent)
    print(f"update {row['update']}: MSE {row['mse']:.4f}, accuracy {row['accuracy']:.1f}%")
    print(table(ratios, {key: "" if key == "samples" else ".1f" for key in ratios[0]}))
    return row


@torch.no_grad()
def mean_log_ratios(
    discriminator: FactorisedDiscriminator, batch: tuple[Tensor, ...]
) -> dict[str, float]:
    """Returns the mean log ratio of each term and of all together, in nats.

    A discriminator that is right about maps as they are predicted gives them no more than
    real ones; the p-dependency has been shown real maps only, and may.

    Args:
        discriminator: The discriminator.
        batch: Scenes and maps, of which the first 50 count.
    """
    first = tuple(images[:SCORED_AT_ONCE] for images in batch)
    terms = {"all": discriminator(first), **discriminator.terms(first)}
    return {name: ratios.mean().item() for name, ratios in terms.items()}


def baselines(
    data: streets.Name = "cityscapes", size: int = Settings.size, root: Path | None = None
) -> dict[str, dict[str, float]]:
    """Prints the scores of one map for all scenes, made of all training maps.

    Args:
        data: Which data set.
        size: Height and width of the maps.
        root: Where the data set lies, as for `train`.
    """
    pairs, validation, palette = load_streets(Settings(data=data, size=size), root)
    scores = Scores(validation, palette, torch.device("cpu"))
    maps = unit(pairs.b)
    classes = palette.nearest(maps, palette.evaluated)
    counts = torch.stack([(classes == k).sum(0) for k in range(len(palette.colours))])  # (K, S, S)
    mean = maps.mean(0)
    guesses = {
        "mean colour of each place": mean,
        "most frequent class of each place": palette.colours[counts.argmax(0)].movedim(-1, 0),
        "most frequent class": palette.colours[counts.sum((1, 2)).argmax()][:, None, None],
    }
    rows = {
        name: scores.of(guess.expand_as(mean).expand_as(scores.maps))
        for name, guess in guesses.items()
    }
    columns = {"guess": "", **{key: COLUMNS[key] for key in next(iter(rows.values()))}}
    print(table([{"guess": name, **row} for name, row in rows.items()], columns))
    return rows


def sweep(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/segmentation"),
    root: Path | None = None,
    models: tuple[Model, ...] = ("gan", "cyclegan", "factorgan"),
    pairs: tuple[int, ...] = (25, 100, 500, 1000, 2975),
    seeds: tuple[int, ...] = (0,),
    processes: int = 1,
    smoke: bool = False,
) -> None:
    """Trains the grid of Figure 4; finished runs are skipped and interrupted ones go on.

    Started twice, on one machine or on several that share the folder, it trains no run twice.

    Args:
        settings: What all runs share.
        machine: On what each run is trained.
        out: The folder for one folder per run; each has a log.txt.
        root: Where the data set lies, as for `train`.
        models: The models. CycleGAN, which sees no pairs, is trained once per seed.
        pairs: The numbers n of complete samples.
        seeds: The seeds.
        processes: How many runs to train at a time.
        smoke: Do 4 updates of small networks only.
    """
    grid = [
        settled(replace(settings, model=model, paired=n, seed=seed), smoke)
        for seed, n, model in product(seeds, pairs, models)
    ]
    runs = {folder_of(run, out): run for run in grid}
    options = {"root": root, "smoke": smoke}
    run_all(__file__, runs, machine, processes, options, finish=lambda: plot(out))


def folder_of(run: Settings, out: Path) -> Path:
    """Returns the folder of a run in a sweep."""
    return out / f"{run.data}{run.size}-n{run.paired}-{run.model}-seed{run.seed}"


def plot(out: Path = Path("out/segmentation")) -> None:
    """Draws Figures 4 and 5 from the finished runs of a sweep, and prints their scores.

    Args:
        out: The folder of the sweep. figure4.png, curves.png, results.json and a comparison of
            the models per data set, number of pairs and seed are written there.
    """
    rows = read_rows(sorted(out.glob("*/result.json")))
    if not rows:
        raise SystemExit(f"{out} has no finished runs.")
    write_json(out / "results.json", rows)
    draw_figure4(rows, out / "figure4.png")
    draw_learning_curves(rows, out / "curves.png")
    for group in sorted({(row["data"], row["size"], row["seed"]) for row in rows}):
        data, size, seed = group
        alike = [row for row in rows if (row["data"], row["size"], row["seed"]) == group]
        alike.sort(key=lambda row: MODELS.index(row["model"]))
        for n in sorted({row["paired"] for row in alike} - {0}) or [0]:
            shown: dict[str, Tensor] = {}
            for row in alike:
                if row["paired"] in (0, n):
                    run = Settings(**{f.name: row[f.name] for f in fields(Settings)})
                    saved = torch.load(folder_of(run, out) / "predictions.pt", weights_only=True)
                    shown |= titled(saved, row)
            draw_figure5(shown, out / f"figure5-{data}{size}-n{n}-seed{seed}.png")
    print(table(rows, COLUMNS))


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {
            "train": train,
            "evaluate": evaluate,
            "baselines": baselines,
            "sweep": sweep,
            "plot": plot,
        },
        args=arguments,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


if __name__ == "__main__":
    main()
