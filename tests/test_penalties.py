"""Gradient penalties against their closed forms for linear and quadratic networks."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    GradientPenalty,
    Observations,
    Partition,
)

PARTS = Partition({"a": 2, "b": 3})
WIDTHS = {"a": 2, "b": 3, "p_dependency": 5, "q_dependency": 5}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


class Quadratic(nn.Module):
    """d(x) = w |x|^2 / 2, whose gradient w x says where it was taken."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.weight * x.square().sum(1) / 2


def made(penalty, network=Quadratic):
    networks = {name: network() for name in WIDTHS}
    d = FactorisedDiscriminator(PARTS, Factorisation.flat(["a", "b"]), networks)
    sampler = DependencySampler(PARTS, torch.Generator().manual_seed(0))
    return d, DiscriminatorLoss(d, sampler, penalties={"p_dependency": penalty})


REAL, FAKE = torch.randn(6, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)


@pytest.mark.parametrize("at", ["numerator", "denominator", "generated"])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_penalty_is_taken_where_it_says(at, target):
    d, criterion = made(GradientPenalty(at, 3.0, target))
    rows = criterion.rows(REAL, FAKE)
    x = getattr(rows["p_dependency"], at)
    assert len(x) == (8 if at == "generated" else 6)
    weight = d.networks["p_dependency"].weight
    expected = 3 * ((weight * x.norm(dim=1)) - target).square().mean()
    penalty = criterion.penalty(rows)
    assert_close(penalty, expected)
    (ours,) = torch.autograd.grad(penalty, weight)
    (theirs,) = torch.autograd.grad(expected, weight)
    assert_close(ours, theirs)


def test_between_lies_on_the_segments_of_rows():
    seen = []

    class Recorded(Quadratic):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    _, criterion = made(GradientPenalty("between", 1.0, 1.0), Recorded)
    rows = criterion.rows(REAL, FAKE)
    seen.clear()
    criterion.penalty(rows)
    above, below = rows["p_dependency"].sides
    share = (seen[-1] - below) / (above - below)
    moved = (above - below).abs() > 1e-9
    assert bool(((share > 0) & (share < 1))[moved].all())
    for row, places in zip(share, moved, strict=True):
        assert bool((row[places] - row[places][0]).abs().max() < 1e-6)
    assert share[moved].std() > 0.05


def test_a_penalty_of_every_third_step_weighs_three_times_as_much():
    penalty = GradientPenalty("numerator", 2.0, every=3)
    d, criterion = made(penalty)
    rows = criterion.rows(REAL, FAKE)
    values = [criterion.penalty(rows).item() for _ in range(7)]
    full = 6 * (d.networks["p_dependency"].weight * REAL.norm(dim=1)).square().mean().item()
    assert values == pytest.approx([full, 0, 0, full, 0, 0, full])
    everywhere = DiscriminatorLoss(d, penalties={"*": GradientPenalty("numerator", 1.0, every=2)})
    first, second = (everywhere.penalty(everywhere.rows(REAL, FAKE)) for _ in range(2))
    assert first > 0  # each term counts for itself
    assert second == 0


def test_all_parts_of_floating_point_are_one_row():
    class Both(nn.Module):
        def forward(self, a, b):
            return a.square().sum(1) / 2 + b.double().sum(1)

    partition = Partition.fields("a", "b")
    form = Factorisation.joint(["a", "b"])
    d = FactorisedDiscriminator(partition, form, {"joint": Both()})
    criterion = DiscriminatorLoss(d, penalties={"joint": GradientPenalty("numerator", 1.0)})
    a, floats, integers = torch.randn(6, 2), torch.randn(6, 3), torch.ones(6, 3, dtype=torch.int64)
    for b, extra in ((floats, 3.0), (integers, 0.0)):
        rows = criterion.rows((a, b), (a, b))
        assert_close(criterion.penalty(rows), a.square().sum(1).mean() + extra)
    rows = criterion.rows((integers, integers), (integers, integers))
    with pytest.raises(ValueError, match=r"of term 'joint' expects a part of floating point, but"):
        criterion.penalty(rows)


def test_in_single_precision_under_autocast():
    torch.set_default_dtype(torch.float32)
    d, criterion = made(GradientPenalty("numerator", 1.0))
    real, fake = REAL.float(), FAKE.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion.penalty(criterion.rows(real, fake))
    weight = d.networks["p_dependency"].weight
    assert loss.dtype == torch.float32
    assert_close(loss, (weight * real.norm(dim=1)).square().mean())


def test_a_gradient_of_zero_is_no_obstacle():
    d, criterion = made(GradientPenalty("numerator", 1.0, 1.0))
    with torch.no_grad():
        d.networks["p_dependency"].weight.zero_()
    loss = criterion(REAL, FAKE)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in d.parameters())


def test_without_data_nothing_is_penalised():
    _, criterion = made(GradientPenalty("generated", 1.0))
    assert criterion.penalty(criterion.rows(Observations(a=REAL[:, :2]), FAKE)) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", 1.0), r"`at` is one of \('numerator', .*, but got 'nowhere'"),
        (("numerator", -1.0), "`weight` is finite and at least 0, but got -1.0"),
        (("numerator", 1.0, float("nan")), "`target` is finite and at least 0, but got nan"),
        (("numerator", 1.0, 0.0, 0), "`every` is an integer of at least 1, but got 0"),
        (("numerator", 1.0, 0.0, 2.0), "`every` is an integer of at least 1, but got 2.0"),
    ],
)
def test_what_is_no_penalty_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        GradientPenalty(*arguments)
