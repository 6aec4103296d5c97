"""Check confidence intervals against the formulas behind earlier results, and against SciPy."""

from statistics import StatisticsError, mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from studies.statistics import fraction_interval, margin, mean_interval

values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9)


@given(values)
def test_the_interval_of_a_mean_is_students(numbers: list[float]) -> None:
    centre, low, high = mean_interval(numbers)
    half = stats.t.ppf(0.975, len(numbers) - 1) * stdev(numbers) / len(numbers) ** 0.5
    assert margin(numbers) == pytest.approx(half, rel=1e-12, abs=1e-12)
    assert (low, high) == pytest.approx((mean(numbers) - half, mean(numbers) + half), abs=1e-9)
    if np.std(numbers) > 1e-6:
        theirs = stats.ttest_1samp(numbers, 0.0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=1e-6, abs=1e-6)
    assert low <= centre <= high


def test_one_value_has_no_interval() -> None:
    with pytest.raises(StatisticsError):
        mean_interval([1.0])


def test_the_interval_of_a_fraction_is_wilsons() -> None:
    assert fraction_interval(0.9, 100) == pytest.approx((0.82563, 0.94477), abs=1e-5)
