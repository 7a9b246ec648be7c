"""The density chasm: the closed form, the critics, the forms, and whole runs in small."""

import json
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

import density_chasm
from density_chasm import METHODS, GaussianPairs, LastOnPast, Quadratic, Settings


def distributions(problem):
    """p and q as torch writes them, in float64."""
    size = problem.pairs.numel()
    covariance = torch.eye(size, dtype=torch.float64)
    for a, b in problem.pairs.tolist():
        covariance[a, b] = covariance[b, a] = problem.correlation
    mean = torch.zeros(size, dtype=torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    return MultivariateNormal(mean, covariance), MultivariateNormal(mean, identity)


def test_the_truth_is_that_of_torch():
    problem = GaussianPairs.draw(10)
    p, q = distributions(problem)
    x = torch.cat([p.sample((20,)), q.sample((20,))])
    assert_close(problem.log_ratio(x), p.log_prob(x) - q.log_prob(x), rtol=0, atol=1e-10)
    assert problem.divergence == pytest.approx(kl_divergence(p, q).item(), abs=1e-10)


def test_the_benchmark_is_that_of_the_paper():
    problem = GaussianPairs.draw(320)
    assert problem.divergence == 80
    # rho = sqrt(1 - exp(-4 MI / d)) of their code, with a mutual information of 80 nats
    assert problem.correlation == pytest.approx(math.sqrt(1 - math.exp(-4 * 80 / 320)))


def test_samples_have_the_moments_of_p_and_of_q():
    problem, number = GaussianPairs.draw(6), 100_000
    for sample, law in zip(
        (problem.sample_p, problem.sample_q), distributions(problem), strict=True
    ):
        x = sample(number).double()
        # a product of two standard normals has a variance of at most 2; five standard deviations
        bound = 5 * math.sqrt(2 / number)
        assert_close(x.T @ x / number, law.covariance_matrix, rtol=0, atol=bound)


def test_a_problem_has_an_even_number_of_dimensions():
    with pytest.raises(ValueError, match="even number of dimensions from 4, got 7"):
        GaussianPairs.draw(7)


def test_the_critics_hold_the_truth():
    """With the right weights d is the closed form: nothing is lost by the choice of critics."""
    problem = GaussianPairs.draw(4)
    rho = problem.correlation
    x = problem.sample_p(50).double()
    p, q = distributions(problem)
    quadratic = Quadratic(4).double()
    last_on_past = LastOnPast(4).double()
    with torch.no_grad():
        quadratic.matrix += (q.precision_matrix - p.precision_matrix) / 2
        quadratic.constant += problem.divergence
        # log N(x; rho y, s) - log N(x; 0, 1) with past = rho y / s
        partner = {a: b for pair in problem.pairs.tolist() for a, b in (pair, pair[::-1])}[3]
        variance = 1 - rho**2
        last_on_past.regression[partner] += rho / variance
        last_on_past.polynomial[0] += (1 - 1 / variance) / 2
        last_on_past.polynomial[2] -= variance / 2
        last_on_past.polynomial[4] -= math.log(variance) / 2
    assert_close(quadratic(x), problem.log_ratio(x), rtol=0, atol=1e-10)
    conditional = Normal(rho * x[:, partner], math.sqrt(variance)).log_prob(x[:, 3])
    expected = conditional - Normal(0.0, 1.0).log_prob(x[:, 3])
    assert_close(last_on_past(x), expected, rtol=0, atol=1e-10)


def test_the_factorised_forms_ask_for_what_their_user_knows():
    problem = GaussianPairs.draw(8)
    known = density_chasm.pairs(problem).factorisation
    assert known.required_observations() == (("pair1",), ("pair2",), ("pair3",), ("pair4",))
    assert str(known.terms[0]) == "log p(pair1) − log q(pair1)"
    unknown = density_chasm.chain(problem).factorisation
    assert len(unknown.terms) == 7
    # nothing is learned from q: its marginals are those of p, and it has no dependency
    assert {density.source for term in unknown.terms for density in term.denominator} == {"p"}


def test_waymarks_lead_from_p_to_q():
    p, q = torch.randn(2, 5, 3)
    assert_close(density_chasm.waymark(p, q, 0.0), p)
    assert_close(density_chasm.waymark(p, q, 1.0), q)
    assert [density_chasm.published_bridges(d) for d in (40, 80, 160, 320)] == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["pairs", "chain"])
def test_a_factorised_ratio_recovers_the_divergence(name):
    """Four pairs, 2 nats: within five standard deviations of what n samples can say.

    The log ratio of a pair has the variance rho^2 under p, so the held-out mean of d/2 of them
    has a standard deviation of sqrt(d/2 rho^2 / n); a maximum-likelihood estimate from n
    samples has the same. A classifier on n rows of each side and finitely many updates is
    granted twice that. What a network misses when its terms do not train is the whole 2 nats.
    """
    dimensions, number = 8, 10_000
    settings = Settings(samples=number, held_out=number)
    row = density_chasm.learn(name, dimensions, 0, settings)
    deviation = math.sqrt(dimensions / 2 * (1 - math.exp(-1)) / number)
    assert abs(row["estimate"] - row["truth"]) < 5 * math.sqrt(1 + 2**2) * deviation
    # and point by point, also where p has no samples
    assert row["error_p"] < 0.1 * row["truth"]
    assert row["error_q"] < 0.2 * row["truth"]


def test_a_comparison_runs_draws_and_goes_on(tmp_path, capsys):
    density_chasm.main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["dimensions"]) for r in results["rows"]] == [
        (name, dimensions) for name in METHODS for dimensions in (8, 12)
    ]
    assert {"torch", "factordisc", "command", "machine"} <= set(results)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    density_chasm.main(["--smoke", "--methods", "pairs", "--out", str(tmp_path)])
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert again == [row for row in results["rows"] if row["method"] == "pairs"]
    assert "relative_error" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is a run of other settings"):
        density_chasm.main(["--smoke", "--batch-size", "16", "--out", str(tmp_path)])
