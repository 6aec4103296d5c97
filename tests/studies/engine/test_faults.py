"""Check studies when a checkpoint, the disk, the driver's machine or W&B is damaged or lost."""

import gzip
import http.server
import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer

import batchcam
from batchcam.training.fit import EpochReport
from studies.benchmarks.dummy import curve
from studies.engine import retry as patience
from studies.engine.ledger import LEDGER, Ledger
from studies.monitoring import wandb_runs as tracking
from studies.monitoring.wandb_runs import Tracking, track
from tests.studies.conftest import RAY_CPUS, ROOT, Command, Recorded
from tests.studies.engine.test_crash import after, check_whole, events, kill_at, never, run

pytestmark = [pytest.mark.timeout(900), pytest.mark.faults]

PICTURE = np.zeros((4, 8, 3), dtype=np.uint8)
SCRIPT = ROOT / "studies" / "bcpl_sweep.py"
SMALL = ("--resolutions", "14", "--cpus-per-trial", "2", "--min-epochs", "1")


def fill(disk: Path) -> Path:
    """Fill a small file system completely; return the file that fills it."""
    rest = disk / "rest"
    with suppress(OSError), rest.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free == 0
    return rest


def dummy(folder: Path, address: str) -> list[Any]:
    """Return the command of a study that runs one trial at a time on the shared Ray."""
    words = ["--trials", 6, "--epochs", 6, "--seconds", 0.2, "--cpus", RAY_CPUS]
    return ["-m", "studies.benchmarks.dummy", "--out", folder, *words, "--address", address]


