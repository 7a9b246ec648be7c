"""Experiment 1, Paired MNIST: two digits whose classes depend on each other (paper, Section 4.1).

A generator draws two digits, one above the other. Few of its training samples are pairs; all
others are single digits. A GAN can use only the pairs, FactorGAN uses everything.

    demo      four models on the 8x8 digits that scikit-learn ships, in minutes
    train     one model; by default the paper's recipe
    evaluate  FID and d_dep of a checkpoint
    sweep     the grid of Figure 1, several runs at a time
    plot      Figure 1, with the published curves beside ours
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

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
    independent,
)
from support import figures, processes
from support.classifier import DigitClassifier, get_classifier
from support.digit_figures import draw_figure1, draw_learning_curves
from support.digits import CLASSES, Digits, RedrawnPairs, embedded, mnist, partners, stacked
from support.metrics import FrechetDistance, class_table, dependency_error
from support.results import environment, read_rows, table, write_json
from support.sweeps import sweep as run_all
from support.training import Machine, Run, Training, load_checkpoint, uniform_noise

Model = Literal["gan", "factorgan-no-cp", "factorgan", "factorgan-anchored", "factorgan-remainder"]
MODELS: tuple[Model, ...] = ("gan", "factorgan-no-cp", "factorgan")  # of the paper
# In the demo: each with the weight of R1 that suits it better, of 0 and 1.
SHOWN: dict[Model, float] = {
    "gan": 1.0,
    "factorgan-no-cp": 0.0,
    "factorgan": 0.0,
    "factorgan-remainder": 1.0,
}
NOISE = 50  # uniform in [-1, 1]
WIDTH = 128
COLUMNS = {
    "model": "",
    "paired": "",
    "lambda": "",
    "seed": "",
    "updates": "",
    "fid": ".2f",
    "d_dep": ".3f",
    "seconds": ".0f",
}


@dataclass(frozen=True)
class Settings:
    """One training run. The defaults are the paper's recipe."""

    model: Model = "factorgan"
    """Two are not in the paper: factorgan-anchored shows the dependencies the generator's samples
    too, and factorgan-remainder has one network in place of both, given the marginals."""
    data: Literal["mnist", "digits"] = "mnist"
    """MNIST, or the 8x8 digits that scikit-learn ships."""
    paired: int = 1000
    """The number n of complete samples: the first n of the training set."""
    same: Annotated[float, tyro.conf.arg(name="lambda")] = 0.9
    """The probability lambda that both digits have one class."""
    pairing: Literal["fixed", "redrawn"] = "fixed"
    """n fixed pairs; or n upper digits whose partners are drawn anew in every epoch, as by the
    authors' loader: only this is comparable with the published curves."""
    seed: int = 0
    updates: int = 200_000
    """Updates of the generator."""
    batch_size: int = 25
    learning_rate: float = 1e-4
    """Of Adam, with betas (0.5, 0.999)."""
    discriminator_updates: int = 2
    """Updates of the discriminators for each of the generator."""
    r1: float = 0.0
    """Weight of R1, a gradient penalty at real samples, on terms of complete ones (0: none)."""
    average: float = 0.0
    """Score an exponential moving average of the generator's weights with this decay (0: none)."""
    scorings: int = 40
    """How often FID and d_dep are measured, evenly over the updates."""
    scored: int = 10_000
    """Generated samples for a scoring, against as many test pairs."""


# The stated recipe for a CPU: fewer, larger steps.
CPU = Settings(updates=10_000, batch_size=64, learning_rate=5e-4, scorings=20)
# At a constant learning rate FID jumps by a fifth from one update to the next; averaging the
# generator's weights takes that noise out of the comparison.
DEMO = replace(CPU, data="digits", paired=50, updates=4000, scorings=8, average=0.998)
ANCHOR = 0.1  # of factorgan-anchored
SMOKE = {"updates": 20, "scorings": 2, "scored": 500}


def make_generator(size: int) -> nn.Module:
    """The generator of Table 1: noise (N, 50) to pairs (N, 2S, S) in [0, 1]."""
    return nn.Sequential(
        nn.Linear(NOISE, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 2 * size * size),
        nn.Sigmoid(),
        nn.Unflatten(1, (2 * size, size)),
    )


