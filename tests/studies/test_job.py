"""Check studies that are submitted as jobs to a running Ray cluster, as README.md shows."""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import batchcam
from tests.studies.conftest import ROOT, Command

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("ray"), pytest.mark.faults]


@dataclass(frozen=True)
class Head:
    """A cluster's head node: the checkout that started it, and the environment of its clients."""

    address: str
    checkout: Path
    client: dict[str, str]


@pytest.fixture(scope="module")
def head(
    environment: dict[str, str],
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Head]:
    """Start a one-node cluster with token authentication from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("head")
    checkout = folder / "checkout"
    for room in ("batchcam", "studies"):
        shutil.copytree(ROOT / room, checkout / room, ignore=shutil.ignore_patterns("__pycache__"))
    # A separate home, because Ray stores the token there.
    (folder / "home").mkdir()
    variables = environment | {"RAY_AUTH_MODE": "token", "HOME": str(folder / "home")}
    subprocess.run(
        ["ray", "get-auth-token", "--generate"],
        env=variables,
        check=True,
        capture_output=True,
        timeout=60,
    )
    # A separate folder: Ray gives jobs the address of the latest cluster that uses the same one.
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    port, dashboard = free_port(), free_port()
    command = ["ray", "start", "--head", "--block", "--num-cpus", "2", "--port", str(port)]
    command += [
        "--temp-dir",
        scratch,
        "--dashboard-host",
        "127.0.0.1",
        "--dashboard-port",
        str(dashboard),
    ]
    # Another cluster on this machine may hold the default ports. Jobs need the agent.
    command += ["--dashboard-agent-listen-port", str(free_port())]
    command += ["--ray-client-server-port", str(free_port())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=checkout, env=variables, stdout=log, stderr=log, start_new_session=True
        )
        try:
            client = variables | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            while ray("job", "list", env=client, cwd=folder).returncode:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
            yield Head(f"127.0.0.1:{port}", checkout, client)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            shutil.rmtree(scratch, ignore_errors=True)


def ray(*words: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ray", *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=500
    )


def test_job_is_submitted_from_the_checkout_as_the_manual_says(head: Head) -> None:
    done = ray("job", "submit", "studies/bcpl_sweep.py", env=head.client, cwd=head.checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    (folder,) = (head.checkout / "results").iterdir()
    assert folder.name.startswith("bcpl-digits-")
    assert f"Best bundle: {folder / 'best' / 'knee'}" in done.stdout
    assert len((folder / "trials.csv").read_text().splitlines()) == 1 + 8
    assert batchcam.load(folder / "best" / "knee").metrics["val_accuracy"] > 0.9
    assert len(list(folder.glob("wandb/offline-run-*"))) == 8


def test_job_can_bring_its_own_code_and_say_where_results_go(head: Head, tmp_path: Path) -> None:
    entrypoint = "python studies/bcpl_sweep.py --study own --num-trials 2 --max-epochs 1"
    done = ray(
        *("job", "submit", "--working-dir", ".", "--"),
        *entrypoint.split(),
        *("--resolutions", "14", "--out", str(tmp_path)),
        env=head.client,
        cwd=head.checkout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert batchcam.load(tmp_path / "own" / "best" / "knee").metrics["study"] == "own"


def test_client_without_the_token_is_refused(head: Head, tmp_path: Path) -> None:
    stranger = head.client | {"RAY_AUTH_TOKEN": "not-the-token"}
    done = ray("job", "submit", "studies/bcpl_sweep.py", env=stranger, cwd=tmp_path)
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()
    assert "submitted successfully" not in done.stdout


@pytest.mark.parametrize(
    "authentication",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "not-the-token"}],
    ids=["none", "wrong"],
)
def test_driver_without_the_token_is_refused_with_the_remedy(
    head: Head, sweep: Command, tmp_path: Path, authentication: dict[str, str]
) -> None:
    done = sweep(
        *("--study", "s", "--address", head.address),
        cwd=tmp_path,
        # Ray tries once a second, 20 times by default.
        **(head.client | {"RAY_NUM_REDIS_GET_RETRIES": "1"} | authentication),
    )
    assert done.returncode == 2
    assert f"error: no Ray cluster accepts a connection at '{head.address}'" in done.stderr
    assert "set RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN to its token" in done.stderr
    assert "Traceback" not in done.stderr
