"""Training a generator against a factorised discriminator, so that it can stop and go on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    FactorisedDiscriminator,
    ObservationLoader,
    Observations,
    generator_loss,
)
from support.results import write_tensors

# From the generator, the step's real data and a source of noise to a batch of fakes.
MakeFake = Callable[[nn.Module, Observations, torch.Generator], Any]
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """Where and how fast a run computes; not what it computes."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    bfloat16: bool = False
    """Run the networks under bfloat16 autocast."""
    compile: bool = False
    """Compile generator and discriminators (torch.compile)."""
    workers: int = 0
    """Processes that load data; 0 loads between updates."""


class Training:
    """A generator, a factorised discriminator, and all that a run needs to go on exactly.

    Args:
        generator: The generator.
        discriminator: The discriminator.
        loader: Real data.
        make_fake: Draws a batch of fakes.
        adam: Arguments of `torch.optim.Adam`, for both sides.
        discriminator_updates: Updates of the discriminators for each of the generator.
        seed: Seeds the noise and the sampler.
        machine: The device and options of speed.
        average: The decay of an exponential moving average of the generator's weights, which is
            then what is scored and kept; 0 for none.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: FactorisedDiscriminator,
        loader: ObservationLoader,
        make_fake: MakeFake,
        adam: Mapping[str, Any],
        discriminator_updates: int,
        seed: int,
        machine: Machine,
        average: float = 0.0,
    ) -> None:
        self.device = torch.device(machine.device)
        self.machine = machine
        self.generator = generator.to(self.device)
        self.discriminator = discriminator.to(self.device)
        self.loader = loader
        self.make_fake = make_fake
        self.discriminator_updates = discriminator_updates
        self.rng = torch.Generator().manual_seed(seed)
        self.criterion = DiscriminatorLoss(
            discriminator, DependencySampler(discriminator.partition, rng=self.rng)
        )
        self.optimisers = {
            "generator": torch.optim.Adam(generator.parameters(), fused=True, **adam),
            "discriminator": torch.optim.Adam(discriminator.parameters(), fused=True, **adam),
        }
        self.averaged = (
            AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(average), use_buffers=True)
            if average
            else None
        )
        self.update = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self._observations: Iterator[Observations] | None = None
        # `rows` stays as it is: all that is random or missing is in it.
        compiled = torch.compile if machine.compile else lambda function: function
        self._cost = compiled(self.criterion.cost)
        self._generate = compiled(generator)
        self._discriminate = compiled(discriminator)

    def step(self, report: bool = False) -> dict[str, Any]:
        """Does one update of the generator and those of the discriminators before it.

        Returns:
            With `report`, the `TermReport` of every term and the generator's loss.
        """
        if self._observations is None:
            self._observations = iter(self.loader)
        for _ in range(self.discriminator_updates):
            real = next(self._observations).to(self.device, non_blocking=True)
            with torch.no_grad(), self._autocast():
                fake = self.make_fake(self._generate, real, self.rng)
            rows = self.criterion.rows(real, fake)
            with self._autocast():
                loss = self._cost(rows, report=report)
                loss, terms = loss if report else (loss, {})
            self.optimisers["discriminator"].zero_grad()
            loss.backward()
            self.optimisers["discriminator"].step()
        with self._autocast():
            fake = self.make_fake(self._generate, real, self.rng)
            loss = generator_loss(self._discriminate(fake))
        self.optimisers["generator"].zero_grad()
        loss.backward(inputs=list(self.generator.parameters()))
        self.optimisers["generator"].step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.generator)
        self.update += 1
        return {"terms": terms, "generator": loss.detach()} if report else {}

    @property
    def result(self) -> nn.Module:
        """The generator that is scored and kept: the average, where there is one."""
        return self.generator if self.averaged is None else self.averaged.module

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.machine.bfloat16)

    def summary(self) -> dict[str, Any]:
        """Returns what a row of results says of the training."""
        return {
            "seconds": round(self.seconds, 1),
            "parameters": {
                "generator": sum(p.numel() for p in self.generator.parameters()),
                "discriminator": sum(p.numel() for p in self.discriminator.parameters()),
            },
            "history": self.history,
            **asdict(self.machine),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, numbers and strings only, so that it loads with `weights_only`."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "result": self.result.state_dict(),
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
            "loader": self.loader.state_dict(),
            "rng": self.rng.get_state(),
            "global_rng": torch.get_rng_state(),
            "update": self.update,
            "seconds": self.seconds,
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where the training was whose state this is."""
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.loader.load_state_dict(state["loader"])
        self._observations = None
        self.rng.set_state(state["rng"].cpu())
        torch.set_rng_state(state["global_rng"].cpu())
        self.update = state["update"]
        self.seconds = state["seconds"]
        self.history = list(state["history"])


