from collections.abc import Callable
from dataclasses import replace

import optuna
import pytest

from studies.engine.protocol import Objective
from studies.objectives import ACCURACY, SIMILARITY
from studies.outcome.confirm import (
    CANDIDATE,
    best_of_front,
    confirming_search,
    digest,
    gather,
)
from studies.outcome.export import TrialRecord
from studies.settings import StudySettings

MakeRecord = Callable[..., TrialRecord]
OBJECTIVES = (ACCURACY, SIMILARITY)


@pytest.fixture
def front(make_record: MakeRecord) -> list[TrialRecord]:
    return [
        make_record("a", 0.9, 0.1),
        make_record("b", 0.8, 0.6),
        make_record("c", 0.75, 0.65),
        make_record("d", 0.6, 0.7),
    ]


def test_those_chosen_come_first_then_the_nearest_to_the_ideal(front: list[TrialRecord]) -> None:
    a, b, c, d = front
    chosen = {"knee": b, "accuracy": a, "ssim": d}
    assert best_of_front(front, chosen, OBJECTIVES, 2) == [b, a]
    assert best_of_front(front, chosen, OBJECTIVES, 9) == [b, a, d, c]


def test_nearest_to_the_ideal_follows_the_directions(front: list[TrialRecord]) -> None:
    a, b, c, d = front
    chosen = {"knee": d, "val_accuracy": d}
    objectives = (Objective("val_accuracy", "accuracy", "minimize"),)
    assert best_of_front(front, chosen, objectives, 9) == [d, c, b, a]


def test_the_baseline_is_confirmed_besides(
    front: list[TrialRecord], make_record: MakeRecord
) -> None:
    a, b, _, d = front
    chosen = {"knee": b, "accuracy": a, "ssim": d, "baseline": make_record("plain", 0.5, 0.0)}
    assert best_of_front(front, chosen, OBJECTIVES, 2) == [b, a, chosen["baseline"]]
    assert best_of_front(front, chosen | {"baseline": a}, OBJECTIVES, 2) == [b, a]


def test_every_candidate_meets_every_fresh_seed(front: list[TrialRecord]) -> None:
    settings = replace(StudySettings(study="s", seed=7, max_epochs=9).begun(), seeds=3)
    search = confirming_search(settings, front[:2], 3)
    assert search.num_trials == len(search.first_points) == 6
    assert search.min_epochs == search.max_epochs == 9
    runs = [search.space(_fixed(dict(point))) for point in search.first_points]
    assert {(run[CANDIDATE], run["seed"]) for run in runs} == {
        (name, seed) for name in "ab" for seed in (1007, 1008, 1009)
    }
    assert runs[0]["learning_rate"] == front[0].config.learning_rate


def _fixed(point: dict[str, int]) -> optuna.Trial:
    study = optuna.create_study()
    study.enqueue_trial(point)
    return study.ask()


def test_other_candidates_or_seeds_have_another_place(front: list[TrialRecord]) -> None:
    places = {digest(front, 3), digest(front[:2], 3), digest(front, 4)}
    assert len(places) == 3
    assert digest(front, 3) == digest(list(front), 3)


def test_means_are_of_the_runs_that_came_to_the_end(
    front: list[TrialRecord], make_record: MakeRecord
) -> None:
    runs = [
        ("a", make_record("r0", 0.90, 0.1)),
        ("a", make_record("r1", 0.80, 0.3)),
        ("a", make_record("r2", 0.10, 0.9, state="failed")),
        ("b", make_record("r3", 0.70, 0.6)),  # A single run has no interval.
    ]
    (found,) = gather(front, runs)
    assert found.candidate is front[0]
    record = found.as_record
    assert record.metrics["val_accuracy"] == pytest.approx(0.85)
    assert record.metrics["cam_ssim"] == pytest.approx(0.2)
    assert record.trial_id == "r0"  # The first run, not the best one.
    facts = record.facts["confirmed"]
    assert facts["candidate"] == "a"
    assert facts["val_accuracy"]["mean"] == pytest.approx(0.85)
    assert facts["val_accuracy"]["low"] < 0.85 < facts["val_accuracy"]["high"]
