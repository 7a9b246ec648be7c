"""The least-squares distance on distributions for which it is known."""

import pytest
import torch

from support.least_squares import LeastSquaresDistance, least_squares_loss

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def faint(number, rng, level=0.2):
    """Images of noise about a level of grey: 100 of them hold nothing to learn by heart."""
    return level + 0.1 * torch.rand(number, 1, 32, 32, generator=rng)


def distance(sample, real=None, trainings=2):
    real = faint(400, seeded()) if real is None else real
    # a small network with a larger learning rate converges in a second
    metric = LeastSquaresDistance(
        (real * 255).round().byte(), CPU, filters=2, epochs=15, learning_rate=2e-3
    )
    return metric(sample, trainings)


def test_the_loss_by_hand():
    half = torch.full((4, 1), 0.5)
    assert least_squares_loss(half, half) == 0.5
    assert least_squares_loss(torch.ones(3, 1), torch.zeros(5, 1)) == 0
    real, fake = torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([[3.0], [0.0]])
    torch.testing.assert_close(least_squares_loss(real, fake), torch.tensor(2 / 3 + 9 / 2))


def test_equal_distributions_give_a_half():
    rng = seeded(1)
    for value in distance(lambda number: faint(number, rng)):
        assert value == pytest.approx(0.5, abs=0.03)


def test_disjoint_distributions_give_nothing():
    rng = seeded(1)
    for value in distance(lambda number: faint(number, rng, level=0.7)):
        assert 0 <= value < 0.03


def test_a_generator_that_is_right_half_of_the_time_gives_a_third():
    # p is dark; q is dark or light with probability 1/2. The integral of pq / (p + q) is
    # 1 * 0.5 / 1.5 on the dark ones and 0 on the light ones.
    rng = seeded(1)

    def sample(number):
        light = (torch.rand(number, 1, 1, 1, generator=rng) < 0.5).float()
        return faint(number, rng) + 0.5 * light

    values = distance(sample, trainings=3)
    # 80 test images: the share of light ones has a standard deviation of 0.056, which moves
    # D(dark)² = 4/9 by 0.025; three of them
    for value in values:
        assert value == pytest.approx(1 / 3, abs=0.08)


def test_four_fifths_train_and_the_rest_tests():
    real = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1).expand(50, 1, 32, 32)
    metric = LeastSquaresDistance(real, CPU)
    assert len(metric.train) == 40
    assert len(metric.test) == 10
    levels = torch.cat([metric.train, metric.test])[:, 0, 0, 0] * 255
    assert levels.round().sort().values.tolist() == list(range(50))
    assert (levels.round()[1:] < levels.round()[:-1]).any()  # at random
    assert torch.equal(metric.test, LeastSquaresDistance(real, CPU).test)
    with pytest.raises(ValueError, match="at least five real images, but got 4"):
        LeastSquaresDistance(real[:4], CPU)


def test_every_step_meets_fresh_images_and_the_global_seed_is_left_alone():
    numbers = []

    def sample(number):
        numbers.append(number)
        return torch.zeros(number, 1, 32, 32)

    real = torch.zeros(70, 1, 32, 32, dtype=torch.uint8)
    metric = LeastSquaresDistance(real, CPU, filters=1, epochs=3, batch_size=25)
    before = torch.get_rng_state()
    first = metric(sample, 2)
    # 56 images make two batches of 25 in each of three epochs; then 14 are tested
    assert numbers == [25] * 6 + [14] + [25] * 6 + [14]
    assert torch.equal(torch.get_rng_state(), before)
    assert first[0] != first[1]
    assert metric(sample, 2) == first
