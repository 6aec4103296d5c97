"""Tables of runs: means over seeds, their intervals, paired comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats


def interval(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Return the mean with its 95 % interval of Student's t, where there are several values."""
    if not values:
        return ""
    centre = f"{scale * mean(values):.{digits}f}"
    return f"{centre} ± {scale * _margin(values):.{digits}f}" if len(values) > 1 else centre


@dataclass(frozen=True)
class Paired:
    """How runs differ from others with the same seeds: a mean, its 95 % margin, a p-value.

    The p-value is that of a paired t-test, two-sided.
    """

    difference: float
    margin: float
    p: float


def paired(values: Sequence[float], others: Sequence[float]) -> Paired | None:
    """Compare runs with those of the same seeds, pair by pair; None where pairs are fewer than 2.

    Raises:
        ValueError: there are not as many of the one as of the other.
    """
    differences = [one - other for one, other in zip(values, others, strict=True)]
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
