"""Confidence intervals of means and of fractions."""

from collections.abc import Sequence
from statistics import mean, stdev

from scipy import stats

LEVEL = 0.95
"""The confidence level of every interval of this project."""


def margin(values: Sequence[float]) -> float:
    """Return half the width of Student's 95 % confidence interval of the mean.

    Args:
        values: at least 2; the interval has n - 1 degrees of freedom.

    Raises:
        StatisticsError: there are fewer than two values.
    """
    spread = stdev(values)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return quantile * spread / float(len(values) ** 0.5)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and the bounds of its 95 % confidence interval; see :func:`margin`."""
    centre, half = mean(values), margin(values)
    return centre, centre - half, centre + half


def fraction_interval(fraction: float, count: int) -> tuple[float, float]:
    """Return the bounds of the 95 % confidence interval of a fraction of `count` items.

    Wilson's interval (1927).

    Args:
        fraction: in [0, 1].
        count: the number of items, at least 1.
    """
    successes = round(fraction * count)
    interval = stats.binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
