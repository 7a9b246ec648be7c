"""Scores of generated samples against values worked out by hand, and against SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from support import metrics


def test_dependency_error_of_tables_worked_by_hand():
    # Two classes, always equal: ratios 2 on the diagonal, 0 off it. Independent: 1 everywhere.
    equal = metrics.class_table(torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    independent = metrics.class_table(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 2)
    assert metrics.dependency_error(equal, equal) == 0
    assert metrics.dependency_error(equal, independent) == pytest.approx(1.0)
    # Unequal marginals tell the outer product from its transpose: upper class 0 with
    # probability 3/4, lower with 1/2; ratios (2/3, 4/3; 2, 0) for the table below.
    skew = metrics.class_table(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0]), 2)
    expected = (abs(2 / 3 - 1) + abs(4 / 3 - 1) + abs(2 - 1) + abs(0 - 1)) / 4
    assert metrics.dependency_error(skew, independent) == pytest.approx(expected)


def test_a_class_that_is_never_generated_counts_as_a_ratio_of_zero():
    real = torch.full((10, 10), 0.01, dtype=torch.float64)
    generated = metrics.class_table(torch.zeros(5).long(), torch.zeros(5).long(), 10)
    # One cell has ratio 1 in both; the other 99 have 1 against 0.
    assert metrics.dependency_error(real, generated) == pytest.approx(0.99)


def test_frechet_distance_against_scipy():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(50, 50))
    real = rng.normal(size=(2000, 50)) @ mix
    generated = rng.normal(size=(3000, 50)) @ (mix + 0.2 * rng.normal(size=(50, 50))) + 0.3
    covariances = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = real.mean(0) - generated.mean(0)
    expected = difference @ difference + np.trace(sum(covariances) - 2 * root)
    distance = metrics.FrechetDistance(torch.from_numpy(real).float())
    # float32 features, and eigenvalues in place of a matrix root
    assert distance(torch.from_numpy(generated).float()) == pytest.approx(expected, rel=1e-3)
    assert distance(torch.from_numpy(real).float()) == pytest.approx(0, abs=1e-2)
