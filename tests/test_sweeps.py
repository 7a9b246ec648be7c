"""Sweeps: several runs at a time, each trained once, however often the sweep is started."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

import image_pairs
import paired_mnist
import segmentation
import source_separation
from support.claims import claim, is_claimed
from support.sweeps import arguments, sweep
from support.training import Machine

EXAMPLES = Path(__file__).parent.parent / "examples"

# A script as `sweep` expects one, without the seconds that torch takes to be imported: it claims
# its folder, and resumes a run that is finished by doing nothing.
SCRIPT = """
import argparse, json, os, pathlib, sys, time
sys.path.insert(0, {examples!r})
from support.claims import claim
parser = argparse.ArgumentParser()
parser.add_argument("command")
parser.add_argument("--out", type=pathlib.Path)
parser.add_argument("--number", type=int)
parser.add_argument("--updates", type=int)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--root")
given, rest = parser.parse_known_args()
print("number", given.number, given.command, given.resume, given.root, *rest)
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
result = given.out / "result.json"
with claim(given.out):
    if result.exists() and json.loads(result.read_text())["updates"] >= given.updates:
        sys.exit()
    (given.out / "begun").open("a").write("x")
    time.sleep(0.3)
    if given.number == 7:
        sys.exit()  # as one that was stopped and has saved
    if given.number == 13:
        sys.exit("a number that brings bad luck")
    result.write_text(json.dumps({{"updates": given.updates}}))
"""


@dataclass(frozen=True)
class Settings:
    number: int
    updates: int = 10


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(examples=str(EXAMPLES)))
    return path


def runs_of(tmp_path, *numbers, updates=10):
    return {tmp_path / f"run{n}": Settings(n, updates) for n in numbers}


def begun(folder):
    return len((folder / "begun").read_text())


def test_a_sweep_trains_what_is_not_finished(script, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = runs_of(tmp_path, 1, 2, 3)
    sweep(script, dict(list(runs.items())[:2]), Machine("cpu"))
    assert "0 of 2 runs are finished." in capsys.readouterr().out
    finished = []
    options = {"root": Path("there"), "smoke": True, "none": None}
    sweep(script, runs, Machine("cpu"), 3, options, finish=lambda: finished.append(True))
    assert "2 of 3 runs are finished." in capsys.readouterr().out
    assert [begun(folder) for folder in runs] == [1, 1, 1]
    assert finished == [True]
    log = (tmp_path / "run3" / "log.txt").read_text()
    assert "number 3 train True there" in log
    assert "--device cpu --precision 32-true --no-compile" in log
    assert "--smoke" in log
    assert "none" not in log
    assert f"threads {max(1, os.cpu_count() // 3)}" in log


def test_runs_that_shall_be_longer_go_on(script, tmp_path):
    for updates, expected in ((10, 1), (10, 1), (20, 2), (10, 2)):
        runs = runs_of(tmp_path, 1, updates=updates)
        sweep(script, runs, Machine("cpu"))
        assert begun(tmp_path / "run1") == expected


def test_once_a_run_was_stopped_no_other_is_begun(script, tmp_path, capsys):
    runs = runs_of(tmp_path, 1, 7, 2)
    sweep(script, runs, Machine("cpu"))
    assert "Stopped and saved. The same command goes on." in capsys.readouterr().out
    assert [(folder / "begun").exists() for folder in runs] == [True, True, False]


def test_failed_runs_are_named_after_the_others_are_done(script, tmp_path):
    runs = runs_of(tmp_path, 13, 1)
    finished = []
    with pytest.raises(SystemExit, match=r"Failed, see log\.txt in: \S+run13$"):
        sweep(script, runs, Machine("cpu"), finish=lambda: finished.append(True))
    assert (tmp_path / "run1" / "result.json").exists()
    assert "a number that brings bad luck" in (tmp_path / "run13" / "log.txt").read_text()
    assert finished == [True]


def test_started_twice_a_sweep_trains_no_run_twice(script, tmp_path):
    runs = runs_of(tmp_path, 1, 2, 3, 4)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(sweep, script, runs, Machine("cpu"), 2) for _ in range(2)]
    for each in both:
        each.result()
    assert [begun(folder) for folder in runs] == [1] * 4


def test_a_run_that_another_process_trains_has_not_failed(script, tmp_path, capsys):
    runs = runs_of(tmp_path, 1, 2)
    held = claim(tmp_path / "run1")
    sweep(script, runs, Machine("cpu"))
    held.release()
    assert f"Trained by other processes: {tmp_path / 'run1'}" in capsys.readouterr().out
    assert not (tmp_path / "run1" / "log.txt").exists()  # nor was it started in vain
    assert begun(tmp_path / "run2") == 1


def test_the_claim_of_a_killed_process_is_void(tmp_path):
    program = (
        f"import sys, time; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "from pathlib import Path; from support.claims import claim\n"
        f"held = claim(Path({str(tmp_path)!r})); print('claimed', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"claimed\n"
    assert is_claimed(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not is_claimed(tmp_path)
    claim(tmp_path).release()


def test_looking_at_a_claim_takes_it_from_nobody(tmp_path):
    """A look holds the lock for a moment; who claims meanwhile waits for that."""
    end = time.monotonic() + 0.5

    def look():
        while time.monotonic() < end:
            is_claimed(tmp_path)

    with ThreadPoolExecutor() as pool:
        looking = [pool.submit(look) for _ in range(2)]
        while time.monotonic() < end:
            claim(tmp_path).release()
        for each in looking:
            each.result()
    assert not is_claimed(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@dataclass(frozen=True)
class Everything:
    name: Literal["a", "b"] = "a"
    same: Annotated[float, tyro.conf.arg(name="lambda")] = 0.5
    learning_rate: float = 1e-4
    """Documented."""
    flag: bool = False
    numbers: tuple[int, ...] = (1, 2)
    limit: int | None = None


@pytest.mark.parametrize(
    "settings",
    [
        Everything(),
        Everything("b", 0.25, 1e-7, True, (3, 4, 5), 6),
        Machine("cpu", "bf16-mixed", True, True, 2),
        *(
            replace(script.Settings(), seed=5, updates=7)
            for script in (paired_mnist, image_pairs, segmentation, source_separation)
        ),
        replace(paired_mnist.Settings(), same=0.25, pairing="redrawn"),
    ],
    ids=lambda settings: f"{type(settings).__module__}.{type(settings).__name__}",
)
def test_the_command_line_of_settings_gives_them_back(settings):
    assert tyro.cli(type(settings), args=arguments(settings)) == settings
