"""Student's intervals, against tabulated quantiles."""

import numpy as np
import pytest

from support.intervals import confidence_interval, mean_interval


def test_the_half_width_is_that_of_students_t():
    # the 97.5% quantile for two degrees of freedom is 4.3027
    assert confidence_interval(1.0, 3) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least two values, but got 1"):
        confidence_interval(0.0, 1)
    mean, half = mean_interval([5.0])
    assert mean == 5
    assert np.isnan(half)
