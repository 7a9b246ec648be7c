"""What two processes do; `torchrun` starts this for test_processes.py, which looks at the rest.

Every process writes RANK.pt into the folder given.
"""

import os
import signal
import sys
from pathlib import Path

import tiny_gans
import torch

from factordisc import Observations
from support import processes
from support.training import Machine, Run

STOPPED, WHOLE = 5, 12  # updates


def gradients_of_a_step():
    """One update; what went into it and the gradients that the optimisers saw."""
    noise, seen = [], {}

    def draw(generator, real, rng):
        noise.append(torch.rand(tiny_gans.BATCH, 3, generator=rng))
        return generator(noise[-1])

    training = tiny_gans.factorgan(make_fake=draw, normalise=False)
    training.discriminator_updates = 1
    criterion = training._discriminator_loss.module
    rows = criterion.rows

    def recorded(real, fake):
        seen["real"], seen["fake"] = dict(real), fake
        seen["rows"] = rows(real, fake)
        return seen["rows"]

    criterion.rows = recorded
    for side, optimiser in training.optimisers.items():
        module = getattr(training, side)

        def step(closure=None, side=side, module=module, step=optimiser.step):
            seen[side] = {name: p.grad.clone() for name, p in module.named_parameters()}
            step()
            seen["after " + side] = tiny_gans.full_state(training)[side]

        optimiser.step = step
    training.step()
    seen["rows"] = {n: (term.sides, term.weight) for n, term in seen["rows"].items()}
    return {**seen, "noise": noise[-1], "loader seed": training.loader.seed}


def lacking_pairs():
    """Three updates in which the second process has no pairs in every other step."""
    training = tiny_gans.factorgan()
    complete = iter(training.loader)

    def incomplete():
        for step, real in enumerate(complete):
            lacks = processes.rank() == 1 and step % 2
            yield Observations({k: v for k, v in real.items() if not (lacks and k == "joint")})

    training._observations = incomplete()
    lacked = []
    for _ in range(3):
        report = training.step(report=True)
        lacked.append(bool(report["terms"]["p_dependency"].accuracy.isnan()))
    return {"lacked": lacked, "discriminator": training.discriminator.state_dict()}


def whole_run(folder, stopping=None):
    """A run of U-Nets with all that has a state; the second process is sent SIGTERM."""
    training = tiny_gans.cyclegan(Machine("cpu", precision="16-mixed"), average=0.9, pool=6)
    run = Run(
        training, folder, {}, lambda _: {"score": 1.0}, lambda _: torch.zeros(4, 4, 3).numpy()
    )
    run.resume()
    begun = training.update
    step = training.step

    def step_and_stop(report=False):
        if training.update == stopping and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(report=report)

    training.step = step_and_stop
    done = run.train(WHOLE, 3)
    return {
        "begun": begun,
        "ended": training.update,
        "done": done,
        **tiny_gans.full_state(training),
    }


def main(folder):
    results = {
        "gradients": gradients_of_a_step(),
        "lacking": lacking_pairs(),
        "whole": whole_run(folder / "whole"),
        "stopped": whole_run(folder / "parts", stopping=STOPPED),
        "resumed": whole_run(folder / "parts"),
    }
    torch.save(results, folder / f"{processes.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