def test_damaged_checkpoint_costs_an_epoch_and_nothing_else(
    environment: dict[str, str], shared_ray: str, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    # The kill comes in the first trial, after four of its epochs.
    assert kill_at(dummy(folder, shared_ray), folder, environment, after(folder, 5))
    newest = max((folder / "checkpoints" / "dummy_00000").glob("epoch_*"))
    newest.write_bytes(newest.read_bytes()[:-7] + b"garbage")
    assert not kill_at(dummy(folder, shared_ray), folder, environment, never)
    check_whole(folder, 6, 6, "dummy")
    for trial in Ledger(folder / LEDGER).trials:
        x, y = trial.params["x"], trial.params["y"]
        assert trial.reports == [curve(x, y, epoch) for epoch in range(1, trial.epoch + 1)]


def test_interrupted_study_says_how_to_go_on(
    environment: dict[str, str], shared_ray: str, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    command = [SCRIPT, "--study", "s", "--out", tmp_path]
    words = ["--num-trials", 2, "--max-epochs", 4, *SMALL]
    # A background job of a shell ignores SIGINT, and the driver would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    driver = run([*command, *words], tmp_path / "log", environment)
    signal.signal(signal.SIGINT, before)
    moment = after(folder, 3)
    while not moment(driver):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    log = (tmp_path / "log").read_text()
    assert log.rstrip().endswith("interrupted; resume with --study s --resume")
    assert "Tuner.restore" not in log
    assert not (folder / "best").exists()
    assert not kill_at([*command, "--resume", "--address", shared_ray], folder, environment, never)
    assert batchcam.load(folder / "best" / "knee").metrics["study"] == "s"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one megabyte, and yield its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the permission to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_study_waits_for_a_disk_that_cannot_be_written_for_a_while(
    environment: dict[str, str], shared_ray: str, small_disk: Path, trouble: str
) -> None:
    folder = small_disk / "study"

    def break_disk() -> None:
        if trouble == "full":
            fill(small_disk)
        else:
            remount("ro")

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    def mend() -> None:
        if trouble == "full":
            (small_disk / "rest").unlink()
        else:
            remount("rw")

    def break_and_mend() -> None:
        while events(folder) < 8:
            time.sleep(0.05)
        break_disk()
        time.sleep(10)
        mend()

    breaker = threading.Thread(target=break_and_mend, daemon=True)
    breaker.start()
    assert not kill_at(dummy(folder, shared_ray), small_disk, environment, never)
    breaker.join()
    check_whole(folder, 6, 6, "dummy")


def test_study_stops_where_the_disk_stays_full_and_goes_on_when_it_is_not(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "RETRY_SECONDS", 1.0)
    ledger = Ledger(small_disk / LEDGER)
    ledger.propose({"number": 0, "trial_id": "t_0"})
    rest = fill(small_disk)

    def report() -> None:
        for epoch in range(1, 1000):
            ledger.report(0, {"epoch": float(epoch)})

    with pytest.raises(patience.StorageLostError, match=r"No space left.*--resume"):
        report()
    epoch = ledger.trials[0].epoch
    rest.unlink()
    again = Ledger(small_disk / LEDGER)
    assert again.trials[0].epoch == epoch
    assert again.report(0, {"epoch": float(epoch + 1)})
    assert Ledger(small_disk / LEDGER).trials[0].epoch == epoch + 1


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Run an S3 server with a bucket; yield the environment variables that lead to it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "planted-secret-of-the-object-store",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fs, _ = pyarrow.fs.FileSystem.from_uri("s3://studies?allow_bucket_creation=true")
    fs.create_dir("studies")
    yield variables
    server.stop()


def first_epoch(folder: Path) -> int:
    """Return the last epoch that the first trial reported."""
    reports = [number for number, _ in Ledger(folder / LEDGER).reports]
    return reports.count(0)


def test_study_goes_on_from_an_object_store_when_the_drivers_machine_is_lost(
    s3: dict[str, str], sweep: Command, environment: dict[str, str], tmp_path: Path
) -> None:
    words = ["--study", "far", "--num-trials", "3", "--max-epochs", "2", *SMALL]
    storage = ["--storage", "s3://studies/mine"]
    folder = tmp_path / "results" / "far"
    command = [SCRIPT, "--out", tmp_path / "results", *storage, *words]
    # The kill comes after two epochs of the first trial, most likely before the second epoch's
    # report is in the replica.
    assert kill_at(command, folder, environment | s3, lambda _: first_epoch(folder) == 2)
    (lost, *_) = Ledger(folder / LEDGER).trials
    assert not (folder / "checkpoints").exists()
    shutil.rmtree(folder)
    again = sweep(*words, *storage, cwd=tmp_path, **s3)
    assert again.returncode == 2
    assert "exists in s3://studies/mine" in again.stderr
    done = sweep("--study", "far", "--resume", *storage, cwd=tmp_path, **s3)
    assert done.returncode == 0, done.stdout + done.stderr
    check_whole(folder, 3, 2, "far")
    # Even the measured seconds are equal: no epoch was trained again.
    (first, *_) = Ledger(folder / LEDGER).trials
    assert (first.params, first.reports) == (lost.params, lost.reports)
    assert batchcam.load(folder / "best" / "knee").metrics["study"] == "far"


def test_no_secret_is_on_the_disk_whenever_a_study_is_killed(
    s3: dict[str, str], environment: dict[str, str]
) -> None:
    """Search all files that a killed study leaves behind, Ray's own files included."""
    secrets = {
        "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
        "AWS_SECRET_ACCESS_KEY": s3["AWS_SECRET_ACCESS_KEY"],
        "BATCHCAM_OPTUNA_STORAGE": "sqlite:///{folder}/planted-secret-of-the-database.db",
    }
    # A short path, because the paths of sockets are limited.
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        secrets["BATCHCAM_OPTUNA_STORAGE"] = secrets["BATCHCAM_OPTUNA_STORAGE"].format(
            folder=folder
        )
        study = folder / "results" / "s"
        variables = environment | s3 | secrets
        variables |= {"TMPDIR": str(folder), "RAY_TMPDIR": str(folder), "WANDB_MODE": "offline"}
        command = [SCRIPT, "--study", "s", "--out", folder / "results", "--num-trials", 3]
        command += ["--max-epochs", 2, "--storage", "s3://studies/mine", *SMALL]
        assert kill_at(command, study, variables, after(study, 5))
        words = [value.rpartition("/")[2].encode() for value in secrets.values()]
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = {path.name for path in files}
        assert {"tuner.pkl", "study.json", LEDGER} <= names
        assert any(name.endswith(".wandb") for name in names)
        for path in files:
            content = path.read_bytes()
            for word in words:
                assert word not in content, path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_BUCKET = {
    "id": "bucket",
    "name": "run",
    "displayName": "run",
    "description": "",
    "config": "{}",
    "sweepName": "",
    "historyLineCount": 0,
    "project": {"id": "p", "name": "batchcam", "entity": {"id": "e", "name": "me"}},
}


class _WandbServer(http.server.BaseHTTPRequestHandler):
    """The part of W&B's server that a run needs to start online."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if b"UpsertBucket" in body:
            answer = {"data": {"upsertBucket": {"bucket": _BUCKET, "inserted": True}}}
        elif b"CreateRunFiles" in body:
            files = {"runID": "bucket", "uploadHeaders": [], "files": []}
            answer = {"data": {"createRunFiles": files}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def test_trial_ends_though_w_and_b_is_lost_and_its_record_is_on_the_disk(
    reports: list[tuple[EpochReport, Any]],
    recorded: Callable[[Path], list[Recorded]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 5)
    place = Tracking("batchcam", "group", tmp_path, "online")
    with track(place, "lost", "a name", {}) as run:
        run.log(reports[0][0], PICTURE)
        time.sleep(1)
        server.shutdown()
        server.server_close()
        for report, _ in reports[1:]:
            run.log(report, PICTURE)
        began = time.monotonic()
    assert time.monotonic() - began < 30
    (folder,) = tmp_path.glob("wandb/run-*-lost")
    assert next(folder.glob("*.wandb")).stat().st_size > 0
    # The next trial does not wait for the server at all.
    with track(place, "next", "a name", {}) as run:
        run.log(reports[0][0], PICTURE)
    # On a busy machine the first run may have been recorded offline, too.
    assert "next" in [record.run["run_id"] for record in recorded(tmp_path)]
