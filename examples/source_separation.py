"""Experiment 4, audio source separation: accompaniment and vocals of songs (paper, Section 4.4).

A generator divides the spectrogram of a mixture by a mask. Of few songs both sources are known
together; of all others there are mixtures, accompaniments and vocals that are not matched. A GAN
can use only the former, FactorGAN uses everything.

    train     one model; by default the paper's recipe
    evaluate  SDR of a checkpoint, of the mixture itself and of the ideal mask
    separate  write accompaniment and vocals of a song
    sweep     the runs of Figure 6
    plot      Figure 6, with the published results beside ours
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from factordisc import (
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Observations,
    Partition,
    shared,
)
from support import processes, sound_figures
from support.audio import (
    SOURCES,
    Recording,
    find_recordings,
    mono,
    read_mixture,
    resampled,
    split_recordings,
    write_audio,
)
from support.networks import NOISE, bounded, make_critic
from support.results import environment, read_rows, table, write_json
from support.separation import (
    Estimate,
    Mask,
    NetworkMask,
    Separator,
    by_ideal_mask,
    by_mask,
    by_mixture,
    score,
    summary,
)
from support.separation import separate as divide
from support.spectrograms import BINS, CHANNELS, FRAMES, SAMPLE_RATE, Songs, cached, spectrum
from support.sweeps import sweep as run_all
from support.training import Machine, Run, Training, load_checkpoint, uniform_noise
from support.unet import UNet

Model = Literal[
    "gan", "factorgan", "factorgan-bounded", "factorgan-anchored", "factorgan-remainder"
]
MODELS: tuple[Model, ...] = ("gan", "factorgan")  # of the paper
# The generator divides the mixture exactly, so that the mixture tells nothing that the
# sources do not: the assumption that turns the flat form into equation 6.
MASKED = shared("mixture", given=SOURCES)


@dataclass(frozen=True)
class Settings:
    """One training run. The defaults are the paper's recipe."""

    model: Model = "factorgan"
    """Three are not in the paper: factorgan-bounded keeps the outputs of its dependencies within
    the logarithm of the number of paired songs, factorgan-anchored shows them the generator's
    samples too, and factorgan-remainder has one network in place of both, given the marginals."""
    paired: int = 10
    """The number of songs whose sources are known together."""
    seed: int = 0
    """Of the choice of these songs, too."""
    updates: int = 200_000
    """Updates of the generator."""
    batch_size: int = 25
    """Snippets, each of another song: fewer where there are fewer songs."""
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
    filters: int = 32
    """Of the first layer, in the generator and in the discriminators."""
    scorings: int = 4
    """How often the test songs are separated and scored, evenly over the updates."""


# What needs no learning: no separation, half of the mixture for each source, and the upper bound.
REFERENCES: dict[str, Estimate] = {
    "mixture": by_mixture,
    "even_mask": by_mask(lambda mixture: torch.full_like(mixture, 0.5)),
    "ideal_mask": by_ideal_mask,
}
# Median and mean over windows, in dB.
SDR_COLUMNS = {f"{s}_{kind}": ".2f" for s in SOURCES for kind in ("median", "mean")}
SMOKE = {"updates": 4, "batch_size": 4, "filters": 2, "scorings": 2}


def make_generator(filters: int) -> Separator:
    """The generator: the U-Net of Table 6 with W = 8 and C = 1, whose output is a mask."""
    return Separator(UNet(1, 1, BINS, FRAMES, filters, NOISE))


def make_partition() -> Partition:
    """An observation: normalised spectrograms of mixture and sources, with shape (3, 256, 128)."""
    return Partition(dict.fromkeys(CHANNELS, 1), dim=1)


