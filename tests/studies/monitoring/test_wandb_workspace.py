"""Check that every panel of the W&B workspace shows something that a real run contains."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import wandb
import wandb_workspaces.workspaces as ws
from ray import tune

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError
from batchcam.training.fit import EpochReport
from studies import paths
from studies.monitoring.wandb_runs import Tracking, track
from studies.monitoring.wandb_workspace import begin, create, workspace, write
from studies.settings import StudySettings
from studies.space import SearchSpace
from tests.studies.conftest import Recorded

PICTURE = np.zeros((4, 8, 3), dtype=np.uint8)
Read = Callable[[Path], list[Recorded]]
Reports = list[tuple[EpochReport, tune.Checkpoint]]


@pytest.fixture(autouse=True)
def _fresh_w_and_b() -> Iterator[None]:
    yield
    wandb.teardown()


def _panels(folder: Path) -> list[dict[str, Any]]:
    model = json.loads((folder / paths.DASHBOARD).read_text())
    sections = model["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def _named(value: Any) -> Iterator[tuple[str, str]]:
    """Yield each name that a panel refers to, with its kind: "config" or "logged"."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name in ("xAxis", "yAxis", "accessor", "targetKey", "groupBy"):
                kind = "config" if part.startswith("config:") or name == "groupBy" else "logged"
                yield kind, part.split(":")[-1].removesuffix(".value")
            elif name in ("metrics", "mediaKeys"):
                yield from (("logged", metric) for metric in part)
            else:
                yield from _named(part)
    elif isinstance(value, list):
        for part in value:
            yield from _named(part)


def test_every_panel_names_what_an_offline_run_holds(
    config: TrialConfig, reports: Reports, recorded: Read, tmp_path: Path
) -> None:
    tracking = Tracking(project="batchcam", group="mine", folder=tmp_path, mode="offline")
    with track(tracking, "mine-0", "a name", config.as_dict()) as run:
        for report, _ in reports:
            run.log(report, PICTURE)
    (found,) = recorded(tmp_path)
    logged = {name.split(".")[0] for item in found.history for name in item}
    held = {"config": set(found.summary["config"]), "logged": logged}
    write(workspace("mine", "batchcam", "", SearchSpace(energy=True, exchange=True)), tmp_path)
    panels = _panels(tmp_path)
    assert len(panels) >= 10
    for panel in panels:
        named = list(_named(panel["config"]))
        assert named, panel
        for kind, name in named:
            assert name in held[kind], (panel["viewType"], kind, name)


def test_a_workspace_survives_being_written_and_read() -> None:
    made = workspace("mine", "batchcam", "people", SearchSpace())
    again = ws.Workspace._from_model(made._to_model())
    assert again.name == "Study mine"
    assert [section.name for section in again.sections] == [s.name for s in made.sections]
    for one, other in zip(again.sections, made.sections, strict=True):
        assert [type(p) for p in one.panels] == [type(p) for p in other.panels]
    shown = json.dumps(made._to_model().model_dump(by_alias=True))
    assert "lambda_energy" not in shown
    assert "lambda_exchange" not in shown
    (runs,) = made._to_model().model_dump(by_alias=True)["spec"]["section"]["runSets"]
    (wanted,) = runs["filters"]["filters"]
    assert (wanted["key"]["name"], wanted["op"], wanted["value"]) == ("group", "=", "mine")


def test_a_study_that_begins_offline_writes_its_dashboard(tmp_path: Path) -> None:
    settings = StudySettings(study="mine", out=tmp_path)
    settings.folder.mkdir()
    assert begin(settings, "disabled") is None
    assert not (settings.folder / paths.DASHBOARD).exists()
    assert begin(settings, "offline") is None
    assert _panels(settings.folder)


def test_a_server_that_is_lost_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    message = begin(StudySettings(study="mine", out=tmp_path), "online")
    assert message is not None
    assert message.startswith("warning: http://127.0.0.1:")
    assert "cannot be reached" in message
    assert "batchcam-study dashboard" in message


class _Refuse(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(403)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_server_that_refuses_the_dashboard_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuse) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        message = begin(StudySettings(study="mine", out=tmp_path), "online")
        server.shutdown()
    assert message is not None
    assert message.startswith("warning: W&B did not accept the dashboard of 'mine': ")


def test_dashboard_of_a_study_that_was_begun_is_written(tmp_path: Path) -> None:
    settings = StudySettings(study="mine", out=tmp_path).begun()
    settings.folder.mkdir()
    with pytest.raises(ConfigError, match=f"{settings.folder} holds no study"):
        create(settings.folder, offline=True)
    settings.save()
    assert create(settings.folder, offline=True) == str(settings.folder / paths.DASHBOARD)
    assert _panels(settings.folder)