def make_network(pixels: int) -> nn.Module:
    """A discriminator of Table 2, with the paper's spectral normalisation on every layer."""
    return nn.Sequential(
        nn.Flatten(),
        spectral_norm(nn.Linear(pixels, WIDTH)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(WIDTH, WIDTH)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(WIDTH, 1)),
    )


def make_discriminator(model: Model, size: int) -> FactorisedDiscriminator:
    """The models differ in nothing but their factorisation."""
    partition = Partition({"top": size, "bottom": size}, dim=1)
    if model == "gan":
        factorisation = Factorisation.joint(partition.names)
    elif model == "factorgan-remainder":
        factorisation = Factorisation.remainder(partition.names)
    elif model != "factorgan-no-cp":
        factorisation = Factorisation.flat(partition.names)
    else:
        factorisation = Factorisation.flat(
            partition.names, assuming=[independent("top", "bottom", under="p")]
        )
    networks = {t.name: make_network(len(t.parts) * size * size) for t in factorisation.terms}
    return FactorisedDiscriminator(partition, factorisation, networks)


def load_digits(settings: Settings, root: Path | None) -> tuple[Digits, Digits]:
    """Returns the training and the test digits."""
    return embedded() if settings.data == "digits" else mnist(root)


def load_observations(settings: Settings, train: Digits, machine: Machine) -> ObservationLoader:
    """The n pairs, and for FactorGAN every digit of all pairs by itself."""
    rng = torch.Generator().manual_seed(settings.seed)
    pairs = stacked(train, settings.same, rng)
    size = train.images.shape[-1]
    joint: Any = pairs[: settings.paired]
    if settings.pairing == "redrawn":
        joint = RedrawnPairs(train, settings.paired, settings.same)
    datasets: dict[Any, Any] = {"joint": joint}
    if settings.model != "gan":
        datasets |= {"top": pairs[:, :size], "bottom": pairs[:, size:]}
    with warnings.catch_warnings():
        # Fewer pairs than a batch are what this experiment is about.
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        # The marginals' sets contain the pairs already, as in the paper's protocol: no pooling.
        return ObservationLoader(
            datasets,
            Partition({"top": size, "bottom": size}, dim=1),
            settings.batch_size,
            pool=False,
            rng=rng,
            workers=machine.workers,
            pin_memory=machine.device.startswith("cuda"),
        )


class Scores:
    """FID and d_dep of a generator, against pairs of test digits.

    Args:
        settings: Lambda and the number of samples.
        test: The test digits.
        classifier: The classifier whose features and predictions count.
        device: Where to compute.
    """

    def __init__(
        self, settings: Settings, test: Digits, classifier: DigitClassifier, device: torch.device
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        upper = torch.arange(settings.scored) % len(test.labels)
        lower = partners(test.labels[upper], test.labels, settings.same, rng)
        self.classifier = classifier
        self.pairs = torch.cat([test.images[upper], test.images[lower]], dim=1).to(device)
        self.table = class_table(test.labels[upper], test.labels[lower], CLASSES)
        self.distances = [
            FrechetDistance(self._features(half)) for half in self.pairs.chunk(2, dim=1)
        ]

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """Scores the generator on noise that is the same in every call."""
        samples = generate(generator, len(self.pairs), self.pairs.device)
        features = [self._features(half) for half in samples.chunk(2, dim=1)]
        fids = [distance(f) for distance, f in zip(self.distances, features, strict=True)]
        upper, lower = (self.classifier.fc2(f).argmax(1).cpu() for f in features)
        table = class_table(upper, lower, CLASSES)
        return {"fid": sum(fids) / 2, "d_dep": dependency_error(self.table, table)}

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(batch) for batch in images.split(1000)])


@torch.no_grad()
def generate(generator: nn.Module, number: int, device: torch.device) -> Tensor:
    """Draws samples, always from the same noise, with shape (number, 2S, S)."""
    noise = uniform_noise(number, NOISE, torch.Generator().manual_seed(1), device)
    return torch.cat([generator(batch) for batch in noise.split(1000)])


def draw_grid(generator: nn.Module) -> Any:
    """A grid of 24 samples."""
    return figures.grid(generate(generator, 24, next(generator.parameters()).device))


