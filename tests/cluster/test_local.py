import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

import batchcam
from cluster.local import LocalCluster, LocalClusterSettings, local_cluster, main
from studies.settings import StudySettings
from studies.space import SearchSpace
from studies.study import run_study

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterSettings(workers=2)) as running:
        yield running


@pytest.fixture
def _joined(cluster: LocalCluster) -> Iterator[None]:
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


def alive() -> dict[str, dict[str, Any]]:
    """Return the live nodes of the cluster that this process has joined, by their ids."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node for node in nodes if node["Alive"]}


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail after a minute."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("the condition did not hold within a minute")


def where(params: dict[str, Any]) -> None:
    """Report the node on which the trial runs."""
    del params
    tune.report({"node": ray.get_runtime_context().get_node_id()})


@pytest.mark.faults
@pytest.mark.usefixtures("_joined")
def test_trials_run_on_workers_only(cluster: LocalCluster, tmp_path: Path) -> None:
    results = tune.Tuner(
        tune.with_resources(where, {"cpu": 1}),
        tune_config=tune.TuneConfig(num_samples=3),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    used = {(results[index].metrics or {})["node"] for index in range(len(results))}
    assert used
    assert used <= {worker.node_id for worker in cluster.workers}


@pytest.mark.faults
@pytest.mark.usefixtures("_joined")
def test_nodes_come_and_go(cluster: LocalCluster) -> None:
    before = alive()
    assert len(before) == 3
    added = cluster.add_worker()
    assert alive().keys() - before.keys() == {added.node_id}
    assert alive()[added.node_id]["Resources"]["CPU"] == 1
    cluster.remove_worker(added)
    # The head notices the loss only when the node fails its health checks.
    wait_until(lambda: alive().keys() == before.keys())


@pytest.mark.faults
def test_study_runs_on_the_cluster_that_is_named(cluster: LocalCluster, tmp_path: Path) -> None:
    settings = StudySettings(
        study="distributed",
        out=tmp_path,
        num_trials=2,
        max_epochs=1,
        space=SearchSpace(resolutions=(14,)),
        address=cluster.address,
    )
    run_study(settings)
    assert batchcam.load(settings.folder / "best" / "knee").metrics["study"] == "distributed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "-1"], "error: workers=-1 must be 0 or more"),
        (["--head-cpus", "-1"], "error: head_cpus=-1 must be 0 or more"),
        (["--workers", "0"], "error: the cluster has no CPU; raise --workers or --head-cpus"),
        (["--cpus-per-worker", "0"], "error: the cluster has no CPU"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(words)


@pytest.mark.parametrize(
    ("variables", "content", "message"),
    [
        ({}, None, ".ray/auth_token has none: No such file or directory. Run `ray get-auth-token"),
        ({}, "\n", ".ray/auth_token has none: it is empty. Run `ray get-auth-token --generate`, "),
        ({"RAY_AUTH_TOKEN": ""}, None, ".ray/auth_token has none: No such file or directory. "),
        (
            {"RAY_AUTH_TOKEN_PATH": "absent"},
            "token",
            "absent has none: No such file or directory. Correct RAY_AUTH_TOKEN_PATH, ",
        ),
    ],
)
def test_missing_token_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    variables: dict[str, str],
    content: str | None,
    message: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if content is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: RAY_AUTH_MODE=token requires a token, but ")
    assert message in error


def processes_with(mark: str) -> list[int]:
    """Return the ids of the processes whose environment contains `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # The process has ended, or belongs to another user.
            continue
    return found


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_keeps_a_cluster_until_it_is_ended(
    environment: dict[str, str], number: signal.Signals, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mark = str(uuid.uuid4())
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.local", "--workers=1", f"--dashboard-port={port}"],
            env=environment | {"TEST_MARK": mark},
            stdout=file,
            stderr=file,
        )
    try:
        while "Press Ctrl-C to stop them" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        told = log.read_text()
        assert "2 nodes are running" in told
        assert f"RAY_API_SERVER_ADDRESS=http://127.0.0.1:{port} ray job submit" in told
        found = re.search(r"RAY_ADDRESS=([\d.]+):(\d+) python", told)
        assert found
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
        assert len(processes_with(mark)) > 1
        process.send_signal(number)
        assert process.wait(timeout=120) == 0
        wait_until(lambda: processes_with(mark) == [])
    finally:
        process.kill()
        process.wait(timeout=30)
