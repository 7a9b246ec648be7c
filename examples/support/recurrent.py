"""Networks for sequences: generators that go step by step, and a discriminator that looks back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad
from torch.nn.utils.parametrizations import spectral_norm

SLOPE = 0.2  # of the LeakyReLU


class RecurrentGenerator(nn.Module):
    """A GRU that is fed with noise: everything it has generated may matter for the next step.

    Args:
        steps: The number of steps T.
        channels: The values of a step.
        noise: The size of the noise of a step; the first one makes the initial state.
        width: The size of the state.
    """

    def __init__(self, steps: int, channels: int, noise: int, width: int) -> None:
        super().__init__()
        self.steps = steps
        self.noise = noise * (steps + 1)
        self.start = nn.Linear(noise, width)
        self.gru = nn.GRU(noise + steps, width, batch_first=True)
        self.values = nn.Linear(width, channels)

    def forward(self, noise: Tensor) -> Tensor:
        """Generates sequences (N, T, C) from noise (N, `self.noise`)."""
        first, steps = _divided(noise, self.steps)
        states, _ = self.gru(_numbered(steps), torch.tanh(self.start(first)).unsqueeze(0))
        return self.values(states)


class MarkovGenerator(nn.Module):
    """A network that makes a step of the step before it and fresh noise: a Markov chain.

    No state but the last step is handed on, so that given one step of a sequence, those after
    it are independent of those before it: `markov(1, under="q")` holds by construction.

    Args:
        steps: The number of steps T.
        channels: The values of a step.
        noise: The size of the noise of a step; the first step gets twice as much.
        width: The size of the two hidden layers.
    """

    def __init__(self, steps: int, channels: int, noise: int, width: int) -> None:
        super().__init__()
        self.steps = steps
        self.noise = noise * (steps + 1)
        self.first = nn.Linear(noise, channels)
        self.next = nn.Sequential(
            nn.Linear(channels + noise + steps, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, channels),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Generates sequences (N, T, C) from noise (N, `self.noise`)."""
        first, steps = _divided(noise, self.steps)
        step = self.first(first)
        generated = []
        for inputs in _numbered(steps).unbind(1):
            step = self.next(torch.cat([step, inputs], 1))
            generated.append(step)
        return torch.stack(generated, 1)


def _divided(noise: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Divides noise into that of the start (N, Z) and that of the steps (N, T, Z)."""
    pieces = noise.unflatten(1, (steps + 1, -1))
    return pieces[:, 0], pieces[:, 1:]


def _numbered(steps: Tensor) -> Tensor:
    """Appends to every step (N, T, Z) which one it is, as T indicators."""
    number, length, _ = steps.shape
    indicators = torch.eye(length, dtype=steps.dtype, device=steps.device)
    return torch.cat([steps, indicators.expand(number, -1, -1)], 2)


class CausalNetwork(nn.Module):
    """Gives every step of a sequence a logit that depends on it and on the steps before it.

    Convolutions of two taps, each twice as far apart as those before it, see back to the first
    step. Unlike a recurrent layer they evaluate all steps at once, and each weight is a matrix
    that spectral normalisation can bound; all are.

    References:
        Stoller et al. (2020), Eq. 9.

    Args:
        channels: The values of a step.
        length: The greatest number of steps T; the first is seen from the last.
        width: The number of features.
    """

    def __init__(self, channels: int, length: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(spectral_norm(nn.Linear(channels, width)))
        for distance in (2**i for i in range(max(1, (length - 1).bit_length()))):
            self.layers.extend([nn.LeakyReLU(SLOPE), _TwoSteps(width, distance)])
        self.layers.extend([nn.LeakyReLU(SLOPE), spectral_norm(nn.Linear(width, 1))])

    def forward(self, steps: Tensor, counted: Tensor) -> Tensor:
        """Returns the logits of the steps that count, and zeros, with shape (N, T).

        Args:
            steps: Sequences, with shape (N, T, C).
            counted: 1 where the logit of a step counts, else 0, with shape (N, T).
        """
        return self.layers(steps).squeeze(2) * counted


class _TwoSteps(nn.Module):
    """A convolution of two taps over steps (N, T, C): of each step, and the one `distance` before.

    As one matrix product, whose largest singular value spectral normalisation bounds exactly;
    reshaped kernels of `nn.Conv1d` it bounds only up to the number of taps.
    """

    def __init__(self, width: int, distance: int) -> None:
        super().__init__()
        self.distance = distance
        self.both = spectral_norm(nn.Linear(2 * width, width))

    def forward(self, steps: Tensor) -> Tensor:
        # zeros before the first step; none after the last, so that no step sees a later one
        before = pad(steps, (0, 0, self.distance, 0))[:, : steps.shape[1]]
        return self.both(torch.cat([before, steps], 2))


def framed(steps: Tensor, first: int, total: int, length: int, last: bool) -> tuple[Tensor, ...]:
    """Lays out consecutive steps for a `CausalNetwork` that serves sequences of many lengths.

    One length, so that they are evaluated in one call; behind the steps stand zeros, which a
    causal network does not see.

    Args:
        steps: Consecutive steps of sequences, with shape (N, k, C).
        first: Which step of the whole sequence is the first of them, from 0.
        total: The number of steps of the whole sequence.
        length: The number of steps T to lay out; at least k.
        last: Whether only the logit of the last step counts, as for its dependency on the
            steps before it, or that of every step.

    Returns:
        The steps with `total` indicators of which step each is, with shape (N, T, C + total), and
        which logits count, with shape (N, T).
    """
    number = steps.shape[1]
    which = one_hot(torch.arange(first, first + number, device=steps.device), total)
    numbered = torch.cat([steps, which.to(steps.dtype).expand(len(steps), -1, -1)], 2)
    counted = torch.zeros(length, dtype=steps.dtype, device=steps.device)
    counted[number - 1 if last else 0 : number] = 1
    return pad(numbered, (0, 0, 0, length - number)), counted.expand(len(steps), -1)


def until_the_end(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Lays out sequences that may have ended for a `CausalNetwork`.

    A sequence that ended is complete, and its length is part of it: the last channel is 1 in
    its steps and 0 after them. What stands after the end does not count; the end itself does,
    since how likely a sequence is to stop there is part of its density. (One that was cut is
    no such sequence: it is an observation of its first steps, and given as those alone.)

    Args:
        steps: Sequences, with shape (N, T, C), whose last channel is the mask.

    Returns:
        The steps with zeros after the end, with shape (N, T, C), and which logits count, with
        shape (N, T): those up to the end, and that of the first step after it.
    """
    mask = steps[..., -1].cumprod(1)  # what has ended does not begin again
    values = steps[..., :-1] * mask.unsqueeze(2)
    before = pad(mask[:, :-1], (1, 0), value=1.0)
    return torch.cat([values, mask.unsqueeze(2)], 2), before
