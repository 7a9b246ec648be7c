"""Training a generator against a factorised discriminator, so that it can stop and go on.

It stands on what torch ships: `torchrun`, DistributedDataParallel, autocast and GradScaler.
Lightning Fabric 2.6 was tried for it, and takes as many lines: its mixed precision casts the real
data to half precision too, refuses to clip gradients where Adam is fused, turns fp16 into bf16 on
a CPU, so that no test would see its scaler, and adds two seconds of imports to every start.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    FactorisedDiscriminator,
    GradientPenalty,
    ObservationLoader,
    Observations,
    generator_loss,
)
from support import processes
from support.claims import claim
from support.pool import FakePool
from support.results import write_tensors

# From the generator, the step's real data and a source of noise to a batch of fakes.
MakeFake = Callable[[nn.Module, Observations, torch.Generator], Any]
# From the generator, the step's real data and its fakes to what is added to the generator's loss.
Regulariser = Callable[[nn.Module, Observations, Any], Tensor | None]
Scores = Mapping[str, float]

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Where and how fast a run computes.

    Several processes train one run if `torchrun` starts them, with one GPU each or together on
    the CPU: `torchrun --nproc-per-node 2 SCRIPT train ...`. As everywhere with
    DistributedDataParallel, the batch size is that of each process: two processes take steps of
    twice the batch.
    """

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Run the networks in full precision, or under autocast to bfloat16 or float16 (the latter
    with scaled gradients). Weights and losses are in full precision always."""
    compile: bool = False
    """Compile generator and discriminators (torch.compile)."""
    channels_last: bool = False
    """Lay images out with channels last, which convolutions on recent GPUs are faster with."""
    workers: int = 0
    """Processes that load data; 0 loads between updates."""


class GeneratorLoss(nn.Module):
    """What the generator minimises in a step.

    One module for all that a step asks of the generator, so that DistributedDataParallel sees one
    forward pass however often, and by which of its members, the generator is called.

    Args:
        generator: The generator.
        discriminate: The discriminator, whose parameters are not this module's.
        make_fake: Draws a batch of fakes.
        rng: The source of noise.
        regulariser: What is added to the loss.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminate: Callable[[Any], Tensor],
        make_fake: MakeFake,
        rng: torch.Generator,
        regulariser: Regulariser | None = None,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.make_fake = make_fake
        self.rng = rng
        self.regulariser = regulariser
        # in a tuple, where nn.Module does not look for modules
        self._discriminate = (discriminate,)

    def forward(self, real: Observations) -> Tensor:
        """Returns the loss on a fresh batch of fakes, a scalar in nats."""
        fake = self.make_fake(self.generator, real, self.rng)
        loss = generator_loss(self._discriminate[0](fake))
        more = None if self.regulariser is None else self.regulariser(self.generator, real, fake)
        return loss if more is None else loss + more