@dataclass
class Run:
    """A training with its folder: checkpoints, TensorBoard, progress bar, scores.

    Args:
        training: What is trained.
        folder: Where checkpoint.pt and the event files go.
        settings: What the run is, as plain values; a checkpoint of other settings is refused.
        score: Measures the generator.
        draw: Makes a grid of samples, with shape (H, W) in [0, 1], for TensorBoard.
        title: What the progress bar says.
        log_every: Updates between two entries in TensorBoard.
        checkpoint_minutes: Minutes between two checkpoints.
    """

    training: Training
    folder: Path
    settings: Mapping[str, Any]
    score: Callable[[nn.Module], Scores]
    draw: Callable[[nn.Module], Any]
    title: str = ""
    log_every: int = 100
    checkpoint_minutes: float = 5.0
    stopped: bool = field(default=False, init=False)

    @property
    def checkpoint(self) -> Path:
        """The file that `resume` reads."""
        return self.folder / "checkpoint.pt"

    def resume(self) -> None:
        """Loads the folder's checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        saved = load_checkpoint(self.checkpoint)
        free = ("updates", "scorings")  # a run may be made longer
        for key, value in self.settings.items():
            if key not in free and saved["settings"].get(key) != value:
                raise ValueError(
                    f"{self.checkpoint} is of a run with {key} {saved['settings'].get(key)!r}, "
                    f"but this one has {value!r}. Choose another folder."
                )
        self.training.load_state_dict(saved["training"])

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        content = {"settings": dict(self.settings), "training": self.training.state_dict()}
        write_tensors(self.checkpoint, content)

    def train(self, updates: int, scorings: int) -> bool:
        """Trains up to a number of updates; Ctrl-C and SIGTERM save first.

        Args:
            updates: The number of updates in all, those before a resumption included.
            scorings: How often the generator is scored, evenly over the updates.

        Returns:
            Whether the run is complete.
        """
        training = self.training
        every = max(1, updates // max(1, scorings))
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(str(self.folder), purge_step=training.update + 1)
        bar = tqdm(
            total=updates, initial=training.update, desc=self.title, unit="update", mininterval=1
        )
        with self._saving_when_stopped():
            if training.update == 0:
                self._score(writer)
            started, saved = time.perf_counter() - training.seconds, time.monotonic()
            while training.update < updates and not self.stopped:
                report = training.step(report=(training.update + 1) % self.log_every == 0)
                if report:
                    _log(writer, report, training.update)
                if training.update % every == 0 or training.update == updates:
                    self._score(writer)
                    bar.set_postfix({k: f"{v:.2f}" for k, v in self._latest().items()})
                bar.update()
                training.seconds = time.perf_counter() - started
                if time.monotonic() - saved > 60 * self.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
            self.save()
        bar.close()
        writer.close()
        return training.update >= updates

    def _score(self, writer: SummaryWriter) -> None:
        generator = self.training.result
        generator.eval()
        scores = self.score(generator)
        writer.add_image("samples", self.draw(generator), self.training.update, dataformats="HW")
        generator.train()
        self.training.history.append({"update": self.training.update, **scores})
        for name, value in scores.items():
            writer.add_scalar(f"score/{name}", value, self.training.update)

    def _latest(self) -> dict[str, float]:
        return {k: v for k, v in self.training.history[-1].items() if k != "update"}

    @contextmanager
    def _saving_when_stopped(self) -> Iterator[None]:
        """Lets the update finish in which the first Ctrl-C or SIGTERM falls."""

        def stop(number: int, frame: object) -> None:
            self.stopped = True
            for one, handler in previous.items():
                signal.signal(one, handler)  # a second one stops at once

        previous = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
        for one in previous:
            signal.signal(one, stop)
        try:
            yield
        finally:
            for one, handler in previous.items():
                signal.signal(one, handler)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; it holds no code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _log(writer: SummaryWriter, report: Mapping[str, Any], update: int) -> None:
    writer.add_scalar("generator/loss", report["generator"], update)
    for term, figures in report["terms"].items():
        for name, value in figures._asdict().items():
            if not torch.isnan(value):
                writer.add_scalar(f"{term}/{name}", value, update)


def uniform_noise(number: int, size: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Draws the paper's noise, uniform in [-1, 1], with shape (number, size)."""
    return (torch.rand(number, size, generator=rng) * 2 - 1).to(device)
