import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from factordisc import Logistic


def loss(numerator, denominator):
    return Logistic().loss(numerator, denominator)


def test_value_is_two_cross_entropies_against_numpy():
    rng = np.random.default_rng(0)
    above, below = rng.normal(size=7), rng.normal(size=5)
    expected = np.log1p(np.exp(-above)).mean() + np.log1p(np.exp(below)).mean()
    value = loss(torch.from_numpy(above), torch.from_numpy(below))
    assert value.shape == ()
    assert_close(value.item(), float(expected), rtol=1e-14, atol=0.0)


def test_chance_costs_two_log_two():
    assert_close(loss(torch.zeros(3), torch.zeros(8)).item(), 2 * math.log(2))


@pytest.mark.parametrize("ratio", [0.05, 1.0, 4.0])
def test_the_minimum_is_the_log_ratio(ratio):
    # One point x with numerator probability r/(1+r): d/dl [r softplus(-l) + softplus(l)] = 0.
    logit = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    above, below = loss(logit, torch.zeros(())), loss(torch.zeros(()), logit)
    (gradient,) = torch.autograd.grad(ratio * above + below, logit)
    assert abs(gradient.item()) < 1e-12


def test_gradcheck():
    above, below = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (above.requires_grad_(), below.requires_grad_()))


def test_values_and_gradients_at_extreme_logits_in_float32():
    above = torch.tensor([-100.0, 100.0], requires_grad=True)
    below = torch.tensor([-100.0, 100.0, 100.0, -100.0], requires_grad=True)
    value = loss(above, below)
    value.backward()
    assert_close(value.item(), 50.0 + 50.0)
    # Wrong by 100 nats: the full -1/N and 1/M, exactly; right by 100 nats: e^-100 of it.
    assert_close(above.grad, torch.tensor([-0.5, 0.0]), rtol=0.0, atol=1e-40)
    assert_close(below.grad, torch.tensor([0.0, 0.25, 0.25, 0.0]), rtol=0.0, atol=1e-40)


def test_unchanged_when_a_batch_is_repeated():
    above, below = torch.randn(6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    assert_close(loss(above.repeat(2), below.repeat(2)), loss(above, below))


def test_classes_are_averaged_by_themselves():
    above, below = torch.randn(6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    assert_close(loss(above.repeat(5), below), loss(above, below))
    assert_close(loss(above, below.repeat(3)), loss(above, below))


def test_a_logit_is_the_log_ratio():
    logits = torch.tensor([-1e4, 0.0, 3.0])
    assert Logistic().log_ratio(logits) is logits


def test_repr():
    assert repr(Logistic()) == "Logistic()"
