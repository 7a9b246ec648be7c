"""CycleGAN, the baseline that learns from unpaired images alone (Section 4.3).

Its two discriminators, one for scenes and one for maps, are the marginals of a flat form whose
parts are independent under both sources; so it is trained as every other model here, and all that
it has of its own are two generators and the losses of this module.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from factordisc import Observations
from support.training import uniform_noise


class Translators(nn.Module):
    """Two generators, one in each direction between two domains of images.

    Args:
        to_scene: Takes a map and noise (N, `noise`), returns a scene.
        to_map: Takes a scene and noise (N, `noise`), returns a map.
    """

    def __init__(self, to_scene: nn.Module, to_map: nn.Module) -> None:
        super().__init__()
        self.to_scene = to_scene
        self.to_map = to_map

    def forward(self, scene: Tensor, map_: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turns maps into scenes, and scenes into maps.

        Called with what it returned, it closes both cycles; called with the two the other
        way round, it should change nothing.

        Args:
            scene: Images for `to_map`, with shape (N, C, H, W).
            map_: Images for `to_scene`, with shape (N, C, H, W). The two are not paired.
            noise: Noise for both generators, with shape (N, 2 * `noise`).

        Returns:
            The scenes made of the maps, and the maps made of the scenes.
        """
        for_scene, for_map = noise.chunk(2, dim=1)
        return self.to_scene(map_, for_scene), self.to_map(scene, for_map)


class CycleLoss(NamedTuple):
    r"""What CycleGAN's generators pay besides the GAN loss.

    With the generators F from maps m to scenes and G from scenes s to maps, this is
    :math:`\lambda \left( |F(G(s)) - s| + |G(F(m)) - m| \right)
    + \lambda \iota \left( |F(s) - s| + |G(m) - m| \right)`, each a mean over all values.

    Note:
        The official code works on images in [-1, 1], where these losses are twice what they
        are for the images in [0, 1] here; the weights are the official ones none the less.

    References:
        | Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks (Zhu et
          al., 2017), Eq. 2 and Section 5.2
        | https://github.com/junyanz/pytorch-CycleGAN-and-pix2pix (default weights)

    Args:
        noise: The number of noise variables of a generator.
        cycle: The weight :math:`\lambda` of the cycles.
        identity: The weight :math:`\iota` of the identities, in proportion to `cycle`.
    """

    noise: int
    cycle: float = 10.0
    identity: float = 0.5

    def __call__(
        self, generator: nn.Module, real: Observations, fake: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Computes the losses.

        Args:
            generator: The `Translators`.
            real: Observations with the patterns "scene" and "map".
            fake: The scenes and maps that the generators made of them.

        Returns:
            A scalar.
        """
        images = real["scene"], real["map"]
        cycle = self._distance(self._translate(generator, *fake), images)
        identity = self._distance(self._translate(generator, images[1], images[0]), images)
        return self.cycle * (cycle + self.identity * identity)

    def _translate(
        self, generator: nn.Module, scene: Tensor, map_: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The global generator: a training saves its state with that of its own.
        noise = uniform_noise(len(scene), 2 * self.noise, torch.default_generator, scene.device)
        return generator(scene, map_, noise)

    def _distance(self, made: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([l1_loss(m, x) for m, x in zip(made, images, strict=True)]).sum()
