"""Tests of the GPU suite: its parts run on a CPU too, and what they give is kept and shown."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from batchcam.errors import ConfigError
from studies.benchmarks.gpu import __main__ as entry
from studies.benchmarks.gpu import measurements, suite
from studies.benchmarks.gpu.card import describe
from studies.benchmarks.gpu.checks import CHECKS
from studies.benchmarks.gpu.measurements import MEASUREMENTS
from studies.benchmarks.gpu.page import page
from studies.benchmarks.gpu.parts import Outcome, Part, Row, Setup, Skipped, run_parts
from studies.benchmarks.gpu.suite import Gpu, run
from studies.benchmarks.gpu.wheels import REQUIRED_BY, advice, core_packages, missing

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results" / "gpu"
SETUP = Setup(torch.device("cpu"), quick=True)

BLOCK = "import sys\nfor name in {names}: sys.modules[name] = None\n"


def _suite(tmp_path: Path, *parts: str) -> dict[str, Outcome]:
    """Run the suite quickly on the CPU, where only packages of the core can be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        BLOCK.format(names=("ray", "optuna", "wandb", "pytest", "hypothesis", "altair"))
    )
    out = tmp_path / "out"
    options = ["--device", "cpu", "--quick", "--out", str(out), "--together", "2"]
    if parts:
        options += ["--parts", *parts]
    done = subprocess.run(
        [sys.executable, "-m", "studies.benchmarks.gpu", *options],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == page(record)
    return {name: Outcome(**part) for name, part in record["parts"].items()}


def test_parts_run_without_any_extra(tmp_path: Path) -> None:
    chosen = ("against the CPU: simple_cnn", "memory", "packing", "steps: simple_cnn eager")
    outcomes = _suite(tmp_path, *chosen)
    assert set(outcomes) == set(chosen)
    for name, outcome in outcomes.items():
        assert outcome.state == "finished", name
        assert outcome.passed, name
        assert outcome.rows, name


@pytest.mark.parametrize(
    "name",
    [
        "against the CPU: simple_cnn",
        "resume",
        "bundle",
        "memory",
        "steps: simple_cnn eager",
        "trainer: simple_cnn",
        "time to target",
        "batch sizes",
    ],
)
def test_a_part_gives_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a part in this process, so that an error is shown as it is."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # A part sets it.
    (part,) = (each for each in (*CHECKS, *MEASUREMENTS) if each.name == name)
    rows = list(part.run(SETUP))
    assert rows
    assert all(row.get("passed", True) for row in rows), rows
    json.dumps(rows)
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiled_steps_are_those_of_an_eager_model() -> None:
    """Run the part with a backend that needs no compiler of C++."""
    (part,) = (each for each in CHECKS if each.name == "compiled: simple_cnn fp32")
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("aot_eager")
    torch.compiler.reset()
    try:
        rows = list(part.run(SETUP))
    finally:
        torch.compiler.set_default_backend(before)
        torch.compiler.reset()
    assert [row["passed"] for row in rows] == [True, True]


def test_a_process_that_shares_a_device_reports_its_speed() -> None:
    speeds: queue.Queue[float] = queue.Queue()
    measurements._train_for(SETUP, "simple_cnn", False, 0.1, threading.Barrier(1), speeds)
    assert speeds.get() > 0


def test_the_machine_is_described() -> None:
    (row,) = describe(SETUP)
    assert row["torch"] == torch.__version__
    assert row["card"]


def test_the_file_is_written_and_the_machine_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Gpu(out=tmp_path, device="cpu", quick=True, parts=("memory", "kernels"), commit="abc"))
    printed = capsys.readouterr().out
    assert "memory: finished" in printed
    assert "kernels: skipped" in printed
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["git_commit"] == "abc"
    assert set(record["parts"]) == {"memory", "kernels"}


def test_a_check_that_fails_is_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "CHECKS", (Part("wrong", _wrong, 30),))
    with pytest.raises(SystemExit) as ended:
        run(Gpu(out=tmp_path, device="cpu", quick=True, parts=("wrong",)))
    assert ended.value.code == 1


def test_missing_packages_are_named_before_they_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "core_packages", lambda: ["no-such-package"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert "1 packages are missing: no-such-package" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "no waiting",
        "recorded: simple_cnn",
        "memory of libraries",
        "memory forecast",
        "kernels",
        "against the CPU: resnet18",
        "steps: resnet18 recorded",
        "trainer: resnet18",
        "compiled: resnet18 fp32",
    ],
)
def test_a_part_that_does_not_apply_says_why(name: str) -> None:
    (part,) = (each for each in (*CHECKS, *MEASUREMENTS) if each.name == name)
    with pytest.raises(Skipped):
        list(part.run(SETUP))


