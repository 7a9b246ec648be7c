"""The least-squares distance: how well a fresh discriminator tells generated from real images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.images import unit
from support.networks import make_critic

# Draws that many fresh images, with shape (number, C, H, W), in [0, 1].
Sample = Callable[[int], Tensor]


class LeastSquaresDistance:
    r"""Trains discriminators on one part of the real images, and measures their loss on the other.

    The loss is that of a least-squares GAN with target 1 for real and 0 for generated images:

    .. math:: L(D) = \mathbb{E}_{x \sim p} (D(x) - 1)^2 + \mathbb{E}_{x \sim q} D(x)^2

    Its minimum over all D is :math:`\int pq / (p + q)`: 1/2 if the generator's q equals p, where
    D = 1/2 is the best that can be said, and 0 if no image has a density under both. So higher is
    better. A discriminator that overfits or was trained too briefly may exceed 1/2 on new images;
    the value depends on the network, its training and the number of images as much as on q, so
    only distances of one protocol are comparable.

    The discriminator is that of Table 5 without spectral normalisation, in the paper with half
    the filters. It meets fresh generated images in every step of training and testing.

    References:
        | Training Generative Adversarial Networks from Incomplete Observations using Factorised
          Discriminators (Stoller et al., 2020), Section 4.2
        | Quantitatively Evaluating GANs With Divergences Proposed for Training (Im et al., 2018)
        | https://arxiv.org/abs/1803.01045

    Args:
        real: Validation images, with shape (N, C, H, W), uint8: 80% of them, chosen by a fixed
            seed, train the discriminators, and the rest tests them.
        device: Where to compute.
        filters: The filters of the discriminator's first layer.
        epochs: How often a discriminator sees every real image.
        batch_size: Real images of a step, with as many generated ones; a short tail of an epoch is
            dropped.
        learning_rate: Of Adam.

    Raises:
        ValueError: If there are fewer than five images, too few for both parts.
    """

    def __init__(
        self,
        real: Tensor,
        device: torch.device,
        filters: int = 16,
        epochs: int = 40,
        batch_size: int = 25,
        learning_rate: float = 1e-4,
    ) -> None:
        if len(real) < 5:
            raise ValueError(
                f"LeastSquaresDistance expects at least five real images, but got {len(real)}."
            )
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        number = int(0.8 * len(real))
        shuffled = unit(real)[order].to(device)
        self.train, self.test = shuffled[:number], shuffled[number:]
        self.filters = filters
        self.epochs = epochs
        self.batch_size = min(batch_size, number)
        self.learning_rate = learning_rate

    def __call__(self, sample: Sample, trainings: int) -> list[float]:
        """Returns the test loss after each training of a new discriminator.

        Args:
            sample: Draws generated images.
            trainings: How many discriminators to train: the k-th starts from seed k, in
                every call.
        """
        losses = []
        for k in range(trainings):
            with torch.random.fork_rng():
                torch.manual_seed(k)
                losses.append(self._test(self._trained(sample), sample))
        return losses

    def _trained(self, sample: Sample) -> nn.Module:
        shape = tuple(self.train.shape[1:])
        network = make_critic(shape, self.filters, normalise=False).to(self.train.device)
        optimiser = torch.optim.Adam(network.parameters(), lr=self.learning_rate, fused=True)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.train), device=self.train.device)
            for batch in order[: len(order) - len(order) % self.batch_size].split(self.batch_size):
                with torch.no_grad():
                    fake = sample(len(batch))
                loss = least_squares_loss(network(self.train[batch]), network(fake))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return network.eval()

    @torch.no_grad()
    def _test(self, network: nn.Module, sample: Sample) -> float:
        return float(least_squares_loss(network(self.test), network(sample(len(self.test)))))


def least_squares_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the mean of (D(x) - 1)² over real images plus that of D(x)² over generated ones."""
    return (real - 1).square().mean() + fake.square().mean()
