"""Check the intervals and significance tests in tables against hand-computed values and SciPy."""

import pytest
from scipy import stats

from studies.evidence.tables import holm, interval, paired
from studies.markdown import markdown_table


def test_an_interval_is_students_t() -> None:
    values = [0.990, 0.992, 0.995]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert interval(values, 100) == f"{50 * (low + high):.2f} ± {50 * (high - low):.2f}"
    assert interval([0.99], 100, 1) == "99.0"
    assert interval([]) == ""


def test_a_paired_comparison_is_a_paired_t_test() -> None:
    ours, theirs = [0.91, 0.93, 0.925, 0.94], [0.90, 0.91, 0.926, 0.93]
    by_seed, of_others = dict(enumerate(ours)), dict(enumerate(theirs))
    # Seeds that only one method has are ignored, and the order of seeds does not matter.
    found = paired(by_seed | {9: 0.1}, dict(reversed(of_others.items())) | {8: 0.2})
    assert found is not None
    assert found.points == f"+0.97 ± {100 * found.margin:.2f}"
    assert found.difference == pytest.approx(0.00975)
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.margin == pytest.approx((high - low) / 2)
    assert paired({0: 0.9}, {0: 0.8}) is None
    assert paired(by_seed, {7: 0.9, 8: 0.9}) is None
    same = paired(by_seed, by_seed)
    assert same is not None
    assert (same.difference, same.p) == (0, 1)


def test_holm_multiplies_the_smallest_by_the_number_of_tests() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_table_has_a_rule_under_its_header() -> None:
    text = markdown_table(["a", "b", "c", "d"], [["1", "2", "3", "4"]])
    assert text == "| a | b | c | d |\n| --- | --- | --- | --: |\n| 1 | 2 | 3 | 4 |\n"
