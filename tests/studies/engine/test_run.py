"""Check searches on a local Ray, with trials that train no model."""

import os
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from optuna.trial import TrialState

from batchcam.errors import ConfigError
from studies.engine.journal import open_journal
from studies.engine.ledger import LEDGER, Ledger
from studies.engine.optuna_storage import JOURNAL
from studies.engine.protocol import (
    RESOURCE_MULTIPLIER,
    report,
    report_out_of_memory,
    report_unusable_node,
)
from studies.engine.run import Search, run_search, trial_id
from studies.objectives import ACCURACY, SIMILARITY
from studies.planning.resources import TrialResources

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.xdist_group("ray")]

RESOURCES = TrialResources(1.0, 0.0, 2.0)


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"needs": trial.suggest_categorical("needs", (1, 2, 4))}


def search(*needs: int) -> Search:
    """Return a search whose trials need the given multiples of the usual memory."""
    return Search(
        name="s",
        key="k",
        space=space,
        first_points=[{"needs": need} for need in needs],
        objectives=(ACCURACY, SIMILARITY),
        min_epochs=1,
        max_epochs=1,
        num_trials=len(needs),
    )


def hungry(params: dict[str, Any]) -> None:
    if params[RESOURCE_MULTIPLIER] < params["needs"]:
        report_out_of_memory(0)
        return
    context = ray.get_runtime_context()
    cpus = context.get_assigned_resources()["CPU"]  # type: ignore[no-untyped-call]
    report({"epoch": 1, "val_accuracy": cpus, "cam_ssim": 0.5})


def test_trial_out_of_memory_starts_again_with_a_larger_share(tmp_path: Path) -> None:
    # The node has two CPUs, so that twice the usual resources are the maximum.
    ledger = run_search(search(1, 2, 4), tmp_path, hungry, RESOURCES.request, lambda: 2)
    states = [(trial.state, trial.resource_multiplier) for trial in ledger.trials]
    assert states == [("completed", 1), ("completed", 2), ("failed", 2)]
    assert [trial.reports[-1]["val_accuracy"] for trial in ledger.trials[:2]] == [1.0, 2.0]
    assert "out of memory" in str(ledger.trials[2].error)
    storage = optuna.storages.JournalStorage(open_journal(tmp_path / JOURNAL))
    told = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.state for trial in told] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.FAIL,
    ]


def unusable(params: dict[str, Any]) -> None:
    report_unusable_node(0, f"trial {params['number']} found no device; plug it in.")


def test_unusable_node_stops_the_search_at_the_first_trial_until_it_is_resumed(
    tmp_path: Path,
) -> None:
    message = r"^trial [01] found no device; plug it in\. Then resume the search"
    with pytest.raises(ConfigError, match=message):
        run_search(search(1, 2), tmp_path, unusable, RESOURCES.request, lambda: 1)
    trials = Ledger(tmp_path / LEDGER).trials
    assert len(trials) <= 2  # One that ran, and one that was proposed ahead.
    assert all(trial.state is None and not trial.reports for trial in trials)
    # The actors of a search that stopped end with their driver's connection.
    ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ledger = run_search(search(1, 2), tmp_path, hungry, RESOURCES.request, lambda: 2)
    assert [trial.state for trial in ledger.trials] == ["completed"] * 2


def test_keys_of_object_stores_come_back_to_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    before = dict(os.environ)
    run_search(search(1), tmp_path, hungry, RESOURCES.request, lambda: 2)
    assert dict(os.environ) == before
    assert [trial.state for trial in Ledger(tmp_path / LEDGER).trials] == ["completed"]


def test_ids_sort_in_the_order_of_the_proposals() -> None:
    assert sorted([trial_id("k", 10), trial_id("k", 9)]) == ["k_00009", "k_00010"]
