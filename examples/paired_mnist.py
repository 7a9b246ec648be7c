"""Experiment 1, Paired MNIST: two digits whose classes depend on each other (paper, Section 4.1).

A generator draws two digits, one above the other. Few of its training samples are pairs; all
others are single digits. `python paired_mnist.py demo` compares a GAN, which can use only the
pairs, with FactorGAN, which uses everything, on the 8x8 digits that scikit-learn ships.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm.auto import tqdm

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Partition,
    generator_loss,
    independent,
)
from support import figures
from support.classifier import classify, train_classifier
from support.digits import CLASSES, Digits, embedded, stacked
from support.metrics import FrechetDistance, class_table, dependency_error
from support.results import environment, table, write_json

Model = Literal["gan", "factorgan", "factorgan-no-cp"]
MODELS: tuple[Model, ...] = ("gan", "factorgan-no-cp", "factorgan")
NOISE = 50  # uniform in [-1, 1]
WIDTH = 128
SCORED = 10_000  # generated samples, against as many test pairs
COLUMNS = {"model": "", "fid": ".2f", "d_dep": ".3f", "seconds": ".0f"}


@dataclass(frozen=True)
class Settings:
    """One training run."""

    model: Model = "factorgan"
    paired: int = 50
    """The number n of complete samples: the first n of the training set."""
    same: Annotated[float, tyro.conf.arg(name="lambda")] = 0.9
    """The probability lambda that both digits have one class."""
    seed: int = 0
    updates: int = 4000
    """Updates of the generator (paper: 200,000)."""
    discriminator_updates: int = 2
    """Updates of the discriminators for each of the generator."""
    batch_size: int = 64
    """Paper: 25."""
    learning_rate: float = 5e-4
    """Of Adam with betas (0.5, 0.999). Paper: 1e-4."""
    scorings: int = 8
    """How often FID and d_dep are measured, evenly over the updates."""


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
    """The three models differ in nothing but their factorisation."""
    partition = Partition({"top": size, "bottom": size}, dim=1)
    if model == "gan":
        factorisation = Factorisation.joint(partition.names)
    elif model == "factorgan":
        factorisation = Factorisation.flat(partition.names)
    else:
        factorisation = Factorisation.flat(
            partition.names, assuming=[independent("top", "bottom", under="p")]
        )
    networks = {t.name: make_network(len(t.parts) * size * size) for t in factorisation.terms}
    return FactorisedDiscriminator(partition, factorisation, networks)


class Scores:
    """FID and d_dep of a generator, against pairs of test digits."""

    def __init__(self, train: Digits, test: Digits, same: float, device: torch.device) -> None:
        self.classifier, self.accuracy = train_classifier(train, test, device)
        rng = torch.Generator().manual_seed(0)
        chosen = torch.randint(len(test.labels), (SCORED,), generator=rng)
        pairs, labels = stacked(Digits(test.images[chosen], test.labels[chosen]), same, rng)
        self.real = pairs.to(device)
        self.table = class_table(*labels.unbind(1), CLASSES).to(device)
        self.distances = [FrechetDistance(self.classifier, half) for half in self.real.chunk(2, 1)]

    @torch.no_grad()
    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """Scores 10,000 samples; their noise is the same in every call."""
        rng = torch.Generator().manual_seed(1)
        noise = draw_noise(SCORED, rng, self.real.device)
        halves = torch.cat([generator(batch) for batch in noise.split(1000)]).chunk(2, 1)
        fids = [distance(h) for distance, h in zip(self.distances, halves, strict=True)]
        generated = class_table(*(classify(self.classifier, half) for half in halves), CLASSES)
        return {"fid": sum(fids) / 2, "d_dep": dependency_error(self.table, generated)}


def draw_noise(number: int, rng: torch.Generator, device: torch.device) -> Tensor:
    return (torch.rand(number, NOISE, generator=rng) * 2 - 1).to(device)


def load_observations(settings: Settings, train: Digits) -> dict[str, Tensor]:
    """The first n pairs, and for FactorGAN every digit of all pairs by itself."""
    rng = torch.Generator().manual_seed(settings.seed)
    pairs, _ = stacked(train, settings.same, rng)
    if settings.model == "gan":
        return {"joint": pairs[: settings.paired]}
    tops, bottoms = pairs.chunk(2, dim=1)
    return {"joint": pairs[: settings.paired], "top": tops, "bottom": bottoms}


def train_gan(
    settings: Settings, train: Digits, scores: Scores, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one model; returns the generator and the row of its results."""
    size = train.images.shape[-1]
    torch.manual_seed(settings.seed)
    generator = make_generator(size).to(device)
    discriminator = make_discriminator(settings.model, size).to(device)
    rng = torch.Generator().manual_seed(settings.seed)
    criterion = DiscriminatorLoss(
        discriminator, DependencySampler(discriminator.partition, rng=rng)
    )
    # The marginals' sets contain the pairs already, as in the paper's protocol: no pooling.
    loader = ObservationLoader(
        load_observations(settings, train),
        discriminator.partition,
        min(settings.batch_size, settings.paired),
        pool=False,
        rng=rng,
    )
    adam = {"lr": settings.learning_rate, "betas": (0.5, 0.999)}
    generator_optimiser = torch.optim.Adam(generator.parameters(), **adam)
    discriminator_optimiser = torch.optim.Adam(discriminator.parameters(), **adam)

    history = [{"update": 0, **scores(generator)}]
    every = max(1, settings.updates // settings.scorings)
    start = time.perf_counter()
    observations = iter(loader)
    bar = tqdm(range(1, settings.updates + 1), desc=settings.model, unit="update")
    for update in bar:
        for _ in range(settings.discriminator_updates):
            with torch.no_grad():
                fake = generator(draw_noise(settings.batch_size, rng, device))
            discriminator_optimiser.zero_grad()
            criterion(next(observations).to(device), fake).backward()
            discriminator_optimiser.step()
        generator_optimiser.zero_grad()
        fake = generator(draw_noise(settings.batch_size, rng, device))
        loss = generator_loss(discriminator(fake))
        loss.backward(inputs=list(generator.parameters()))
        generator_optimiser.step()
        if update % every == 0:
            history.append({"update": update, **scores(generator)})
            bar.set_postfix({k: f"{history[-1][k]:.2f}" for k in ("fid", "d_dep")})
    seconds = time.perf_counter() - start
    row = {
        **asdict(settings),
        "lambda": settings.same,
        "data": f"{len(train.labels)} digits of {size}x{size}",
        "fid": history[-1]["fid"],
        "d_dep": history[-1]["d_dep"],
        "seconds": round(seconds, 1),
        "history": history,
        "classifier_accuracy": scores.accuracy,
        "device": str(device),
        **environment(),
    }
    return generator, row


def demo(
    settings: Settings = Settings(), out: Path = Path("out/demo"), device: str = "cpu"
) -> None:
    """Trains all three models on the 8x8 digits and compares them: a table and two figures.

    Args:
        settings: The runs; the model is set to each in turn.
        out: Where results.json, figure.png and samples.png are written.
        device: The device to train on, such as "cpu" or "cuda".
    """
    train, test = embedded()
    scores = Scores(train, test, settings.same, torch.device(device))
    rows: list[dict[str, Any]] = []
    samples = {"real": scores.real[:48]}
    for model in MODELS:
        run = replace(settings, model=model)
        generator, row = train_gan(run, train, scores, torch.device(device))
        rows.append(row)
        noise = draw_noise(48, torch.Generator().manual_seed(2), torch.device(device))
        with torch.no_grad():
            samples[model] = generator(noise)
    write_json(out / "results.json", rows)
    figures.draw_learning_curves(rows, out / "figure.png")
    figures.draw_samples(samples, out / "samples.png")
    print(
        f"\n{settings.paired} pairs, {len(train.labels)} single digits, lambda {settings.same}, "
        f"{settings.updates} updates (FID and d_dep: lower is better)\n"
    )
    print(table(rows, COLUMNS))
    print(f"\nWritten to {out}: results.json, figure.png, samples.png")


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"demo": demo}, description=__doc__)


if __name__ == "__main__":
    main()
