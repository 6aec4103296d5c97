"""Check exports on a local Ray: in other processes, several at once, through lost processes."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.export.bundle import save_bundle
from batchcam.training.fit import EpochReport, restore
from studies.engine.checkpoints import Checkpoints
from studies.outcome import export_tasks
from studies.outcome.export import BundleFiles, StudyError, TrialRecord
from studies.outcome.export_tasks import make_bundles
from studies.planning.resources import TrialResources

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.xdist_group("ray")]

ONE_CPU = TrialResources(1.0, 0.0, 2.0)
"""A trial's resources on the node of two CPUs."""


@pytest.fixture
def trained(
    config: TrialConfig,
    reports: list[tuple[EpochReport, str]],
    make_record: Callable[..., TrialRecord],
) -> list[TrialRecord]:
    """Return two records of a real trial: after its last epoch, and stopped after its first."""
    return [
        make_record(name, 0, 0, config=config, metrics=dict(report.metrics), checkpoints=folder)
        for name, (report, folder) in (("whole", reports[-1]), ("stopped", reports[0]))
    ]


def make(
    records: list[TrialRecord], prepared: Any = None, resources: TrialResources = ONE_CPU
) -> dict[str, BundleFiles]:
    """Return the files of the bundle of each trial."""
    shared: ray.ObjectRef[PreparedData] = ray.put(prepared)
    made = make_bundles(records, shared, "s", "the command", resources)
    return {record.trial_id: files for record, files in made}


def readable(name: str, content: bytes) -> object:
    """Return the content of a file, independent of the order of safetensors' metadata."""
    if not name.endswith(".safetensors"):
        return content
    size = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:size]), content[size:]


def test_bundles_equal_those_that_a_driver_makes_to_the_last_byte(
    trained: list[TrialRecord],
    prepared: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = {}
    for record in trained:
        with Checkpoints(record.checkpoints).newest() as state:
            assert state is not None
            result = restore(record.config, state, prepared=prepared)
        save_bundle(
            tmp_path / record.trial_id,
            result,
            command="the command",
            extra_metrics={"study": "s", "trial_id": record.trial_id},
        )
        paths = (tmp_path / record.trial_id).iterdir()
        expected[record.trial_id] = {path.name: path.read_bytes() for path in paths}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the driver evaluates")

    monkeypatch.setattr("batchcam.training.evaluate.Evaluator.evaluate", fail)
    made = make(trained, prepared)
    assert made.keys() == expected.keys()
    for trial_id, files in made.items():
        assert files.keys() == expected[trial_id].keys()
        for name, content in files.items():
            assert readable(name, content) == readable(name, expected[trial_id][name]), name


def test_device_of_a_trial_is_not_in_its_bundle(
    trained: list[TrialRecord], prepared: PreparedData
) -> None:
    record = replace(trained[0], config=replace(trained[0].config, device="auto"))
    (files,) = make([record], prepared).values()
    assert b"device: auto\n" in files["config.yaml"]


def test_several_are_exported_at_once_in_other_processes(
    trained: list[TrialRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meet(record: TrialRecord, *_: object) -> BundleFiles:
        (tmp_path / record.trial_id).touch()
        limit = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
        return {"pid": str(os.getpid()).encode(), "met": b"%d" % len(list(tmp_path.iterdir()))}

    monkeypatch.setattr(export_tasks, "_run", meet)
    made = make(trained)
    assert [files["met"] for files in made.values()] == [b"2", b"2"]
    assert len({str(os.getpid()).encode(), *(files["pid"] for files in made.values())}) == 3


def test_task_whose_process_is_lost_runs_again(
    trained: list[TrialRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash_once(record: TrialRecord, *_: object) -> BundleFiles:
        crashed = tmp_path / record.trial_id
        if record.trial_id == "whole" and not crashed.exists():
            crashed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    monkeypatch.setattr(export_tasks, "_run", crash_once)
    assert set(make(trained)) == {"whole", "stopped"}
    assert (tmp_path / "whole").exists()


def test_export_out_of_memory_runs_again_with_a_larger_share_or_names_the_trial(
    trained: list[TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(
        record: TrialRecord, _: object, __: str, command: str, resources: TrialResources
    ) -> BundleFiles | None:
        del command
        context = ray.get_runtime_context()
        cpus = context.get_assigned_resources()["CPU"]  # type: ignore[no-untyped-call]
        assert cpus == resources.cpus
        enough = cpus == 2.0 and record.trial_id == "whole"
        return {"cpus": b"%d" % cpus} if enough else None

    monkeypatch.setattr(export_tasks, "_run", greedy)
    assert make(trained[:1]) == {"whole": {"cpus": b"2"}}
    with pytest.raises(StudyError, match=r"trial stopped cannot be exported: out of memory.*--res"):
        make(trained[1:])


def test_memory_that_is_short_in_a_task_is_recognised(
    trained: list[TrialRecord], prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> BundleFiles:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(export_tasks, "make_bundle", fail)
    assert export_tasks._run(trained[0], prepared, "s", "c", ONE_CPU) is None


def test_trial_without_states_is_named_with_the_remedy(
    trained: list[TrialRecord], prepared: PreparedData, tmp_path: Path
) -> None:
    lost = replace(trained[0], checkpoints=str(tmp_path / "gone"))
    with pytest.raises(StudyError, match=r"^trial whole has no whole checkpoint left in .*gone"):
        make([lost, trained[1]], prepared)


def test_trial_that_contradicts_its_resources_is_named(
    trained: list[TrialRecord], prepared: PreparedData
) -> None:
    wrong = replace(trained[0], config=replace(trained[0].config, precision="fp16"))
    message = r"^trial whole cannot be exported: precision='fp16' needs CUDA.* --resume exports"
    with pytest.raises(StudyError, match=message):
        make([wrong], prepared)


def test_unexpected_error_keeps_its_traceback_and_names_the_trial(
    trained: list[TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> BundleFiles:
        raise KeyError("defect")

    monkeypatch.setattr(export_tasks, "_run", fail)
    with pytest.raises(KeyError, match="in fail") as raised:
        make(trained[:1])
    assert raised.value.__notes__ == ["Trial whole was being exported."]
