import gc
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from ray import tune

from batchcam.config import TrialConfig
from batchcam.training.fit import EpochReport
from studies.monitoring.wandb_runs import Run, Tracking, choose_mode, track
from tests.studies.conftest import Recorded

API_KEY = "0123456789abcdef" * 2 + "01234567"

PICTURE = np.zeros((4, 8, 3), dtype=np.uint8)
Read = Callable[[Path], list[Recorded]]
Reports = list[tuple[EpochReport, tune.Checkpoint]]


@pytest.fixture(autouse=True)
def _fresh_w_and_b() -> Iterator[None]:
    """Reset W&B for each test, because it keeps its settings for the whole process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def tracking(tmp_path: Path) -> Tracking:
    return Tracking(project="batchcam", group="the-study", folder=tmp_path, mode="offline")


def test_without_a_key_runs_are_offline() -> None:
    assert choose_mode() == ("offline", "no API key")


def test_with_a_key_but_no_way_to_the_server_runs_are_offline(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    mode, why = choose_mode()
    assert mode == "offline"
    assert why.startswith(f"{url} cannot be reached: ")
    assert "refused" in why


def test_with_a_key_and_a_server_that_answers_runs_are_online(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert choose_mode() == ("online", url)


def test_server_is_that_of_wandb_login_unless_the_environment_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    file, variable = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    (tmp_path / "settings").write_text(f"[default]\nbase_url = {file}\n")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    assert choose_mode()[1].startswith(f"{file} cannot be reached: ")
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", variable)
    assert choose_mode()[1].startswith(f"{variable} cannot be reached: ")


@pytest.mark.parametrize("mode", ["offline", "disabled", "online"])
def test_mode_of_the_environment_decides(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert choose_mode() == (mode, f"WANDB_MODE={mode}")


def test_key_that_cannot_be_one_means_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert choose_mode() == (
        "offline",
        "WANDB_API_KEY invalid: API key must have 40+ characters, has 5.",
    )


def test_run_holds_configuration_epochs_and_pictures(
    tracking: Tracking, config: TrialConfig, reports: Reports, recorded: Read
) -> None:
    with track(tracking, "trial-1", "a name", config.as_dict(), ("BCPL", "L1")) as run:
        for report, _ in reports:
            run.log(report, PICTURE)
    (record,) = recorded(tracking.folder)
    assert record.run["tags"] == ["BCPL", "L1"]
    assert record.run["run_id"] == "trial-1"
    assert record.run["run_group"] == "the-study"
    assert record.run["project"] == "batchcam"
    assert record.run["display_name"] == "a name"
    assert record.summary["config"] == config.as_dict()
    assert record.exit_code == 0
    assert len(record.history) == len(reports)
    for item, (report, _) in zip(record.history, reports, strict=True):
        assert item["_step"] == report.epoch
        assert {name: item[name] for name in report.metrics} == report.metrics
        assert item["cams._type"] == "image-file"
        (picture,) = tracking.folder.glob(f"wandb/offline-run-*/files/{item['cams.path']}")
        assert picture.stat().st_size == item["cams.size"]


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(ValueError("diverged"), 1), (KeyboardInterrupt(), 1), (SystemExit(), 0)],
)
def test_run_is_finished_however_the_trial_ends(
    tracking: Tracking, recorded: Read, error: BaseException, exit_code: int
) -> None:
    with pytest.raises(type(error)), track(tracking, "trial", "name", {}):
        raise error
    (record,) = recorded(tracking.folder)
    assert record.exit_code == exit_code
    assert wandb.run is None


def test_trials_one_after_the_other_are_runs_of_their_own(
    tracking: Tracking, reports: Reports, recorded: Read
) -> None:
    for number, (report, _) in enumerate(reports[:2], start=1):
        with track(tracking, f"trial-{number}", "name", {"seed": number}) as run:
            run.log(report, PICTURE)
    found = {record.run["run_id"]: record for record in recorded(tracking.folder)}
    assert found.keys() == {"trial-1", "trial-2"}
    for number in (1, 2):
        record = found[f"trial-{number}"]
        assert record.summary["config"] == {"seed": number}
        assert [item["epoch"] for item in record.history] == [number]


def test_disabled_tracking_writes_nothing(tracking: Tracking, reports: Reports) -> None:
    with track(replace(tracking, mode="disabled"), "trial", "name", {}) as run:
        run.log(reports[0][0], PICTURE)
    assert list(tracking.folder.iterdir()) == []


def test_epoch_that_w_and_b_refuses_is_a_warning(
    tracking: Tracking, reports: Reports, caplog: pytest.LogCaptureFixture
) -> None:
    ended = wandb.init(mode="offline", dir=tracking.folder)
    ended.finish()
    Run(ended).log(reports[0][0], PICTURE)
    assert "W&B did not take epoch 1" in caplog.text


def test_run_that_cannot_be_finished_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def finish(self, **_: Any) -> None:
            raise BrokenPipeError

    Run(Broken()).finish(failed=False)
    assert "W&B did not finish the run" in caplog.text


def test_run_that_cannot_be_started_costs_the_record_only(
    tracking: Tracking, reports: Reports, caplog: pytest.LogCaptureFixture
) -> None:
    with track(replace(tracking, project="not/a/project"), "trial", "name", {}) as run:
        run.log(reports[0][0], PICTURE)
    assert "W&B could not start a run offline" in caplog.text
    assert list(tracking.folder.glob("wandb/offline-run-*")) == []


@pytest.fixture(autouse=True)
def _services_are_waited_for() -> Iterator[None]:
    """Collect the exit status of W&B's service processes.

    W&B drops the processes without doing so, and Python later warns about them.
    """
    yield
    for found in gc.get_objects():
        if type(found) is subprocess.Popen:
            found.poll()


def kill_service() -> None:
    """Kill the service process that W&B started for this process."""
    for name in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, name.read_text().split()):
            if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find a process")
def test_service_that_dies_costs_records_and_no_trial(
    tracking: Tracking, reports: Reports, recorded: Read, caplog: pytest.LogCaptureFixture
) -> None:
    with track(tracking, "lost", "name", {}) as run:
        kill_service()
        for report, _ in reports:
            run.log(report, PICTURE)
    # The next run notices the loss; the run after it has a new service.
    for name in ("unheard", "heard"):
        with track(tracking, name, "name", {}) as run:
            run.log(reports[0][0], PICTURE)
    assert "W&B did not finish the run" in caplog.text
    assert "heard" in [record.run.get("run_id") for record in recorded(tracking.folder)]


def test_server_that_is_gone_leaves_an_offline_run(
    tracking: Tracking,
    reports: Reports,
    recorded: Read,
    monkeypatch: pytest.MonkeyPatch,
    free_port: Callable[[], int],
) -> None:
    # The server answered when the study began.
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("studies.monitoring.wandb_runs._INIT_SECONDS", 2)
    with track(replace(tracking, mode="online"), "trial", "name", {}) as run:
        run.log(reports[0][0], PICTURE)
    assert [len(record.history) for record in recorded(tracking.folder)] == [1]
