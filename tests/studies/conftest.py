"""Shared fixtures: a small real trial, a finished study, its commands; Ray, PostgreSQL and S3."""

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.fs
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer

from batchcam.config import TrialConfig
from batchcam.data.dataset import load_data
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.prototypes import class_prototypes
from batchcam.training.fit import EpochReport, fit
from cluster.local import LocalClusterSettings, local_cluster
from studies.engine.checkpoints import Checkpoints
from studies.outcome.export import TrialRecord

ROOT = Path(__file__).parents[2]
STUDY_COMMAND = [str(Path(sys.executable).with_name("batchcam-study"))]
"""The installed command `batchcam-study`."""

RAY_CPUS = 3
"""CPUs of the Ray that tests share. A trial that requests two of them runs alone."""

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def sweep(environment: dict[str, str]) -> Command:
    """Return a function that runs `python studies/bcpl_sweep.py` to its end."""

    def run(
        *words: str | Path, cwd: Path, timeout: float = 240, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "studies" / "bcpl_sweep.py", *words],
            cwd=cwd,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


# Images of 14 pixels need a quarter of the arithmetic of the default resolution.
SMALL = ("--resolutions", "14", "--cpus-per-trial", "1", "--min-epochs", "1")
STUDY = ("--study", "small", "--num-trials", "3", "--max-epochs", "2", *SMALL)
"""The options of the study that tests share."""
API_KEY = "0123456789abcdef" * 2 + "01234567"
"""The W&B key of the user who ran the shared study."""


@dataclass(frozen=True)
class Finished:
    """A finished study: its folder, and the output of its command."""

    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def study(
    sweep: Command, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Return a finished study of three trials, by a user with a W&B key but no route to the server.

    All tests in the xdist group "ray" share it. A test that changes it works on a copy.
    """
    folder = tmp_path_factory.mktemp("study")
    url = f"http://127.0.0.1:{free_port()}"
    done = sweep(*STUDY, cwd=folder, WANDB_API_KEY=API_KEY, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(folder / "results" / "small", done.stdout, done.stderr)


@dataclass(frozen=True)
class Recorded:
    """The content of an offline W&B file."""

    summary: dict[str, Any]
    run: dict[str, Any]
    history: list[dict[str, Any]]
    exit_code: int | None


@pytest.fixture(scope="session")
def recorded(environment: dict[str, str]) -> Callable[[Path], list[Recorded]]:
    """Return a function that reads the offline W&B runs in a folder, the oldest first."""

    def inspect(file: Path, *options: str) -> str:
        command = ["wandb", "leet", "inspect", *options, "--json", str(file)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def read(folder: Path) -> list[Recorded]:
        found = []
        for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
            records = [json.loads(line) for line in inspect(file).splitlines()]
            by_type = {record["type"]: record[record["type"]] for record in records}
            found.append(
                Recorded(
                    summary=json.loads(inspect(file, "--summary")),
                    run=by_type.get("run", {}),
                    history=[r["history"]["item"] for r in records if r["type"] == "history"],
                    exit_code=by_type["exit"]["exit_code"] if "exit" in by_type else None,
                )
            )
        return found

    return read


class PostgreSQL:
    """A PostgreSQL server of Debian's package, which can be stopped and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        (self._bin,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
        self._folder = folder
        self._port = port
        self._databases = 0
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user, self._user)
        options = "--auth=trust --username=me --no-sync --locale=C --encoding=UTF8"
        self._run("initdb", *options.split())

    def start(self) -> None:
        options = f"-p {self._port} -k {self._folder} -h 127.0.0.1 -F"
        self._run("pg_ctl", "start", "-w", "-o", options, "-l", str(self._folder / "log"))

    def stop(self) -> None:
        """Stop at once, without a shutdown, as a power failure would."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    def address(self, database: str) -> str:
        return f"postgresql+psycopg://me:secret@127.0.0.1:{self._port}/{database}"

    def new_database(self, encoding: str = "UTF8") -> str:
        """Create an empty database, and return its address."""
        self._databases += 1
        name = f"database{self._databases}"
        address = self.address("postgres").replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True) as connection:
            command = f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0"
            connection.execute(command.encode())
        return self.address(name)

    def _run(self, tool: str, *words: str) -> None:
        subprocess.run(
            [self._bin / tool, "-D", self._folder / "data", *words],
            user=self._user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )


@pytest.fixture(scope="session")
def postgresql(free_port: Callable[[], int]) -> Iterator[PostgreSQL]:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    # Not below pytest's folder, which the server's user may not enter.
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        server = PostgreSQL(Path(folder), free_port())
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def shared_ray(_clean_environment: None) -> Iterator[str]:
    """Yield the address of a Ray of three CPUs, which outlives the drivers that join it."""
    with local_cluster(LocalClusterSettings(workers=0, head_cpus=RAY_CPUS)) as cluster:
        yield cluster.address


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A local Ray of two CPUs, to which this process is connected."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def prepared() -> PreparedData:
    """Return 200 digits for training, and 100 each for validation and test."""

    def first(split: Split, count: int) -> Split:
        return Split(split.images[:count], split.labels[:count])

    data = load_data(TrialConfig(dataset="digits"))
    data = replace(
        data,
        train=first(data.train, 200),
        validation=first(data.validation, 100),
        test=first(data.test, 100),
    )
    train, validation = (
        class_prototypes(*to_device(split, torch.device("cpu")), data.num_classes)
        for split in (data.train, data.validation)
    )
    return PreparedData(data, train, validation)


@pytest.fixture(scope="session")
def config() -> TrialConfig:
    return TrialConfig(resolution=14, epochs=3, batch_size=64, device="cpu", lambda_batch=0.2)


@pytest.fixture(scope="session")
def reports(
    config: TrialConfig, prepared: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[EpochReport, str]]:
    """Return the report of each epoch of a real trial, with a folder of that epoch's checkpoint."""
    found = []

    def on_epoch(report: EpochReport) -> None:
        folder = str(tmp_path_factory.mktemp("checkpoints"))
        Checkpoints(folder).save(report.epoch, report.save_state)
        found.append((report, folder))

    fit(config, on_epoch, prepared=prepared)
    return found


@pytest.fixture
def make_record() -> Callable[..., TrialRecord]:
    """Return a function that makes a trial's record from metrics, without running a trial."""

    def make(
        trial_id: str,
        accuracy: float,
        ssim: float,
        *,
        config: TrialConfig | None = None,
        **changes: Any,
    ) -> TrialRecord:
        metrics = {
            "epoch": 5,
            "val_accuracy": accuracy,
            "cam_ssim": ssim,
            "cam_ssim_ceiling": 0.99,
            "images_per_second": 1234.5,
        }
        record = TrialRecord(
            trial_id=trial_id,
            state="completed",
            config=config or TrialConfig(),
            metrics=metrics,
            checkpoints="/unread",
            error=None,
        )
        return replace(record, **changes)

    return make


@pytest.fixture(scope="session")
def read_csv() -> Callable[[Path], list[dict[str, str]]]:
    def read(path: Path) -> list[dict[str, str]]:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Run an S3 server, set the variables that lead to it, and yield the address of a bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", address)
        fs, _ = pyarrow.fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
        fs.create_dir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of an empty storage location: a folder, then an object store."""
    if request.param == "folder":
        return str(tmp_path / "place")
    bucket: str = request.getfixturevalue("s3")
    return f"{bucket}/{tmp_path.name}/place"
