"""Training a grid of runs: several at a time, on one machine or on several.

A run is trained by a process of its own, started by the script's `train` command. No scheduler is
needed, and any will do: whoever starts the same sweep again, be it on another machine that shares
the folder or as one of the tasks of a SLURM job array, takes the runs that nobody has claimed
(see `support.claims`). What a scheduler library adds, queues and a server, a grid of some dozens
of hours-long runs does not need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from threading import Event
from typing import Any, get_type_hints

from tqdm.auto import tqdm

from support.claims import is_claimed
from support.results import read_rows
from support.training import Machine


def sweep(
    script: str | Path,
    runs: Mapping[Path, Any],
    machine: Machine,
    processes: int = 1,
    options: Mapping[str, Any] | None = None,
    finish: Callable[[], object] = lambda: None,
) -> None:
    """Trains runs; finished ones are skipped and interrupted ones go on.

    Ctrl-C reaches the runs too, which save; once a run was stopped, no other is begun.

    Args:
        script: The script, with a command `train` that takes the settings, the machine, `--out`
            and `--resume`, and writes result.json with the settings at the end.
        runs: The settings of every run by its folder: a dataclass with a field `updates`. A
            folder gets a log.txt.
        machine: On what each run is trained.
        processes: How many runs to train at a time.
        options: Further options of `train`; one of ``None`` is left out.
        finish: What to do with the finished runs, before failed ones are named.

    Raises:
        SystemExit: If runs have failed; it names their folders.
    """
    todo = [folder for folder, settings in runs.items() if not is_finished(folder, settings)]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished.", flush=True)
    # Runs side by side that each took all cores would mostly wait for each other.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}

    stopped = Event()

    def launch(folder: Path) -> int:
        if stopped.is_set() or is_claimed(folder) or is_finished(folder, runs[folder]):
            return 0
        command = [sys.executable, str(script), "train", "--resume", "--out", str(folder)]
        for part in (arguments(runs[folder]), arguments(machine), flags(options or {})):
            command += part
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env={**threads, **os.environ}, check=False
            ).returncode
        if code == 0 and not is_finished(folder, runs[folder]):
            stopped.set()
        return code

    with ThreadPoolExecutor(processes) as pool:
        codes = list(tqdm(pool.map(launch, todo), total=len(todo), desc="sweep", unit="run"))
    if stopped.is_set():
        print("Stopped and saved. The same command goes on.")
    # one that could not claim its folder has not failed: another process trains it
    elsewhere = [folder for folder in todo if is_claimed(folder)]
    if elsewhere:
        print("Trained by other processes: " + ", ".join(map(str, elsewhere)))
    finish()
    failed = [f for f, code in zip(todo, codes, strict=True) if code and f not in elsewhere]
    failed = [folder for folder in failed if not is_finished(folder, runs[folder])]
    if failed:
        raise SystemExit("Failed, see log.txt in: " + ", ".join(map(str, failed)))


def is_finished(folder: Path, settings: Any) -> bool:
    """Whether a run has all its updates; one that has fewer can go on."""
    result = folder / "result.json"
    return result.exists() and read_rows([result])[0]["updates"] >= settings.updates


def arguments(settings: Any) -> list[str]:
    """Returns the command line that makes a dataclass, under the names that tyro gives it."""
    hints = get_type_hints(type(settings), include_extras=True)
    named = {}
    for each in fields(settings):
        notes = getattr(hints[each.name], "__metadata__", ())  # those of Annotated
        names = [note.name for note in notes if getattr(note, "name", None)]
        named[names[0] if names else each.name] = getattr(settings, each.name)
    return flags(named)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Returns a command line: switches for bools, several values for a sequence."""
    line: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            line += [f"--{flag}", *map(str, value)]
        elif value is not None:
            line += [f"--{flag}", str(value)]
    return line