def make_training(settings: Settings, train: Digits, machine: Machine) -> Training:
    """Puts the networks, the data and the optimisers of a run together."""
    size = train.images.shape[-1]
    torch.manual_seed(settings.seed)
    generator, discriminator = make_generator(size), make_discriminator(settings.model, size)
    device = torch.device(machine.device)

    def make_fake(generator: nn.Module, real: Observations, rng: torch.Generator) -> Tensor:
        return generator(uniform_noise(settings.batch_size, NOISE, rng, device))

    return Training(
        generator,
        discriminator,
        load_observations(settings, train, machine),
        make_fake,
        {"lr": settings.learning_rate, "betas": (0.5, 0.999)},
        settings.discriminator_updates,
        settings.seed,
        machine,
        settings.average,
        anchor=ANCHOR if settings.model == "factorgan-anchored" else 0.0,
        r1=settings.r1,
    )


def make_row(
    settings: Settings, scores: Mapping[str, float], accuracy: float, **more: Any
) -> dict[str, Any]:
    """What a run was, and what it gave."""
    return {
        **asdict(settings),
        "lambda": settings.same,
        **scores,
        "classifier_accuracy": accuracy,
        **more,
        **environment(),
    }


def train(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/paired_mnist/run"),
    root: Path | None = None,
    resume: bool = False,
    smoke: bool = False,
) -> dict[str, Any] | None:
    """Trains one model. Ctrl-C and SIGTERM save first; `--resume` goes on exactly.

    Args:
        settings: What is trained.
        machine: On what.
        out: The folder for checkpoint.pt, result.json, samples.png and TensorBoard's events.
        root: A folder with MNIST's four IDX files. By default they are downloaded.
        resume: Go on from the folder's checkpoint, if there is one.
        smoke: Do 20 updates only, to see that everything works.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    digits, test = load_digits(settings, root)
    device = torch.device(machine.device)
    processes.join(device)
    classifier, accuracy = load_classifier(digits, test, out.parent, device, smoke)
    scores = Scores(settings, test, classifier, device)
    training = make_training(settings, digits, machine)
    title = f"{settings.model}, {settings.paired} pairs"
    run = Run(training, out, asdict(settings), scores, draw_grid, title)
    if run.checkpoint.exists() and not resume:
        raise SystemExit(f"{out} holds a run already. Pass --resume, or another --out.")
    run.resume()
    if not run.train(settings.updates, settings.scorings):
        print(f"Stopped and saved at update {training.update}. Go on with --resume.")
        return None
    row = make_row(settings, training.history[-1], accuracy, **training.summary())
    write_json(out / "result.json", row)
    samples = generate(training.result.eval(), 24, device)
    figures.draw_samples({title: samples}, out / "samples.png")
    return row


def evaluate(
    checkpoint: Path, device: str = Machine.device, root: Path | None = None
) -> dict[str, Any]:
    """Scores the generator of a checkpoint, and writes evaluation.json and samples.png beside it.

    Args:
        checkpoint: A checkpoint.pt that `train` wrote.
        device: Where to compute.
        root: A folder with MNIST's four IDX files. By default they are downloaded.
    """
    saved = load_checkpoint(checkpoint)
    settings = Settings(**saved["settings"])
    digits, test = load_digits(settings, root)
    folder = checkpoint.parent
    classifier, accuracy = load_classifier(digits, test, folder.parent, torch.device(device))
    generator = make_generator(digits.images.shape[-1]).to(device).eval()
    generator.load_state_dict(saved["training"]["result"])
    scores = Scores(settings, test, classifier, torch.device(device))(generator)
    row = make_row(settings, scores, accuracy, update=saved["training"]["update"])
    write_json(folder / "evaluation.json", row)
    samples = generate(generator, 24, torch.device(device))
    figures.draw_samples({f"update {row['update']}": samples}, folder / "samples.png")
    print(f"update {row['update']}: FID {row['fid']:.2f}, d_dep {row['d_dep']:.3f}")
    return row


def load_classifier(
    digits: Digits, test: Digits, folder: Path, device: torch.device, smoke: bool = False
) -> tuple[DigitClassifier, float]:
    """Trains the classifier, or loads what an earlier run has trained for the same digits."""
    size = digits.images.shape[-1]
    epochs = 20 if size == 28 else 200  # 1,297 digits make for short epochs
    path = folder / f"classifier{size}{'-smoke' if smoke else ''}.pt"
    return get_classifier(path, digits, test, device, epochs=1 if smoke else epochs)


def sweep(
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/paired_mnist"),
    root: Path | None = None,
    models: tuple[Model, ...] = MODELS,
    pairs: tuple[int, ...] = (10, 20, 50, 100, 1000, 5000, 10_000, 20_000, 60_000),
    lambdas: tuple[float, ...] = (0.1, 0.9),
    seeds: tuple[int, ...] = (0,),
    processes: int = 1,
    smoke: bool = False,
) -> None:
    """Trains the grid of Figure 1; finished runs are skipped and interrupted ones go on.

    Started twice, on one machine or on several that share the folder, it trains no run twice.

    Args:
        settings: What all runs share.
        machine: On what each run is trained.
        out: The folder for one folder per run; each has a log.txt.
        root: A folder with MNIST's four IDX files. By default they are downloaded.
        models: The models. One without p-dependency is trained for the first n only, since it
            sees no pairs.
        pairs: The numbers n of complete samples.
        lambdas: The probabilities that both digits have one class.
        seeds: The seeds.
        processes: How many runs to train at a time.
        smoke: Do 20 updates of each only.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    digits, test = load_digits(settings, root)
    load_classifier(digits, test, out, torch.device(machine.device), smoke)  # once for all runs
    grid = [
        replace(settings, model=model, paired=n, same=same, seed=seed)
        for seed, same, n, model in product(seeds, lambdas, pairs, models)
        if model != "factorgan-no-cp" or n == pairs[0]
    ]
    runs = {folder_of(run, out): run for run in grid}
    options = {"root": root, "smoke": smoke}
    run_all(__file__, runs, machine, processes, options, finish=lambda: plot(out))