class Training:
    """A generator, a factorised discriminator, and all that a run needs to go on exactly.

    Of several processes each has data, noise and random draws of its own, and all have the same
    weights.

    Args:
        generator: The generator: any module, or a ModuleDict of several.
        discriminator: The discriminator.
        loader: Real data.
        make_fake: Draws a batch of fakes.
        adam: Arguments of `torch.optim.Adam`, for both sides.
        discriminator_updates: Updates of the discriminators for each of the generator.
        seed: Seeds the noise and the sampler, and the global generators, which dropout and users'
            code draw from.
        machine: The device and options of speed.
        average: The decay of an exponential moving average of the generator's weights, which is
            then what is scored and kept; 0 for none.
        generator_adam: What of `adam` is different for the generator.
        clip: The largest norm of the gradients of the generator, and of each discriminator by
            itself, since each learns by itself; 0 for any.
        regulariser: What is added to the generator's loss, if anything. It may call the generator
            again.
        pool: The size of a pool of earlier fakes for the discriminators (`FakePool`); 0 for none.
        anchor: The weight of the generator's samples on both sides of the dependencies.
        r1: The weight of a gradient penalty, at real samples, on the terms of complete samples.
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
        *,
        generator_adam: Mapping[str, Any] | None = None,
        clip: float = 0.0,
        regulariser: Regulariser | None = None,
        pool: int = 0,
        anchor: float = 0.0,
        r1: float = 0.0,
    ) -> None:
        self.device = torch.device(machine.device)
        self.machine = machine
        processes.join(self.device)
        layout = torch.channels_last if machine.channels_last else torch.preserve_format
        self.generator = generator.to(self.device, memory_format=layout)
        self.discriminator = discriminator.to(self.device, memory_format=layout)
        self.make_fake = make_fake
        self.discriminator_updates = discriminator_updates
        self.clip = clip
        self.loader = loader
        self.loader.seed = _own_seed(loader.seed)
        self.rng = torch.Generator().manual_seed(_own_seed(seed))
        _seed_global_rngs(_own_seed(seed))
        self.pool = FakePool(pool, discriminator.partition, self.rng) if pool else None
        self.optimisers = {
            "generator": torch.optim.Adam(
                generator.parameters(), fused=True, **{**adam, **(generator_adam or {})}
            ),
            "discriminator": torch.optim.Adam(discriminator.parameters(), fused=True, **adam),
        }
        half = machine.precision == "16-mixed"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.averaged = (
            AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(average), use_buffers=True)
            if average
            else None
        )
        self.update = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self._observations: Iterator[Observations] | None = None
        criterion = DiscriminatorLoss(
            discriminator,
            DependencySampler(discriminator.partition, rng=self.rng),
            {
                term.name: GradientPenalty("numerator", r1)
                for term in discriminator.factorisation.terms
                if r1 and len(term.parts) > 1 and term.numerator[0].source == "p"
            },
            anchor,
        )
        self._generate, discriminate = generator, discriminator
        if machine.compile:
            self._generate, discriminate = _compiled(generator), torch.compile(discriminator)
            # `rows` stays as it is: all that is random or missing is in it.
            criterion.cost = torch.compile(criterion.cost)
        self._discriminator_loss = processes.distributed(criterion)
        self._generator_loss = processes.distributed(
            GeneratorLoss(self._generate, discriminate, make_fake, self.rng, regulariser)
        )

    def step(self, report: bool = False) -> dict[str, Any]:
        """Does one update of the generator and those of the discriminators before it.

        Returns:
            With `report`, the `TermReport` of every term and the generator's loss.
        """
        for _ in range(self.discriminator_updates):
            real = self._load().to(self.device, non_blocking=True)
            with torch.no_grad(), self._autocast():
                fake = self.make_fake(self._generate, real, self.rng)
            if self.pool is not None:
                fake = self.pool(fake)
            with self._autocast():
                loss = self._discriminator_loss(real, fake, report=report)
                loss, terms = loss if report else (loss, {})
            self._descend("discriminator", loss, *self.discriminator.networks.values())
        with self._autocast():
            loss = self._generator_loss(real)
        self._descend("generator", loss, self.generator)
        if self.averaged is not None:
            self.averaged.update_parameters(self.generator)
        self.update += 1
        return {"terms": terms, "generator": loss.detach()} if report else {}

    def _load(self) -> Observations:
        if self._observations is not None:
            return next(self._observations)
        self._observations = iter(self.loader)
        real = next(self._observations)  # which starts the workers
        processes.shield_workers()
        return real

    def _descend(self, side: str, loss: Tensor, *networks: nn.Module) -> None:
        """Updates one side, whose networks are clipped each by itself."""
        optimiser = self.optimisers[side]
        parameters = [p for p in optimiser.param_groups[0]["params"] if p.requires_grad]
        optimiser.zero_grad()
        # inputs: the generator's loss leaves no gradient in the discriminators
        self.scaler.scale(loss).backward(inputs=parameters)
        if self.clip:
            self.scaler.unscale_(optimiser)
            for network in dict.fromkeys(networks):
                clip_grad_norm_(network.parameters(), self.clip)
        self.scaler.step(optimiser)
        self.scaler.update()

    @property
    def result(self) -> nn.Module:
        """The generator that is scored and kept: the average, where there is one."""
        return self.generator if self.averaged is None else self.averaged.module

    def _autocast(self) -> torch.autocast:
        half = HALF.get(self.machine.precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def summary(self) -> dict[str, Any]:
        """Returns what a row of results says of the training."""
        return {
            "seconds": round(self.seconds, 1),
            "parameters": {
                "generator": sum(p.numel() for p in self.generator.parameters()),
                "discriminator": sum(p.numel() for p in self.discriminator.parameters()),
            },
            "history": self.history,
            "processes": processes.count(),
            **asdict(self.machine),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, numbers and strings only, so that it loads with `weights_only`.

        All processes must call it, since the random state, the place in the data and the pool of
        each are part of it. Of running statistics of batches those of the first are.
        """
        own = {
            "loader": self.loader.state_dict(),
            "pool": None if self.pool is None else self.pool.state_dict(),
            "rng": self.rng.get_state(),
            "global_rngs": _global_rngs(self.device),
        }
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "result": self.result.state_dict(),
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
            "scaler": self.scaler.state_dict(),
            "processes": processes.gather(own),
            "update": self.update,
            "seconds": self.seconds,
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where the training was whose state this is.

        Raises:
            ValueError: If the state is of another number of processes.
        """
        if len(state["processes"]) != processes.count():
            raise ValueError(
                f"The training was done by {len(state['processes'])} processes, but now there "
                f"are {processes.count()}. Start as many with torchrun --nproc-per-node."
            )
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.scaler.load_state_dict(state["scaler"])
        own = state["processes"][processes.rank()]
        self.loader.load_state_dict(own["loader"])
        self._observations = None
        if self.pool is not None:
            self.pool.load_state_dict(own["pool"], self.device)
        self.rng.set_state(own["rng"].cpu())
        _set_global_rngs(own["global_rngs"], self.device)
        self.update = state["update"]
        self.seconds = state["seconds"]
        self.history = list(state["history"])


def _compiled(generator: nn.Module) -> nn.Module:
    if isinstance(generator, nn.ModuleDict):  # whose members are called, not itself
        return nn.ModuleDict({name: torch.compile(m) for name, m in generator.items()})
    return torch.compile(generator)


def _own_seed(seed: int) -> int:
    """Returns a seed for this process: the seed itself for the first."""
    if processes.is_first():
        return seed
    return int(np.random.SeedSequence((seed, processes.rank())).generate_state(1)[0])


def _seed_global_rngs(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def _global_rngs(device: torch.device) -> dict[str, Any]:
    """Returns the states of the generators that belong to nobody."""
    name, keys, *position = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *position),
    }


def _set_global_rngs(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu())
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002


@dataclass
class Run:
    """A training with its folder: checkpoints, TensorBoard, progress bar, scores.

    Of several processes the first scores, writes and shows progress; all return the same.

    Args:
        training: What is trained.
        folder: Where checkpoint.pt and the event files go.
        settings: What the run is, as plain values; a checkpoint of other settings is refused.
        score: Measures the generator. Of several processes only the first calls it, so it must
            not wait for the others (torchmetrics: `sync_on_compute=False`).
        draw: Makes a grid of samples for TensorBoard, with shape (H, W), or (H, W, 3) for
            colours, in [0, 1].
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
    _claim: FileLock | None = field(default=None, init=False)

    @property
    def checkpoint(self) -> Path:
        """The file that `resume` reads."""
        return self.folder / "checkpoint.pt"

    def resume(self) -> None:
        """Loads the folder's checkpoint, if there is one.

        Raises:
            ValueError: If the checkpoint is of another run, or of another number of processes.
            SystemExit: If another process is training in this folder.
        """
        self._claim_folder()
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
        """Writes the checkpoint, whole or not at all. All processes must call it."""
        content = {"settings": dict(self.settings), "training": self.training.state_dict()}
        write_tensors(self.checkpoint, content)

    def train(self, updates: int, scorings: int) -> bool:
        """Trains up to a number of updates; Ctrl-C and SIGTERM save first.

        Args:
            updates: The number of updates in all, those before a resumption included.
            scorings: How often the generator is scored, evenly over the updates.

        Returns:
            Whether the run is complete.

        Raises:
            SystemExit: If another process is training in this folder.
        """
        training = self.training
        every = max(1, updates // max(1, scorings))
        with (
            self._claimed(),
            self._saving_when_stopped(),
            self._writer() as writer,
            tqdm(
                total=updates,
                initial=training.update,
                desc=self.title,
                unit="update",
                mininterval=1,
                disable=not processes.is_first(),
            ) as bar,
        ):
            if training.update == 0:
                self._score(writer)
            started, saved = time.perf_counter() - training.seconds, time.monotonic()
            stop = False
            while training.update < updates and not stop:
                report = training.step(report=(training.update + 1) % self.log_every == 0)
                if report:
                    _log(writer, report, training.update)
                if training.update % every == 0 or training.update == updates:
                    self._score(writer)
                    bar.set_postfix({k: f"{v:.2f}" for k, v in self._latest().items()})
                bar.update()
                training.seconds = time.perf_counter() - started
                due = time.monotonic() - saved > 60 * self.checkpoint_minutes
                stop, due = processes.agree(self.stopped, due)
                if due:
                    self.save()
                    saved = time.monotonic()
            self.save()
        return training.update >= updates

    @contextmanager
    def _writer(self) -> Iterator[SummaryWriter | None]:
        """Gives the first process a writer of TensorBoard's event files."""
        if not processes.is_first():
            yield None
            return
        with SummaryWriter(str(self.folder), purge_step=self.training.update + 1) as writer:
            yield writer

    def _score(self, writer: SummaryWriter | None) -> None:
        generator, update = self.training.result, self.training.update
        scores: Scores = {}
        if writer is not None:
            generator.eval()
            scores = self.score(generator)
            image = self.draw(generator)
            generator.train()
            layout = "HW" if image.ndim == 2 else "HWC"
            writer.add_image("samples", image, update, dataformats=layout)
            for name, value in scores.items():
                writer.add_scalar(f"score/{name}", value, update)
        self.training.history.append({"update": update, **processes.broadcast(scores)})

    def _latest(self) -> dict[str, float]:
        return {k: v for k, v in self.training.history[-1].items() if k != "update"}

    def _claim_folder(self) -> None:
        if processes.is_first() and self._claim is None:
            self._claim = claim(self.folder)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        self._claim_folder()
        try:
            yield
        finally:
            if self._claim is not None:
                self._claim.release()
                self._claim = None

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


def _log(writer: SummaryWriter | None, report: Mapping[str, Any], update: int) -> None:
    if writer is None:
        return
    writer.add_scalar("generator/loss", report["generator"], update)
    for term, figures in report["terms"].items():
        for name, value in figures._asdict().items():
            if not torch.isnan(value):
                writer.add_scalar(f"{term}/{name}", value, update)


def uniform_noise(number: int, size: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Draws the paper's noise, uniform in [-1, 1], with shape (number, size)."""
    # pinned and in place, so that no update waits for the device to copy it
    noise = torch.rand(number, size, generator=rng, pin_memory=device.type == "cuda")
    return noise.mul_(2).sub_(1).to(device, non_blocking=True)
