"""A pool of earlier fakes to show the discriminators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from factordisc import Partition


class FakePool:
    """Half the time, swaps a fake for one of an earlier step.

    The first fakes fill the pool. From then on each is with probability 1/2 given back as it is,
    else it takes the place of a fake from the pool, which is given back instead. Discriminators
    that also see what the generator made some steps ago chase it in circles less.

    References:
        | Learning from Simulated and Unsupervised Images through Adversarial Training
          (Shrivastava et al., 2017), Section 2.3
        | Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks
          (Zhu et al., 2017), Section 4, with 50 images

    Args:
        size: The number of fakes in the pool.
        partition: The form of a fake. One of several parts is kept and swapped as a whole.
        rng: The source of the choices.

    Raises:
        ValueError: If the pool has no place.
    """

    def __init__(self, size: int, partition: Partition, rng: torch.Generator) -> None:
        if size < 1:
            raise ValueError(f"FakePool expects a size of at least 1, but got {size}.")
        self.size = size
        self.partition = partition
        self.rng = rng
        self.filled = 0
        self.stored: list[Tensor] = []

    def __call__(self, fake: Any) -> Any:
        """Returns a batch of the same form as `fake`, rows of which may be from the pool.

        Raises:
            ValueError: If the batch has more rows than the pool.
        """
        arrays = (
            (fake,) if isinstance(fake, Tensor) else tuple(self.partition.split(fake).values())
        )
        rows = len(arrays[0])
        if rows > self.size:
            raise ValueError(
                f"A pool of {self.size} fakes expects batches of at most as many rows, "
                f"but got {rows}."
            )
        if not self.stored:
            self.stored = [x.new_zeros(self.size, *x.shape[1:]) for x in arrays]
        new = min(rows, self.size - self.filled)
        # drawn on the CPU: no update waits for the device
        places = torch.randperm(self.filled, generator=self.rng)[: rows - new]
        swaps = torch.rand(rows - new, generator=self.rng) < 0.5
        device = arrays[0].device
        places, swaps = (t.to(device, non_blocking=True) for t in (places, swaps))
        shown = tuple(
            self._swap(x, stored, new, places, swaps)
            for x, stored in zip(arrays, self.stored, strict=True)
        )
        self.filled += new
        return shown if len(shown) > 1 else shown[0]

    def _swap(self, x: Tensor, stored: Tensor, new: int, places: Tensor, swaps: Tensor) -> Tensor:
        stored[self.filled : self.filled + new] = x[:new]
        x, old = x[new:], stored[places]
        swaps = swaps.reshape(-1, *[1] * (x.dim() - 1))
        stored[places] = torch.where(swaps, x, old)
        return torch.cat([stored[self.filled : self.filled + new], torch.where(swaps, old, x)])

    def state_dict(self) -> dict[str, Any]:
        """Returns the fakes in the pool; the state of `rng` is its owner's."""
        return {"filled": self.filled, "stored": [stored.cpu() for stored in self.stored]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on with the fakes of another pool."""
        self.filled = state["filled"]
        self.stored = [stored.to(device, copy=True) for stored in state["stored"]]