def make_discriminator(settings: Settings) -> FactorisedDiscriminator:
    """The models differ in nothing but their factorisation; the networks are those of Table 5."""
    partition = make_partition()
    forms = {"gan": Factorisation.joint, "factorgan-remainder": Factorisation.remainder}
    form = forms.get(settings.model, Factorisation.flat)
    factorisation = form(partition.names, assuming=[MASKED])
    networks = {
        term.name: make_critic((len(term.parts), BINS, FRAMES), settings.filters)
        for term in factorisation.terms
    }
    logit = None
    if settings.model == "factorgan-bounded":
        bound = partial(bounded, bound=math.log(settings.paired))
        logit = {term.name: bound for term in factorisation.terms if len(term.parts) > 1}
    return FactorisedDiscriminator(partition, factorisation, networks, logit=logit)


def load_observations(
    settings: Settings, recordings: Sequence[Recording], cache: Path, machine: Machine
) -> ObservationLoader:
    """The sources of n songs together, and for FactorGAN each part of all songs by itself.

    A GAN's mixtures are those of its n songs, as in the authors' code.
    """
    rng = torch.Generator().manual_seed(settings.seed)
    songs = sorted({recording.song for recording in recordings})
    if not 2 <= settings.paired <= len(songs):
        raise SystemExit(
            f"--paired expects from 2 songs to the {len(songs)} that there are for training, "
            f"but got {settings.paired}."
        )
    order = torch.randperm(len(songs), generator=rng).tolist()
    chosen = {songs[i] for i in order[: settings.paired]}
    files = cached(recordings, cache)
    pairs = [recording for recording in recordings if recording.song in chosen]
    mixtures = pairs if settings.model == "gan" else recordings
    datasets: dict[Any, Songs] = {
        SOURCES: Songs(pairs, files, SOURCES),
        "mixture": Songs(mixtures, files, ["mixture"]),
    }
    if settings.model != "gan":
        datasets |= {part: Songs(recordings, files, [part]) for part in SOURCES}
    with warnings.catch_warnings():
        # Fewer songs than a batch are what this experiment is about.
        warnings.filterwarnings("ignore", message="There are .* fewer than the batch size")
        # The marginals' sets contain the paired songs already: no pooling.
        return ObservationLoader(
            datasets,
            make_partition(),
            settings.batch_size,
            pool=False,
            rng=rng,
            workers=machine.workers,
            pin_memory=machine.device.startswith("cuda"),
        )


def make_mask(generator: Separator, device: torch.device) -> NetworkMask:
    """Makes masks by a generator, always with the same noise."""
    rng = torch.Generator().manual_seed(1)
    return NetworkMask(generator, uniform_noise(1, NOISE, rng, device))


def scores_of(recordings: Sequence[Recording], estimate: Estimate) -> dict[str, float]:
    """Returns median, mean and median absolute deviation of the SDR per source, in dB."""
    return summary(score(recording, estimate) for recording in recordings)


def spectrograms(recording: Recording, mask: Mask) -> tuple[dict[str, np.ndarray], ...]:
    """Returns magnitudes (256, frames): the true ones by part, the estimated by source."""
    sources, rate = recording.read()
    single = torch.from_numpy(resampled(mono(sources), rate, SAMPLE_RATE))
    true = spectrum(torch.cat([single.sum(0, keepdim=True), single])).abs()
    b = mask(true[0])
    estimates = b * true[0], (1 - b) * true[0]
    return (
        dict(zip(CHANNELS, true.numpy(), strict=True)),
        dict(zip(SOURCES, (e.numpy() for e in estimates), strict=True)),
    )


def make_training(
    settings: Settings, recordings: Sequence[Recording], cache: Path, machine: Machine
) -> Training:
    """Puts the networks, the data and the optimisers of a run together."""
    torch.manual_seed(settings.seed)
    generator = make_generator(settings.filters)
    discriminator = make_discriminator(settings)
    device = torch.device(machine.device)

    def make_fake(generator: nn.Module, real: Observations, rng: torch.Generator) -> Tensor:
        mixture = real["mixture"]
        return generator(mixture, uniform_noise(len(mixture), NOISE, rng, device))

    return Training(
        generator,
        discriminator,
        load_observations(settings, recordings, cache, machine),
        make_fake,
        {"lr": settings.learning_rate, "betas": (0.5, 0.999)},
        settings.discriminator_updates,
        settings.seed,
        machine,
        settings.average,
        anchor=settings.anchor if settings.model == "factorgan-anchored" else 0.0,
        r1=settings.r1,
    )


