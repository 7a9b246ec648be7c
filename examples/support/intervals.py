"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from scipy import stats


def confidence_interval(deviation: float, number: int) -> float:
    """Returns half the width of the 95% interval of a mean (Student's t).

    Args:
        deviation: The standard deviation of the values, estimated from them (over N − 1).
        number: The number N of values.

    Raises:
        ValueError: If there are fewer than two values.
    """
    if number < 2:
        raise ValueError(f"An interval expects at least two values, but got {number}.")
    return float(deviation / number**0.5 * stats.t.ppf(0.975, number - 1))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95% interval; NaN where there is one value."""
    if len(values) == 1:
        return values[0], float("nan")
    return fmean(values), confidence_interval(stdev(values), len(values))
