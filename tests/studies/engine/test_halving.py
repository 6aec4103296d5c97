import math
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcam.errors import ConfigError
from studies.engine.halving import ParetoHalving, Vector, has_place

Report = tuple[int, int, Vector]

GRID = [index / 8 for index in range(9)]
"""Values of objectives that tie often, and that powers of two scale without rounding."""


def ordered(vectors: list[Vector]) -> list[Vector]:
    """Return distinct vectors in the order of their places."""
    recorded = Counter(vectors)
    places = {
        vector: next(n for n in range(1, len(vectors) + 1) if has_place(recorded, vector, n))
        for vector in vectors
    }
    assert sorted(places.values()) == list(range(1, len(vectors) + 1))
    return sorted(vectors, key=lambda vector: places[vector])


@st.composite
def studies(draw: st.DrawFn, objectives: int = 2) -> list[Report]:
    """Draw reports of six trials over eight epochs, in any order that keeps each trial's epochs."""
    vectors = st.tuples(*[st.sampled_from(GRID)] * objectives)
    turns = draw(st.permutations([number for number in range(6) for _ in range(8)]))
    epochs = Counter[int]()
    reports = []
    for number in turns:
        epochs[number] += 1
        reports.append((number, epochs[number], draw(vectors)))
    return reports


def run(halving: ParetoHalving, reports: list[Report]) -> dict[tuple[int, int], bool]:
    """Judge the reports of each trial until it is stopped; return the decisions."""
    decisions: dict[tuple[int, int], bool] = {}
    for number, epoch, values in reports:
        if decisions.get((number, epoch - 1), epoch == 1):
            decisions[number, epoch] = halving.judge(number, epoch, values)
    return decisions


def test_fronts_come_one_after_the_other() -> None:
    expected: list[Vector] = [(3.0, 3.0), (2.0, 1.0), (1.0, 2.0), (1.0, 1.0)]
    assert ordered(expected[::-1]) == expected


def test_a_front_comes_by_spread() -> None:
    # First the best in the first objective; then repeatedly the vector farthest from all chosen.
    front: list[Vector] = [(0.0, 10.0), (1.0, 9.0), (5.0, 5.0), (9.0, 1.0), (10.0, 0.0)]
    expected = [(10.0, 0.0), (0.0, 10.0), (5.0, 5.0), (9.0, 1.0), (1.0, 9.0)]
    assert ordered(front) == expected


def test_units_of_the_objectives_do_not_count() -> None:
    # Without scaling, the first objective would decide alone, and (900, 0.9) would come last.
    front: list[Vector] = [(1000.0, 0.0), (900.0, 0.9), (500.0, 0.95), (0.0, 1.0)]
    assert ordered(front) == [(1000.0, 0.0), (0.0, 1.0), (900.0, 0.9), (500.0, 0.95)]


def test_equal_trials_share_the_place_of_the_first() -> None:
    recorded = Counter[Vector]({(2.0, 2.0): 3, (1.0, 1.0): 1})
    assert has_place(recorded, (2.0, 2.0), 1)
    assert not has_place(recorded, (1.0, 1.0), 3)
    assert has_place(recorded, (1.0, 1.0), 4)


def test_the_first_to_arrive_goes_on_then_the_better_half() -> None:
    halving = ParetoHalving(min_epochs=1, max_epochs=9)
    arriving = [0.5, 0.4, 0.1, 0.6, 0.5, 0.45]
    decisions = [halving.judge(number, 1, (it, it)) for number, it in enumerate(arriving)]
    # The trials that continue are the best 1 of 1, 1 of 2, 2 of 3, 2 of 4, 3 of 5 and 3 of 6.
    assert decisions == [True, False, False, True, True, False]


def test_a_trial_that_is_best_in_any_objective_goes_on() -> None:
    halving = ParetoHalving(min_epochs=1, max_epochs=9)
    for number in range(8):
        halving.judge(number, 1, (0.5 + number / 100, 0.5 + number / 100))
    assert halving.judge(8, 1, (0.0, 0.9))
    assert halving.judge(9, 1, (0.9, 0.0))
    assert not halving.judge(10, 1, (0.4, 0.4))


@pytest.mark.parametrize(
    ("factor", "expected"), [(2, [2, 4, 8]), (3, [2, 6]), (4, [2, 8]), (16, [2])]
)
def test_rungs_are_below_the_last_epoch(factor: int, expected: list[int]) -> None:
    halving = ParetoHalving(min_epochs=2, max_epochs=16, reduction_factor=factor)
    assert [list(rungs) for rungs in halving.rungs] == [expected]


def test_only_rungs_are_recorded_and_each_once() -> None:
    halving = ParetoHalving(min_epochs=2, max_epochs=8)
    for epoch in range(1, 9):
        assert halving.judge(0, epoch, (epoch, 0.0))
    assert halving.rungs == [{2: [(2.0, 0.0)], 4: [(4.0, 0.0)]}]


def test_a_report_beyond_several_rungs_is_judged_at_the_last() -> None:
    halving = ParetoHalving(min_epochs=1, max_epochs=16)
    halving.judge(0, 5, (0.5,))
    halving.judge(0, 6, (0.6,))
    assert halving.rungs == [{1: [], 2: [], 4: [(0.5,)], 8: []}]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("epoch", [1, 2, 8])
