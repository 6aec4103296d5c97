from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.search.optuna import OptunaSearch

from studies.search import JOURNAL, make_search
from studies.space import SearchSpace, feasible_strides

OBJECTIVES = ("val_accuracy", "cam_ssim")
SPACE = SearchSpace()

Make = Callable[..., OptunaSearch]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(name: str = "s", seed: int = 0) -> OptunaSearch:
        strides = feasible_strides(SPACE, in_chans=1)
        return make_search(SPACE, strides, OBJECTIVES, tmp_path, name, seed)

    return make


def propose(search: OptunaSearch, numbers: range) -> list[dict[str, Any]]:
    """Ask for trials, and tell of each a result made from its learning rate."""
    proposed = []
    for number in numbers:
        config = search.suggest(str(number))
        assert config is not None
        proposed.append(config)
        rate = config["learning_rate"]
        search.on_trial_complete(str(number), {"val_accuracy": 1 - rate, "cam_ssim": rate})
    return proposed


def load(folder: Path, name: str = "s") -> optuna.Study:
    """Open the journal as anyone would, Ray or not."""
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.load_study(study_name=name, storage=storage)


def test_journal_holds_trials_with_both_objectives(make: Make, tmp_path: Path) -> None:
    proposed = propose(make(), range(3))
    study = load(tmp_path)
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE] * 2
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.COMPLETE] * 3
    for trial, config in zip(study.trials, proposed, strict=True):
        assert trial.params["learning_rate"] == config["learning_rate"]
        assert trial.values == [1 - config["learning_rate"], config["learning_rate"]]


def test_failed_trial_is_recorded_as_failed(make: Make, tmp_path: Path) -> None:
    search = make()
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    assert load(tmp_path).trials[0].state == optuna.trial.TrialState.FAIL


def test_first_proposals_are_the_baseline_and_bcpl(make: Make) -> None:
    baseline, bcpl = propose(make(), range(2))
    assert (baseline["lambda_proto"], baseline["lambda_batch"]) == (0.0, 0.0)
    assert (bcpl["lambda_proto"], bcpl["lambda_batch"]) == (0.0, 0.1)


def test_proposals_are_a_function_of_the_seed(make: Make) -> None:
    # More than the ten random ones that TPE starts with.
    same, again = (propose(make(name), range(14)) for name in ("one", "two"))
    assert same == again
    assert propose(make("three", seed=1), range(14))[2:] != same[2:]


def test_searcher_goes_on_after_it_was_saved(make: Make, tmp_path: Path) -> None:
    search = make("cut")
    whole = propose(make("whole"), range(14))
    before = propose(search, range(12))
    search.save(str(tmp_path / "saved"))
    restored = make("elsewhere")
    restored.restore(str(tmp_path / "saved"))
    assert before + propose(restored, range(12, 14)) == whole
    assert len(load(tmp_path, "cut").trials) == 14


def test_proposals_are_numbered_in_their_order(make: Make) -> None:
    assert [config["number"] for config in propose(make(), range(3))] == [0, 1, 2]
