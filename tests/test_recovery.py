"""The idea itself: a known log ratio, recovered from few complete and many incomplete samples."""

import statistics

import pytest

import gaussian_ratio


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [50, 200])
def test_incomplete_observations_improve_the_estimate_of_a_known_log_ratio(pairs):
    def median(model, key):
        settings = gaussian_ratio.Settings()
        runs = [gaussian_ratio.learn(model, pairs, seed, settings) for seed in range(3)]
        return statistics.median(run[key] for run in runs)

    assert median("factorised", "error") < median("joint", "error")
    assert median("factorised", "correlation") > median("joint", "correlation")
