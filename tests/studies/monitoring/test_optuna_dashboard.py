"""Check Optuna Dashboard on a real study over HTTP."""

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

from studies import paths
from studies.monitoring.optuna_dashboard import attach_picture
from studies.settings import StudySettings
from tests.studies.conftest import STUDY_COMMAND, Finished

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("ray")]


@pytest.fixture
def ask(
    study: Finished, environment: dict[str, str], free_port: Callable[[], int]
) -> Iterator[Callable[[str], bytes]]:
    """Return a function that requests a path from the dashboard of a study of three trials."""
    port = free_port()
    server = subprocess.Popen(
        [*STUDY_COMMAND, "view", "results/small", "--port", str(port)],
        cwd=study.folder.parents[1],
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
    (found,) = json.loads(ask("/api/studies"))["study_summaries"]
    assert found["study_name"] == "small"
    detail = json.loads(ask(f"/api/studies/{found['study_id']}?after=0"))
    trials = detail["trials"]
    # A trial that was stopped early is pruned, and has no values.
    assert len(trials) == 3
    states = {trial["state"] for trial in trials}
    assert "Complete" in states
    assert states <= {"Complete", "Pruned"}
    for trial in trials:
        if trial["state"] == "Complete":
            assert len(trial["values"]) == 2
        (artifact,) = trial["artifacts"]
        assert (artifact["filename"], artifact["mimetype"]) == ("cams.png", "image/png")
        place = f"/artifacts/{found['study_id']}/{trial['trial_id']}/{artifact['artifact_id']}"
        with Image.open(io.BytesIO(ask(place))) as picture:
            # Ten prototypes above ten CAMs, each of 14 pixels enlarged four times.
            assert picture.size == (10 * 56, 2 * 56)


def test_a_picture_that_is_not_there_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = StudySettings(study="mine", out=tmp_path).begun()
    settings.folder.mkdir()
    trial = optuna.create_study(storage=optuna.storages.InMemoryStorage()).ask()
    attach_picture(trial, settings)
    assert "not attached" not in caplog.text
    assert not list((settings.folder / paths.ARTIFACTS).iterdir())


def test_a_store_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = StudySettings(study="mine", out=tmp_path).begun()
    settings.folder.mkdir()
    (settings.folder / paths.ARTIFACTS).write_text("a file where the folder should be")
    attach_picture(SimpleNamespace(number=3), settings)  # type: ignore[arg-type]
    assert "the picture of trial 3 was not attached" in caplog.text
