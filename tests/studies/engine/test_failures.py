"""Check searches whose trials' processes are killed, on a local Ray.

The killed processes, Ray's memory monitor and its errors are real. The kernel's count of kills is a
file, because a test cannot fill the memory of the machine.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from studies.engine import failures
from studies.engine.cgroups import oom_kills
from studies.engine.ledger import TrialHistory
from studies.engine.ledger_callback import ERRORS
from studies.engine.protocol import RESOURCE_MULTIPLIER, Objective, report
from studies.engine.run import Search, run_search

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def two_cpus() -> Iterator[None]:
    """Run a Ray of two CPUs, on which a trial can be enlarged once."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"x": trial.suggest_float("x", 0.0, 1.0)}


def run_one(
    folder: Path, trainable: Callable[[dict[str, Any]], None], max_failures: int = 0
) -> TrialHistory:
    """Run a search of one trial, and return the trial's history."""
    search = Search(
        name="s",
        key="k",
        space=space,
        objectives=(Objective("gain", "gain"),),
        min_epochs=1,
        max_epochs=1,
        num_trials=1,
        max_failures=max_failures,
    )
    ledger = run_search(search, folder, trainable, lambda m: {"CPU": min(m, 2)}, lambda: 1)
    (history,) = ledger.trials
    return history


def killed(params: dict[str, Any], *, tries: Path, kills: int, root: Path | None = None) -> None:
    """Die by SIGKILL in the first `kills` tries, as by the OOM killer if there is a `root`."""
    tries.mkdir(exist_ok=True)
    before = len(list(tries.iterdir()))
    (tries / str(before)).touch()
    if before < kills:
        if root is not None:
            while not (root / "asked").exists():  # Real trials do not die this soon.
                time.sleep(0.05)
            (root / "proc/vmstat").write_text(f"oom_kill {before + 1}\n")
        os.kill(os.getpid(), signal.SIGKILL)
    report({"epoch": 1, "gain": params[RESOURCE_MULTIPLIER]})


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of a machine whose kernel has killed no process yet."""
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/vmstat").write_text("oom_kill 0\n")

    def count() -> int | None:
        kills = oom_kills(root)
        (root / "asked").touch()
        return kills

    monkeypatch.setattr(failures, "oom_kills", count)
    return root


@pytest.mark.usefixtures("two_cpus")
def test_trial_killed_by_the_kernel_starts_again_with_more_memory(
    tmp_path: Path, kernel: Path
) -> None:
    trainable = partial(killed, tries=tmp_path / "tries", kills=1, root=kernel)
    history = run_one(tmp_path, trainable)
    assert (history.state, history.resource_multiplier) == ("completed", 2)
    assert history.reports == [{"epoch": 1, "gain": 2}]
    assert not (tmp_path / ERRORS).exists()


@pytest.mark.faults
@pytest.mark.usefixtures("two_cpus")
def test_trial_killed_by_the_kernel_fails_where_there_is_no_more_memory(
    tmp_path: Path, kernel: Path
) -> None:
    trainable = partial(killed, tries=tmp_path / "tries", kills=9, root=kernel)
    history = run_one(tmp_path, trainable, max_failures=1)
    assert (history.state, history.resource_multiplier) == ("failed", 2)
    assert history.error == (
        "out of memory (killed by the kernel's OOM killer), with all that a node has"
    )
    # The usual resources, twice these, and one more try.
    assert len(list((tmp_path / "tries").iterdir())) == 3
    assert "actor died" in (tmp_path / ERRORS / "k_00000.txt").read_text()


@pytest.mark.usefixtures("two_cpus")
def test_trial_killed_by_others_is_tried_again_with_the_same_memory(
    tmp_path: Path, kernel: Path
) -> None:
    del kernel
    history = run_one(tmp_path, partial(killed, tries=tmp_path / "tries", kills=1), max_failures=1)
    assert (history.state, history.resource_multiplier) == ("completed", 1)


@pytest.mark.faults
@pytest.mark.usefixtures("two_cpus")
def test_trial_killed_by_others_too_often_fails(tmp_path: Path) -> None:
    history = run_one(tmp_path, partial(killed, tries=tmp_path / "tries", kills=9), max_failures=2)
    assert (history.state, history.resource_multiplier) == ("failed", 1)
    assert "out of memory (" not in str(history.error)
    assert len(list((tmp_path / "tries").iterdir())) == 3


def exhausted(params: dict[str, Any]) -> None:
    if params[RESOURCE_MULTIPLIER] == 1:
        raise MemoryError("no more")
    report({"epoch": 1, "gain": 1.0})


@pytest.mark.usefixtures("two_cpus")
def test_memory_error_of_the_trainable_enlarges_the_trial(tmp_path: Path) -> None:
    history = run_one(tmp_path, exhausted)
    assert (history.state, history.resource_multiplier) == ("completed", 2)


def hungry(params: dict[str, Any]) -> None:
    """Take memory until killed, but not with twice the usual resources."""
    blocks = []
    while params[RESOURCE_MULTIPLIER] == 1:
        blocks.append(b"x" * 100 * 2**20)
        time.sleep(0.02)
    report({"epoch": 1, "gain": 1.0})


@pytest.mark.faults
def test_trial_killed_by_rays_memory_monitor_starts_again_with_more_memory(
    tmp_path: Path,
) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    memory = {line.split(":")[0]: int(line.split()[1]) for line in lines}  # In KiB.
    full = 1 - (memory["MemAvailable"] - 3 * 2**20) / memory["MemTotal"]
    if full > 0.9:
        pytest.skip("needs 3 GiB of free memory")
    settings = {"memory_usage_threshold": full, "memory_monitor_refresh_ms": 50}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config=settings,
    )
    try:
        history = run_one(tmp_path, hungry)
    finally:
        ray.shutdown()
    assert (history.state, history.resource_multiplier) == ("completed", 2)
    assert not issubclass(OutOfMemoryError, RayActorError)  # Of the search only.
