"""Diagnostics: right in nats where the truth is known, and findings of deliberate faults."""

import math

import matplotlib as mpl
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from factordisc import (
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Observations,
    Partition,
    diagnostics,
)

mpl.use("agg")
PARTS = Partition({"a": 1, "b": 1})
NAMES = ("a", "b", "p_dependency", "q_dependency")


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


class Fixed(nn.Module):
    """A network that is a given function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def log_c(rho):
    """The log density ratio of a pair of standard normals of correlation rho and of its parts."""

    def value(x):
        a, b = x[:, 0], x[:, 1]
        quadratic = rho * rho * (a * a + b * b) - 2 * rho * a * b
        return -math.log(1 - rho * rho) / 2 - quadratic / (2 * (1 - rho * rho))

    return value


def pairs(number, rho):
    a, noise = torch.randn(2, number)
    return torch.stack([a, rho * a + math.sqrt(1 - rho * rho) * noise], 1)


def made(**functions):
    def nothing(x):
        return 0.01 * x[:, 0]

    chosen = {"p_dependency": log_c(0.8), "q_dependency": log_c(0.3)} | functions
    networks = {name: Fixed(chosen.get(name, nothing)) for name in NAMES}
    return FactorisedDiscriminator(PARTS, Factorisation.flat(["a", "b"]), networks)


def found(d, training=None, held_out=None, fake=None):
    defaults = (pairs(500, 0.8), pairs(500, 0.8), pairs(500, 0.3))
    given = [
        x if x is not None else y
        for x, y in zip((training, held_out, fake), defaults, strict=True)
    ]
    diagnosis = diagnostics.diagnose(d, *given)
    return diagnosis, {(finding.name, finding.term) for finding in diagnosis.findings}


def test_exact_terms_have_no_findings_and_the_right_figures():
    n = 40_000
    diagnosis, findings = found(made(), pairs(n, 0.8), pairs(n, 0.8), pairs(n, 0.3))
    assert findings == set()
    truth = {source: -math.log(1 - rho * rho) / 2 for source, rho in (("p", 0.8), ("q", 0.3))}
    # a standard error of the mean of 40,000 rows is below 0.005 nats
    assert diagnosis.total_correlation["p"] == pytest.approx(truth["p"], rel=0.05)
    assert diagnosis.total_correlation["q"] == pytest.approx(truth["q"], abs=0.01)
    p = diagnosis.terms["p_dependency"]
    assert p.held_out.mean().item() == pytest.approx(truth["p"], rel=0.05)
    assert p.calibration_error < 0.02
    assert diagnosis.terms["q_dependency"].own is None
    figures = diagnosis.to_dict()
    assert figures["total_correlation/gap"] == pytest.approx(truth["p"] - truth["q"], rel=0.05)
    assert figures["p_dependency/accuracy"] == p.accuracy
    assert all(isinstance(value, float) for value in figures.values())


def test_a_learned_dependency_has_the_total_correlation_of_gaussians():
    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x):
            a, b = x[:, 0], x[:, -1]
            return self.linear(torch.stack([a * b, a * a, b * b, a], 1))

    networks = {name: Quadratic() for name in NAMES}
    d = FactorisedDiscriminator(PARTS, Factorisation.flat(["a", "b"]), networks)
    criterion = DiscriminatorLoss(d)
    optimiser = torch.optim.Adam(d.parameters(), 0.03)
    for step in range(800):
        optimiser.param_groups[0]["lr"] = 0.03 if step < 500 else 0.003
        optimiser.zero_grad()
        criterion(pairs(1000, 0.8), pairs(1000, 0.3)).backward()
        optimiser.step()
    diagnosis = diagnostics.diagnose(d, pairs(40_000, 0.8), pairs(40_000, 0.8), pairs(40_000, 0.3))
    assert diagnosis.total_correlation["p"] == pytest.approx(-math.log(0.36) / 2, rel=0.05)
    assert diagnosis.total_correlation["q"] == pytest.approx(-math.log(0.91) / 2, abs=0.01)
    assert diagnosis.findings == ()


def test_accuracy_divergence_and_calibration_against_direct_computation():
    above, below = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-3.0, 1.0])
    term = diagnostics.TermDiagnosis(None, above, below, below)
    assert term.accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    cost = (1 + (-above).exp()).log().mean() + (1 + below.exp()).log().mean()
    assert term.divergence == pytest.approx(math.log(2) - cost.item() / 2)
    # sure of itself, and right half of the time
    lost = diagnostics.TermDiagnosis(None, torch.full((50,), 9.0), torch.full((50,), 9.0), below)
    assert lost.calibration_error == pytest.approx(
        torch.tensor(9.0).sigmoid().item() - 0.5, abs=1e-6
    )
    spread = diagnostics.TermDiagnosis(None, torch.randn(500) + 1, torch.randn(900) - 1, below)
    predicted, observed, weight = spread.reliability(5)
    assert_close(weight, torch.full((5,), 0.2), rtol=0.0, atol=0.01)
    assert bool((predicted.diff() > 0).all())
    assert bool((observed.diff() > 0).all())


FAULTS = {
    "dead": ("a", lambda x: x[:, 0] * 0, {}),
    "saturated": ("b", lambda x: 100 * x[:, 0].sign(), {}),
    "off its data": ("p_dependency", lambda x: 4 * x[:, 0], {"fake": pairs(500, 0.3) + 3}),
    "memorised": (
        "p_dependency",
        lambda x: torch.where(x[:, 0] > 5, 4.0, 0.1 * x[:, 1]),
        {"training": pairs(500, 0.8) + 10},
    ),
    "exhausted": (
        "p_dependency",
        lambda x: torch.where(x[:, 0] > 5, 6.0, 0.1 * x[:, 1]),
        {"training": pairs(20, 0.8) + 10, "held_out": pairs(50, 0.8) + 10},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_named_with_its_term_and_what_to_do(fault):
    name, function, data = FAULTS[fault]
    data = {key: value.double() for key, value in data.items()}
    diagnosis, findings = found(made(**{name: function}), **data)
    assert findings == {(fault, name)}
    (finding,) = diagnosis.findings
    assert repr(name) in finding.text
    assert "nats" in finding.text
    assert f"! {finding.text}" in str(diagnosis)


def test_a_network_that_learned_few_rows_by_heart_is_found():
    def mlp(width):
        return nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 1))

    partition = Partition({"a": 20, "b": 20})
    networks = {name: mlp(20 if len(name) == 1 else 40) for name in NAMES}
    d = FactorisedDiscriminator(partition, Factorisation.flat(["a", "b"]), networks)
    few, fake = torch.randn(20, 40), torch.randn(200, 40)  # there is nothing to learn
    criterion, optimiser = DiscriminatorLoss(d), torch.optim.Adam(d.parameters(), 3e-3)
    for _ in range(200):
        optimiser.zero_grad()
        criterion(Observations(joint=few, a=torch.randn(200, 20)), fake).backward()
        optimiser.step()
    diagnosis = diagnostics.diagnose(d, few, torch.randn(200, 40), fake)
    assert ("memorised", "p_dependency") in {(f.name, f.term) for f in diagnosis.findings}


def test_a_few_rows_are_noise_and_no_finding():
    d = made(p_dependency=lambda x: 5 * x[:, 0])
    _, findings = found(d, training=pairs(4, 0.8), held_out=pairs(4, 0.8))
    assert not findings & {("memorised", "p_dependency")}


def test_what_is_not_there_is_nan_and_modes_stay():
    d = made()
    d.networks["a"].eval()
    lone = Observations(a=torch.randn(50, 1))
    diagnosis = diagnostics.diagnose(d, lone, lone, pairs(50, 0.3))
    assert math.isnan(diagnosis.terms["p_dependency"].accuracy)
    assert math.isnan(diagnosis.to_dict()["p_dependency/held_out"])
    assert math.isnan(diagnosis.to_dict()["b/calibration_error"])
    assert math.isnan(diagnosis.total_correlation["p"])
    assert d.training
    assert not d.networks["a"].training
    with pytest.raises(ValueError, match=r"In `held_out`: .* 2 entries along dim 1"):
        diagnostics.diagnose(d, lone, torch.randn(4, 3), pairs(50, 0.3))


def test_the_page_of_plots_shows_every_term():
    diagnosis, _ = found(made())
    figure = diagnosis.plot()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == list(NAMES)
    figure.canvas.draw()
    text = str(diagnosis)
    assert all(name in text for name in NAMES)
    mpl.pyplot.close(figure)


def test_other_forms_are_diagnosed_too():
    form = Factorisation.remainder(["a", "b"])
    networks = {t.name: nn.Linear(len(t.parts), 1) for t in form.terms}
    d = FactorisedDiscriminator(PARTS, form, networks)
    diagnosis = diagnostics.diagnose(d, pairs(50, 0.8), pairs(50, 0.8), pairs(50, 0.3))
    assert list(diagnosis.terms) == ["a", "b", "remainder"]
    assert math.isnan(diagnosis.total_correlation["p"])