def test_what_is_not_finite_stops_and_is_not_recorded(bad: float, epoch: int) -> None:
    halving = ParetoHalving(min_epochs=2, max_epochs=8)
    assert not halving.judge(0, epoch, (0.9, bad))
    assert not halving.judge(0, epoch + 1, (0.9, 0.9))
    assert halving.rungs == [{2: [], 4: []}]


@given(studies())
def test_the_same_report_has_the_same_answer(reports: list[Report]) -> None:
    once, twice = (ParetoHalving(min_epochs=1, max_epochs=8) for _ in range(2))
    decisions = run(once, reports)
    for number, epoch, values in reports:
        if (number, epoch) in decisions:
            twice.judge(number, epoch, values)
            assert twice.judge(number, epoch, (0.0, 0.0)) == decisions[number, epoch]
    for key in decisions:
        assert twice.judge(*key, (1.0, 1.0)) == decisions[key]
    assert twice.rungs == once.rungs


@given(studies(), st.integers(0, 48))
def test_a_replayed_study_goes_on_as_it_would_have(reports: list[Report], cut: int) -> None:
    whole, resumed = (
        ParetoHalving(min_epochs=1, max_epochs=8, brackets=2, seed=3) for _ in range(2)
    )
    run(whole, reports)
    judged: dict[tuple[int, int], bool] = run(resumed, reports[:cut])
    again = ParetoHalving(min_epochs=1, max_epochs=8, brackets=2, seed=3)
    for number, epoch, values in reports[:cut]:
        if (number, epoch) in judged:
            assert again.judge(number, epoch, values) == judged[number, epoch]
    assert again.rungs == resumed.rungs
    run(again, reports)
    assert again.rungs == whole.rungs


@given(studies(), st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
def test_scale_of_an_objective_changes_nothing(
    reports: list[Report], powers: tuple[int, int]
) -> None:
    scaled = [
        (number, epoch, tuple(value * 2.0**p for value, p in zip(values, powers, strict=True)))
        for number, epoch, values in reports
    ]
    plain, other = (ParetoHalving(min_epochs=1, max_epochs=8) for _ in range(2))
    assert run(plain, reports) == run(other, scaled)


@given(st.lists(st.tuples(*[st.sampled_from(GRID)] * 3), min_size=1, max_size=12, unique=True))
def test_order_is_one_of_all_trials_and_respects_dominance(vectors: list[Vector]) -> None:
    order = ordered(vectors)
    for before, after in pairwise(order):
        beaten = all(b <= a for b, a in zip(before, after, strict=True))
        assert not beaten


@given(st.lists(st.sampled_from(GRID), min_size=1, max_size=30), st.integers(2, 4))
def test_one_objective_is_ranked_as_by_asha(values: list[float], factor: int) -> None:
    halving = ParetoHalving(min_epochs=1, max_epochs=99, reduction_factor=factor)
    for number, value in enumerate(values):
        seen = sorted(values[: number + 1], reverse=True)
        threshold = seen[math.ceil(len(seen) / factor) - 1]
        assert halving.judge(number, 1, (value,)) == (value >= threshold)


def test_brackets_are_shared_out_by_number_and_seed() -> None:
    def drawn(seed: int) -> list[int]:
        halving = ParetoHalving(min_epochs=1, max_epochs=8, brackets=3, seed=seed)
        return [halving.bracket(number) for number in range(4000)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    expected = np.exp([3, 2, 1]) / np.exp([3, 2, 1]).sum()
    shares = np.bincount(drawn(0), minlength=3) / 4000
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_a_bracket_leaves_out_the_first_rungs() -> None:
    halving = ParetoHalving(min_epochs=1, max_epochs=8, brackets=3)
    assert [list(rungs) for rungs in halving.rungs] == [[1, 2, 4], [2, 4], [4]]
    late = next(number for number in range(99) if halving.bracket(number) == 2)
    assert all(halving.judge(late, epoch, (0.0, 0.0)) for epoch in range(1, 4))
    halving.judge(late, 4, (0.5, 0.5))
    assert halving.rungs[2] == {4: [(0.5, 0.5)]}
    assert halving.rungs[0] == {1: [], 2: [], 4: []}


def test_a_full_rung_is_judged_quickly() -> None:
    halving = ParetoHalving(min_epochs=1, max_epochs=9)
    generator = np.random.default_rng(0)
    for number in range(2000):
        halving.judge(number, 1, tuple(generator.random(2)))
    started = time.process_time()
    for number in range(2000, 2100):
        halving.judge(number, 1, tuple(generator.random(2)))
    assert (time.process_time() - started) / 100 < 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_epochs": 0},
        {"max_epochs": 0},
        {"reduction_factor": 1},
        {"brackets": 0},
        {"brackets": 4},
        {"seed": -1},
    ],
)
def test_settings_that_cannot_work_are_named(wrong: dict[str, int]) -> None:
    settings = {"min_epochs": 1, "max_epochs": 8} | wrong
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name}={wrong[name]} "):
        ParetoHalving(**settings)


def test_a_last_epoch_at_the_first_rung_stops_nothing() -> None:
    halving = ParetoHalving(min_epochs=4, max_epochs=4)
    for number, quality in enumerate((0.9, 0.1)):
        assert all(halving.judge(number, epoch, (quality,)) for epoch in range(1, 5))