@pytest.mark.faults
def test_every_part_runs_quickly_on_a_cpu(tmp_path: Path) -> None:
    outcomes = _suite(tmp_path)
    assert set(outcomes) == {part.name for part in (*CHECKS, *MEASUREMENTS)}
    for name, outcome in outcomes.items():
        assert outcome.passed, (name, outcome.message)
    checked = [row for outcome in outcomes.values() for row in outcome.rows if "passed" in row]
    assert len(checked) > 10


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--parts weather is unknown; choose from against the"):
        run(Gpu(out=tmp_path, parts=("weather",)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--device cuda cannot be used: .* 0 CUDA devices"):
        run(Gpu(out=tmp_path))
    assert not list(tmp_path.iterdir())


# --- Parts --------------------------------------------------------------------------------------


def _good(setup: Setup) -> Iterator[Row]:
    del setup
    yield {"check": "one", "passed": True, "found": 1}


def _wrong(setup: Setup) -> Iterator[Row]:
    del setup
    yield {"check": "one", "passed": False, "found": 2}


def _raises(setup: Setup) -> Iterator[Row]:
    yield from _good(setup)
    raise ValueError("as it should")


def _dies(setup: Setup) -> Iterator[Row]:
    yield from _good(setup)
    time.sleep(0.3)  # The row is on its way.
    os.kill(os.getpid(), signal.SIGKILL)


def _hangs(setup: Setup) -> Iterator[Row]:
    yield from _good(setup)
    child = subprocess.Popen(["sleep", "60"])
    yield {"pid": child.pid}
    time.sleep(60)


def _does_not_apply(setup: Setup) -> Iterator[Row]:
    yield from ()
    raise Skipped(f"not on {setup.device}")


def _outcomes(*parts: Part, seconds: float = 60) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    run_parts(
        parts,
        SETUP,
        together=3,
        deadline=time.monotonic() + seconds,
        on_change=outcomes.__setitem__,
    )
    return outcomes


def test_every_end_of_a_part_is_told_apart() -> None:
    outcomes = _outcomes(
        Part("good", _good, 30),
        Part("wrong", _wrong, 30),
        Part("raises", _raises, 30),
        Part("dies", _dies, 30),
        Part("does not apply", _does_not_apply, 30),
    )
    found = {name: (each.state, each.passed) for name, each in outcomes.items()}
    assert found == {
        "good": ("finished", True),
        "wrong": ("finished", False),
        "raises": ("failed", False),
        "dies": ("failed", False),
        "does not apply": ("skipped", True),
    }
    assert "ValueError: as it should" in outcomes["raises"].message
    assert "exit code -9" in outcomes["dies"].message
    assert outcomes["does not apply"].message == "not on cpu"
    assert all(len(outcomes[name].rows) == 1 for name in ("good", "wrong", "raises", "dies"))


def test_a_part_that_hangs_is_killed_with_what_it_started() -> None:
    started = time.monotonic()
    outcome = _outcomes(Part("hangs", _hangs, 1))["hangs"]
    assert time.monotonic() - started < 20
    assert (outcome.state, outcome.passed) == ("time limit", False)
    assert len(outcome.rows) == 2
    assert _ends(outcome.rows[1]["pid"])


def _ends(pid: int) -> bool:
    """Return whether a process is gone, or a zombie, within ten seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_no_part_starts_after_the_deadline() -> None:
    outcome = _outcomes(Part("late", _good, 30), seconds=-1)["late"]
    assert (outcome.state, outcome.passed) == ("not started", False)


# --- Packages and pages -------------------------------------------------------------------------


def test_nothing_of_the_core_is_missing_here() -> None:
    packages = core_packages()
    assert {"torch", "tyro", "pytorch-msssim", "scikit-learn"} <= set(packages)
    assert missing(packages) == []


def test_a_missing_package_is_named_with_what_it_requires() -> None:
    assert missing(["no-such-package", "torch"]) == ["no-such-package"]
    text = advice(["tyro", "pytorch-msssim"])
    assert "2 packages are missing: tyro, pytorch-msssim" in text
    assert "pip download --no-deps --dest wheels tyro==" in text
    assert "pytorch-msssim==" in text


@pytest.mark.parametrize("package", sorted(REQUIRED_BY))
def test_what_a_package_requires_is_known(package: str) -> None:
    """Check the table against metadata; packages that come with PyTorch are left out."""
    comes_with_torch = {"typing-extensions", "torch"}
    wanted = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, requires(package) or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    assert set(REQUIRED_BY[package]) == wanted - comes_with_torch


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_pages_are_those_of_their_records(path: Path) -> None:
    record = json.loads(path.read_text())
    assert not record["quick"]
    assert path.with_suffix(".md").read_text() == page(record)