def folder_of(run: Settings, out: Path) -> Path:
    """Returns the folder of a run in a sweep."""
    name = f"{run.data}-{run.pairing}-lambda{run.same}-n{run.paired}-{run.model}-seed{run.seed}"
    return out / name


def plot(out: Path = Path("out/paired_mnist")) -> None:
    """Draws Figure 1 from the finished runs of a sweep, and prints their scores.

    Args:
        out: The folder of the sweep. figure1.png, curves.png and results.json are written there.
    """
    rows = read_rows(sorted(out.glob("*/result.json")))
    if not rows:
        raise SystemExit(f"{out} has no finished runs.")
    write_json(out / "results.json", rows)
    draw_figure1(rows, out / "figure1.png")
    draw_learning_curves(rows, out / "curves.png")
    print(table(rows, COLUMNS))


def demo(out: Path = Path("out/demo"), seed: int = 0, smoke: bool = False) -> None:
    """Trains four models on the 8x8 digits and compares them: a table and two figures.

    Args:
        out: Where results.json, figure.png and samples.png are written.
        seed: The seed of the pairs and of the training.
        smoke: Do 20 updates of each only.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small only wait for a second one
    machine = Machine("cpu")
    settings = replace(DEMO, seed=seed, **(SMOKE if smoke else {}))
    digits, test = embedded()
    classifier, accuracy = load_classifier(digits, test, out, torch.device("cpu"), smoke)
    scores = Scores(settings, test, classifier, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    samples = {"real": scores.pairs[:24]}
    for model, r1 in SHOWN.items():
        chosen = replace(settings, model=model, r1=r1)
        training = make_training(chosen, digits, machine)
        with TemporaryDirectory() as folder:
            run = Run(training, Path(folder), asdict(chosen), scores, draw_grid, model)
            if not run.train(chosen.updates, chosen.scorings):
                raise SystemExit("Stopped.")
        rows.append(make_row(chosen, training.history[-1], accuracy, **training.summary()))
        samples[model] = generate(training.result.eval(), 24, torch.device("cpu"))
    write_json(out / "results.json", rows)
    draw_learning_curves(rows, out / "figure.png")
    figures.draw_samples(samples, out / "samples.png")
    print(
        f"\n{settings.paired} pairs and {len(digits.labels)} single digits, lambda "
        f"{settings.same}, {settings.updates} updates; FID and d_dep: lower is better\n"
    )
    print(table(rows, COLUMNS))
    print(f"\nWritten to {out}: results.json, figure.png, samples.png")
    torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"demo": demo, "train": train, "evaluate": evaluate, "sweep": sweep, "plot": plot},
        args=arguments,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


if __name__ == "__main__":
    main()
