"""Tables of runs: means over seeds, their intervals, paired comparisons."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats


def interval(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Return the mean with its 95 % interval of Student's t, where there are several values."""
    if not values:
        return ""
    centre = f"{scale * mean(values):.{digits}f}"
    return f"{centre} ± {scale * _margin(values):.{digits}f}" if len(values) > 1 else centre


@dataclass(frozen=True)
class Column:
    """How a table shows a metric of runs."""

    title: str
    digits: int = 2
    """Behind the point."""
    scale: float = 1.0
    """By what the metric is multiplied: 100 for one in percent."""


Columns = Mapping[str, Column]
"""By the name of the metric."""


def intervals(columns: Columns, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what runs of several seeds have in each column; see :func:`interval`."""
    return [
        interval([run["metrics"][name] for run in runs], column.scale, column.digits)
        for name, column in columns.items()
    ]


def titles(columns: Columns) -> list[str]:
    """Return the header of the columns."""
    return [column.title for column in columns.values()]


def values(names: Iterable[str], run: Mapping[str, Any]) -> list[str]:
    """Return a run's metrics as they are."""
    return [f"{run['metrics'][name]:.6f}" for name in names]


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows, the header first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


@dataclass(frozen=True)
class Paired:
    """How runs differ from others with the same seeds: a mean, its 95 % margin, a p-value.

    The p-value is that of a paired t-test, two-sided.
    """

    difference: float
    margin: float
    p: float

    @property
    def points(self) -> str:
        """The difference of two shares with its margin, in percentage points."""
        return f"{100 * self.difference:+.2f} ± {100 * self.margin:.2f}"


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Paired | None:
    """Compare runs, by seed, with others of the same seeds; None where fewer than 2 are in both."""
    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if len(differences) < 2:
        return None
    if not any(differences):
        return Paired(0.0, 0.0, 1.0)
    spread = stdev(differences)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if spread else 0.0
    return Paired(mean(differences), _margin(differences), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values of several tests, adjusted for there being several (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; columns after the first three are aligned to the right."""
    rule = [" --- " if column < 3 else " --: " for column in range(len(header))]
    lines = [header, *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]]) + "\n"


def _margin(values: Sequence[float]) -> float:
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * stdev(values) / float(len(values) ** 0.5)
