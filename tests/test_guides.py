"""Tests that the commands and the Python blocks of the guides run as they stand."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data.dataset import load_data
from batchcam.data.preprocessing import resize

ROOT = Path(__file__).parents[1]

LOCAL_CLUSTER = (
    "python -m cluster.",
    "python studies/bcpl_sweep.py --address",
    "ray get-auth-token",
    "RAY_AUTH_MODE=token ",
)
"""Beginning of each command that starts or uses a local cluster."""

RECORDED = "recorded: made the numbers of the page"
NOT_RUN = {
    "make ": "the gate runs both",
    "source ": "activates the environment, which the tests run in",
    "ray job submit": "needs a running cluster; tests/studies/test_job.py submits jobs",
    "python studies/bcpl_sweep.py --study mine": "takes an hour",
    "batchcam-study view": "serves until Ctrl-C; tests/studies/monitoring reads its pages",
    # results/README.md
    "for ": RECORDED,
    "done": RECORDED,
    "batchcam train --dataset mnist": RECORDED,
    "python studies/bcpl_sweep.py --study fashion": RECORDED,
    "python -m studies.benchmarks.": RECORDED,
    "batchcam verify results/mnist": "trains five epochs; tests/batchcam/cli verifies another",
    "batchcam train --config results/mnist": "trains five epochs; batchcam/README.md's is run",
    # cluster/README.md and cluster/SECURITY.md
    **dict.fromkeys(LOCAL_CLUSTER, "run by test_study_of_a_page_runs_on_the_local_cluster"),
    "sbatch ": "needs Slurm; tests/cluster/test_slurm.py submits the script",
    "tail -f batchcam-": "needs Slurm",
    "docker ": "needs Docker and a registry",
    "kubectl ": "needs Kubernetes; tests/cluster/test_launch_files.py validates the files",
    "sed ": "needs Kubernetes, as above",
    "export ": "needs Kubernetes, as above",
    "pip install 'ray": "needs a cloud; tests/cluster/test_launch_files.py validates the files",
    "ray up": "needs a cloud",
    "ray exec": "needs a cloud",
    "ray attach": "needs a cloud",
    "ray rsync-down": "needs a cloud",
    "ray down": "needs a cloud",
}
"""Beginning of each command of the guides that is not run, and the reason."""

PAGES = (
    "README.md",
    "batchcam/README.md",
    "studies/README.md",
    "cluster/README.md",
    "cluster/SECURITY.md",
    "results/README.md",
)

FINISHED = ("fashion", "mnist")
"""Folders in results/ that the commands of the guides read."""


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def _commands(page: str) -> list[str]:
    """Return the commands of a page, joined over continued lines, without comments."""
    text = "\n".join(_blocks(page, "sh")).replace("\\\n", " ")
    return [shlex.join(words) for line in text.splitlines() if (words := shlex.split(line, True))]


def _is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


def _run(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a command to its end, and check that it succeeds."""
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@contextmanager
def _local_cluster(command: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run the command of a local cluster, yield the address that it prints, and stop it."""
    log = folder / "cluster.log"
    words = ["env", *shlex.split(command)]  # env accepts variables before the command.
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        while "Press Ctrl-C" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        found = re.search(r"RAY_ADDRESS=(\S+)", log.read_text())
        assert found
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=120)  # It stops the nodes first.
    assert status == 0, log.read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader: the scripts, a study, and pictures of two classes."""
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    for name in FINISHED:
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "bright")):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(120 * label, 120 * label + 120, (64, 64, 3), np.uint8)
            picture = PIL.Image.fromarray(pixels)
            picture.save(tmp_path / "pictures" / "train" / name / f"{number}.png")
    picture.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        pytest.param("batchcam/README.md", marks=pytest.mark.faults),
        pytest.param(
            "studies/README.md", marks=[pytest.mark.faults, pytest.mark.xdist_group("ray")]
        ),
        "cluster/README.md",
        "cluster/SECURITY.md",
        pytest.param(
            "results/README.md",
            marks=[
                pytest.mark.faults,
                pytest.mark.skipif("BATCHCAM_DATA" not in os.environ, reason="needs MNIST"),
            ],
        ),
    ],
)
def test_commands_and_python_of_a_page_run(
    page: str, folder: Path, environment: dict[str, str]
) -> None:
    for command in filter(_is_run, _commands(page)):
        _run(command, folder, environment)
    digits = load_data(TrialConfig()).train
    images = resize(torch.from_numpy(digits.images[:64]).float() / 255, 28)
    labels = torch.from_numpy(digits.labels[:64])
    names: dict[str, Any] = {
        "train_images": images,
        "train_labels": labels,
        "loader": [(images[:16], labels[:16])],
    }
    for block in _blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.timeout(600)
@pytest.mark.faults
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("page", ["cluster/README.md", "cluster/SECURITY.md"])
def test_study_of_a_page_runs_on_the_local_cluster(
    page: str, folder: Path, environment: dict[str, str], free_port: Callable[[], int]
) -> None:
    reader = environment | {"HOME": str(folder)}  # Ray writes the token there.
    del reader["RAY_AUTH_MODE"]
    address = ""
    with ExitStack() as stack:
        for command in _commands(page):
            if "cluster.local" in command:
                # Another cluster on this machine may hold the default port.
                command += f" --dashboard-port {free_port()}"
                address = stack.enter_context(_local_cluster(command, folder, reader))
            elif command.startswith(LOCAL_CLUSTER):
                _run(command.replace("ADDRESS", address), folder, reader)
    (study,) = (path for path in (folder / "results").iterdir() if path.name not in FINISHED)
    assert (study / "best" / "knee").is_dir()


def test_commands_that_are_not_run_are_in_a_guide() -> None:
    commands = [command for page in PAGES for command in _commands(page)]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands), start


def test_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link