def make_row(
    settings: Settings, scores: Mapping[str, float], test: Sequence[Recording], **more: Any
) -> dict[str, Any]:
    """What a run was, and what it gave: beside it, what needs no learning."""
    return {
        **asdict(settings),
        **scores,
        **{name: scores_of(test, estimate) for name, estimate in REFERENCES.items()},
        "tested": [recording.name for recording in test],
        **more,
        **environment(),
    }


def train(
    root: Path,
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/source_separation/run"),
    cache: Path = Path("out/source_separation/spectrograms"),
    resume: bool = False,
    smoke: bool = False,
) -> dict[str, Any] | None:
    """Trains one model. Ctrl-C and SIGTERM save first; `--resume` goes on exactly.

    Args:
        root: The recordings: a folder with "train" and "test" (MUSDB18, or MUSDB18-HQ), or one of
            recordings by several artists, of whom a fourth is kept for testing (MIR-1K).
        settings: What is trained.
        machine: On what.
        out: The folder for checkpoint.pt, result.json, spectrograms.png and TensorBoard's events.
        cache: The folder for spectrograms, which any number of runs may share.
        resume: Go on from the folder's checkpoint, if there is one.
        smoke: Do 4 updates of tiny networks only, to see that everything works.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    known, test = split_recordings(root)
    device = torch.device(machine.device)
    processes.join(device)
    training = make_training(settings, known, cache, machine)
    title = f"{settings.model}, {settings.paired} songs"

    def evaluated(generator: nn.Module) -> dict[str, float]:
        return scores_of(test, by_mask(make_mask(generator, device)))

    def draw(generator: nn.Module) -> np.ndarray:
        _, estimates = spectrograms(test[0], make_mask(generator, device))
        return sound_figures.image(list(estimates.values()))

    run = Run(training, out, asdict(settings), evaluated, draw, title)
    if run.checkpoint.exists() and not resume:
        raise SystemExit(f"{out} holds a run already. Pass --resume, or another --out.")
    run.resume()
    if not run.train(settings.updates, settings.scorings):
        print(f"Stopped and saved at update {training.update}. Go on with --resume.")
        return None
    row = make_row(settings, training.history[-1], test, **training.summary())
    write_json(out / "result.json", row)
    return row


def evaluate(
    checkpoint: Path,
    root: Path,
    whole: bool = False,
    example: int = 0,
    device: str = Machine.device,
) -> dict[str, Any]:
    """Scores the generator of a checkpoint.

    Writes evaluation.json, and spectrograms.png of one recording, into the checkpoint's folder.

    Args:
        checkpoint: A checkpoint.pt that `train` wrote.
        root: The recordings, as for `train`, of which those for testing are scored.
        whole: Score all recordings in `root`: those of another data set.
        example: The number of the recording of which spectrograms are drawn.
        device: Where to compute.
    """
    settings, generator, update = load_generator(checkpoint, device)
    test = find_recordings(root) if whole else split_recordings(root)[1]
    if not 0 <= example < len(test):
        raise SystemExit(f"--example expects a number from 0 to {len(test) - 1}, got {example}.")
    mask = make_mask(generator, torch.device(device))
    row = make_row(settings, scores_of(test, by_mask(mask)), test, update=update)
    write_json(checkpoint.parent / "evaluation.json", row)
    true, estimates = spectrograms(test[example], mask)
    title = f"{settings.model}, update {update}"
    path = checkpoint.parent / "spectrograms.png"
    sound_figures.draw_spectrograms(true, {title: estimates}, path)
    rows = [{"estimate": title, **row}]
    rows += [{"estimate": name, **row[name]} for name in REFERENCES]
    print(f"SDR in dB of {len(test)} recordings\n" + table(rows, {"estimate": "", **SDR_COLUMNS}))
    return row


def separate(
    checkpoint: Path, song: Path, out: Path | None = None, device: str = Machine.device
) -> None:
    """Separates a song into accompaniment.wav and vocals.wav, of one channel.

    Args:
        checkpoint: A checkpoint.pt that `train` wrote.
        song: The mixture: any sound file, or a `.stem.mp4`.
        out: The folder to write into; by default one beside the song, with its name.
        device: Where to compute.
    """
    _, generator, _ = load_generator(checkpoint, device)
    mixture, rate = read_mixture(song)
    estimates = divide(mono(mixture), rate, make_mask(generator, torch.device(device)))
    out = song.with_suffix("") if out is None else out
    for name, samples in zip(SOURCES, estimates, strict=True):
        write_audio(out / f"{name}.wav", samples, rate)
        print(f"Written: {out / name}.wav")


def load_generator(checkpoint: Path, device: str) -> tuple[Settings, Separator, int]:
    """Returns the settings, the generator in eval mode, and its updates."""
    saved = load_checkpoint(checkpoint)
    settings = Settings(**saved["settings"])
    generator = make_generator(settings.filters).to(device).eval()
    generator.load_state_dict(saved["training"]["result"])
    return settings, generator, saved["training"]["update"]


def sweep(
    root: Path,
    settings: Settings = Settings(),
    machine: Machine = Machine(),
    out: Path = Path("out/source_separation"),
    cache: Path = Path("out/source_separation/spectrograms"),
    models: tuple[Model, ...] = MODELS,
    songs: tuple[int, ...] = (10, 20, 50),
    seeds: tuple[int, ...] = (0,),
    processes: int = 1,
    smoke: bool = False,
) -> None:
    """Trains the runs of Figure 6; finished ones are skipped and interrupted ones go on.

    Args:
        root: The recordings, as for `train`.
        settings: What all runs share.
        machine: On what each run is trained.
        out: The folder for one folder per run; each has a log.txt.
        cache: The folder for spectrograms.
        models: The models.
        songs: The numbers of songs whose sources are known together.
        seeds: The seeds.
        processes: How many runs to train at a time.
        smoke: Do 4 updates of tiny networks only.
    """
    settings = replace(settings, **SMOKE) if smoke else settings
    cached(split_recordings(root)[0], cache)  # once for all runs
    runs = {
        out / f"n{n}-{model}-seed{seed}": replace(settings, model=model, paired=n, seed=seed)
        for seed, n, model in product(seeds, songs, models)
    }
    options = {"root": root.resolve(), "cache": cache, "smoke": smoke}
    run_all(__file__, runs, machine, processes, options, finish=lambda: plot(out))


def plot(out: Path = Path("out/source_separation")) -> None:
    """Draws Figure 6 from the finished runs of a sweep, and prints their scores.

    Args:
        out: The folder of the sweep. figure6.png and results.json are written there.
    """
    rows = read_rows(sorted(out.glob("*/result.json")))
    if not rows:
        raise SystemExit(f"{out} has no finished runs.")
    write_json(out / "results.json", rows)
    sound_figures.draw_figure6(rows, out / "figure6.png")
    columns = dict.fromkeys(("model", "paired", "seed", "updates"), "")
    print(table(rows, {**columns, **SDR_COLUMNS, "seconds": ".0f"}))


def main(arguments: Sequence[str] | None = None) -> None:
    commands = {
        "train": train,
        "evaluate": evaluate,
        "separate": separate,
        "sweep": sweep,
        "plot": plot,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands, args=arguments, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )


if __name__ == "__main__":
    main()
