"""Optuna Dashboard on a real study, asked over HTTP."""

import io
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from PIL import Image

from studies.monitoring.optuna_dashboard import ARTIFACTS, attach_picture
from studies.settings import StudySettings
from tests.studies.conftest import STUDY_COMMAND, Command

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def ask(
    sweep: Command, environment: dict[str, str], free_port: Callable[[], int], tmp_path: Path
) -> Iterator[Callable[[str], bytes]]:
    """Return a function that asks the dashboard of a study of two trials."""
    words = ("--study", "seen", "--num-trials", "2", "--max-epochs", "1", "--resolutions", "14")
    done = sweep(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    port = free_port()
    server = subprocess.Popen(
        [
            *STUDY_COMMAND,
            "view",
            "results/seen",
            "--port",
            str(port),
        ],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return bytes(answer.read())

    try:
        end = time.monotonic() + 60
        while True:
            try:
                get("/api/studies")
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
        yield get
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_the_dashboard_shows_trials_and_their_pictures(ask: Callable[[str], bytes]) -> None:
    (study,) = json.loads(ask("/api/studies"))["study_summaries"]
    assert study["study_name"] == "seen"
    detail = json.loads(ask(f"/api/studies/{study['study_id']}?after=0"))
    trials = detail["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Complete"]
    for trial in trials:
        assert len(trial["values"]) == 2
        (artifact,) = trial["artifacts"]
        assert (artifact["filename"], artifact["mimetype"]) == ("cams.png", "image/png")
        place = f"/artifacts/{study['study_id']}/{trial['trial_id']}/{artifact['artifact_id']}"
        with Image.open(io.BytesIO(ask(place))) as picture:
            # Ten prototypes above ten CAMs, of 14 pixels times 4.
            assert picture.size == (10 * 56, 2 * 56)


def test_a_picture_that_is_not_there_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = StudySettings(study="mine", out=tmp_path).begun()
    settings.folder.mkdir()
    trial = optuna.create_study(storage=optuna.storages.InMemoryStorage()).ask()
    attach_picture(trial, settings)
    assert "not attached" not in caplog.text
    assert not list((settings.folder / ARTIFACTS).iterdir())


def test_a_store_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = StudySettings(study="mine", out=tmp_path).begun()
    settings.folder.mkdir()
    (settings.folder / ARTIFACTS).write_text("a file where the folder should be")
    attach_picture(SimpleNamespace(number=3), settings)  # type: ignore[arg-type]
    assert "the picture of trial 3 was not attached" in caplog.text


def test_a_folder_without_a_study_is_said(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*STUDY_COMMAND, "view", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} holds no study")
