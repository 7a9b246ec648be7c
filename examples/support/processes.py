"""The processes of one run, which `torchrun` starts: one per device, and one if it did not."""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import active_children
from torch.nn.parallel import DistributedDataParallel


def join(device: torch.device) -> None:
    """Joins the other processes of the run, if there are any; they wait for each other here."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    dist.init_process_group(
        # what is said on the CPU, by `agree` and `gather`, never waits for a GPU
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(hours=2),  # the first process scores while the others wait
    )
    atexit.register(dist.destroy_process_group)


def count() -> int:
    """Returns the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def distributed(module: nn.Module) -> nn.Module:
    """Makes the gradients of a module the mean of all processes' gradients.

    Call it once before every backward pass: each call takes the first process's buffers over,
    which a graph that is still needed may hold.
    """
    return module if count() == 1 else DistributedDataParallel(module)


def agree(*flags: bool) -> list[bool]:
    """Returns for every flag whether any process has raised it.

    It takes about a tenth of a millisecond between processes of one machine.
    """
    if count() == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return raised.bool().tolist()


def gather(content: Any) -> list[Any]:
    """Returns what every process gives, in their order."""
    if count() == 1:
        return [content]
    contents = [None] * count()
    dist.all_gather_object(contents, content)
    return contents


def broadcast(content: Any) -> Any:
    """Returns what the first process gives."""
    if count() == 1:
        return content
    contents = [content]
    dist.broadcast_object_list(contents)
    return contents[0]


def shield_workers() -> None:
    """Takes the processes that load data out of this one's group, to which Ctrl-C is sent.

    `torchrun` too sends SIGTERM to the whole group. A run whose workers had ended could not finish
    its update and save.
    """
    for worker in active_children():
        with suppress(OSError):  # only a fork can be moved
            os.setpgid(worker.pid, worker.pid)
