"""Statistics and tables of runs: means over seeds, confidence intervals, paired comparisons."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from studies.statistics import margin


def interval(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Format the mean of `values` with the margin of its Student's t 95 % interval.

    Args:
        values: a metric of several runs.
        scale: multiplies mean and margin.
        digits: decimals.

    Returns:
        "mean ± margin"; the value alone if there is one; "" if there is none.
    """
    if not values:
        return ""
    centre = f"{scale * mean(values):.{digits}f}"
    return f"{centre} ± {scale * margin(values):.{digits}f}" if len(values) > 1 else centre


@dataclass(frozen=True)
class Column:
    """The title and number format of a metric in a table."""

    title: str
    digits: int = 2
    """Decimals."""
    scale: float = 1.0
    """Factor applied to the metric: 100 shows a share in percent."""


Columns = Mapping[str, Column]
"""Columns of a table by the name of their metric."""


def intervals(columns: Columns, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one cell per column: the mean over the runs with its margin, see :func:`interval`."""
    return [
        interval([run["metrics"][name] for run in runs], column.scale, column.digits)
        for name, column in columns.items()
    ]


def titles(columns: Columns) -> list[str]:
    """Return the titles of the columns."""
    return [column.title for column in columns.values()]


def values(names: Iterable[str], run: Mapping[str, Any]) -> list[str]:
    """Return a run's metrics, unscaled, with 6 decimals."""
    return [f"{run['metrics'][name]:.6f}" for name in names]


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write `rows`, whose first one is the header, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


@dataclass(frozen=True)
class Paired:
    """Mean difference of paired runs, the margin of its 95 % interval, and a p-value.

    The p-value is from a two-sided paired t-test.
    """

    difference: float
    margin: float
    p: float

    @property
    def points(self) -> str:
        """The difference and its margin in percentage points, for values in [0, 1]."""
        return f"{100 * self.difference:+.2f} ± {100 * self.margin:.2f}"


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Paired | None:
    """Return the paired comparison `values - others` over the seeds that both have.

    Args:
        values: a metric by seed.
        others: the same metric of the baseline, by seed.

    Returns:
        None if fewer than 2 seeds are in both.
    """
    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if len(differences) < 2:
        return None
    if not any(differences):
        return Paired(0.0, 0.0, 1.0)
    spread = stdev(differences)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if spread else 0.0
    return Paired(mean(differences), margin(differences), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for multiple testing by Holm's method (1979), in their order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted
