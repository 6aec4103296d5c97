"""Check that each run is computed only once, in this process or in several."""

import json
import os
from pathlib import Path

import pytest

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError
from studies.evidence.runs import Run, complete, finished, state_of
from studies.evidence.workers import Workers


def _run(seed: int, **fields: float) -> Run:
    config = TrialConfig(seed=seed, **fields)  # type: ignore[arg-type]
    return Run(study="small", method="BCPL, L1", stage="final", config=config)


def test_a_run_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def measure(run: Run) -> dict[str, float]:
        if run.config.seed == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(run.config.seed)
        return {"accuracy": run.config.seed / 10}

    runs = [_run(seed) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path, runs, measure)
    assert [content["seed"] for content in finished(tmp_path, runs)] == [0, 1]
    made.append(-1)
    contents = complete(tmp_path, runs, measure)
    assert made == [0, 1, -1, 2, 3]
    assert [content["metrics"]["accuracy"] for content in contents] == [0.0, 0.1, 0.2, 0.3]
    assert {"git_commit", "versions", "command", "threads"} <= set(contents[0])
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    complete(tmp_path, [_run(0, epochs=3)], lambda run: {"epochs": run.config.epochs})
    with pytest.raises(ConfigError, match=r"made with epochs=3, not 4; remove it"):
        finished(tmp_path, [_run(0, epochs=4)])
    assert finished(tmp_path, [_run(0, epochs=3)])[0]["metrics"] == {"epochs": 3}


def test_a_run_from_before_a_field_was_there_had_its_default(tmp_path: Path) -> None:
    complete(tmp_path, [_run(0)], lambda run: {"epochs": run.config.epochs})
    path = _run(0).path(tmp_path)
    content = json.loads(path.read_text())
    del content["config"]["clusters"]
    path.write_text(json.dumps(content))
    assert len(finished(tmp_path, [_run(0)])) == 1
    with pytest.raises(ConfigError, match="made with clusters=2, not 3"):
        finished(tmp_path, [_run(0, clusters=3)])


def test_runs_that_differ_in_a_weight_have_files_of_their_own(tmp_path: Path) -> None:
    weights = ("lambda_batch", "lambda_energy", "lambda_exchange")
    runs = [_run(0), _run(1), *(_run(0, **{name: 1.0}) for name in weights)]
    assert len({run.path(tmp_path) for run in runs}) == len(runs)


def test_a_model_is_kept_for_the_training_not_for_its_stage(tmp_path: Path) -> None:
    def state(run: Run) -> Path:
        return state_of(run, tmp_path)

    run = _run(0)
    assert state(run) == state(Run(study="x", method="y", stage="selection", config=run.config))
    ruled = Run(study="x", method="y", stage="final", config=run.config, beyond={"rrr": 1.0})
    assert len({state(run), state(_run(1)), state(_run(0, epochs=9)), state(ruled)}) == 4


def _process(run: Run) -> dict[str, int]:
    if run.config.seed == 1 and os.environ.get("FAIL_SEED_1"):
        raise RuntimeError("this one cannot be made")
    return {"process": os.getpid(), "seed": run.config.seed}


@pytest.mark.faults
def test_runs_are_made_by_several_processes_at_once(tmp_path: Path) -> None:
    runs = [_run(seed) for seed in range(4)]
    contents = complete(tmp_path, runs, _process, Workers(threads=1, at_once=2))
    assert [content["metrics"]["seed"] for content in contents] == [0, 1, 2, 3]
    assert os.getpid() not in {content["metrics"]["process"] for content in contents}


def test_a_run_that_fails_is_said_and_those_that_ended_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [_run(seed) for seed in range(2)]
    monkeypatch.setenv("FAIL_SEED_1", "1")
    with pytest.raises(RuntimeError, match="this one cannot be made"):
        complete(tmp_path, runs, _process, Workers(threads=1, at_once=2))
    with pytest.raises(RuntimeError, match="this one cannot be made"):
        complete(tmp_path, runs, _process)
    assert [content["seed"] for content in finished(tmp_path, runs)] == [0]
