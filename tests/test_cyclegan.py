"""CycleGAN's two generators and their losses, on cases worked by hand."""

import pytest
import torch
from torch import nn

from factordisc import Observations
from support.cyclegan import CycleLoss, Translators


class Plus(nn.Module):
    """Adds a number, and the mean of the noise."""

    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(float(number)))

    def forward(self, images, noise):
        return images + self.number + noise.mean()


def images(value, number=2):
    return torch.full((number, 3, 4, 4), float(value))


def test_maps_become_scenes_and_scenes_maps_each_with_noise_of_its_own():
    generator = Translators(to_scene=Plus(10), to_map=Plus(1))
    noise = torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 2)
    scene, map_ = generator(images(2), images(3), noise)
    assert torch.equal(scene, images(3 + 10))
    assert torch.equal(map_, images(2 + 1 + 0.5))


def test_the_losses_of_a_case_worked_by_hand(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.5))  # noise of 0
    generator = Translators(to_scene=Plus(3), to_map=Plus(1))
    real = Observations(scene=images(0), map=images(9))
    fake = generator(real["scene"], real["map"], torch.zeros(2, 4))
    # Both cycles add 3 + 1, the identities 3 and 1: 10 * (4 + 4) + 10 * 0.5 * (3 + 1).
    assert CycleLoss(noise=2)(generator, real, fake).item() == pytest.approx(100)
    assert CycleLoss(2, cycle=1.0, identity=0.0)(generator, real, fake).item() == pytest.approx(8)
    assert CycleLoss(2, cycle=2.0, identity=1.0)(generator, real, fake).item() == pytest.approx(24)


def test_generators_that_undo_each_other_pay_for_the_identities_only(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.5))
    generator = Translators(to_scene=Plus(-2), to_map=Plus(2))
    real = Observations(scene=images(0.25), map=images(0.75, number=2))
    fake = generator(real["scene"], real["map"], torch.zeros(2, 4))
    assert CycleLoss(2, identity=0.0)(generator, real, fake).item() == pytest.approx(0)
    assert CycleLoss(2)(generator, real, fake).item() == pytest.approx(10 * 0.5 * (2 + 2))


def test_the_losses_reach_both_generators_through_the_fakes_too():
    torch.manual_seed(0)
    generator = Translators(to_scene=Plus(3), to_map=Plus(1))
    real = Observations(scene=images(0), map=images(0.5))
    fake = generator(real["scene"], real["map"], torch.zeros(2, 4))
    CycleLoss(2, identity=0.0)(generator, real, fake).backward()
    # Each takes part in both cycles, once in the fakes and once in undoing them.
    assert generator.to_scene.number.grad.item() == pytest.approx(20)
    assert generator.to_map.number.grad.item() == pytest.approx(20)


def test_noise_comes_from_the_global_generator_and_so_can_be_resumed():
    generator = Translators(to_scene=Plus(3), to_map=Plus(1))
    real = Observations(scene=images(0), map=images(0))
    fake = images(0), images(0)
    loss = CycleLoss(50)
    torch.manual_seed(3)
    first, second = loss(generator, real, fake), loss(generator, real, fake)
    torch.manual_seed(3)
    assert loss(generator, real, fake) == first != second
