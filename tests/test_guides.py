"""Tests that the commands and the Python blocks of the guides run as they stand."""

import os
import re
import shlex
import shutil
import subprocess
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

NOT_RUN = {
    "make ": "the gate runs both",
    "source ": "activates the environment, which the tests run in",
    "ray job submit": "needs a running cluster; tests/studies/test_job.py submits jobs",
    "python studies/bcpl_sweep.py --study mine": "takes an hour",
    "batchcam-study view": "serves until Ctrl-C; tests/studies/monitoring reads its pages",
    # results/README.md
    "for ": "recorded: it made the numbers of the page",
    "done": "recorded, as above",
    "batchcam train --dataset mnist": "recorded, as above",
    "python studies/bcpl_sweep.py --study fashion": "recorded, as above",
    "python -m studies.benchmarks.": "recorded, as above",
    "batchcam verify results/mnist": "trains five epochs; tests/batchcam/cli verifies another",
    "batchcam train --config results/mnist": "trains five epochs; batchcam/README.md's is run",
    # cluster/README.md
    "python -m cluster.local": "runs until Ctrl-C; tests/cluster/test_local.py starts clusters",
    "python studies/bcpl_sweep.py --address": "needs a cluster; tests/cluster runs such studies",
    "sbatch ": "needs Slurm; tests/cluster/test_slurm.py submits the script",
    "tail -f batchcam-": "needs Slurm",
    "docker ": "needs Docker and a registry",
    "kubectl ": "needs Kubernetes; tests/cluster/test_launch_files.py validates the files",
    "sed ": "needs Kubernetes, as above",
    "export ": "needs Kubernetes, as above",
    "pip install 'ray": "needs a cloud; tests/cluster/test_launch_files.py validates the files",
    "ray get-auth-token": "needs a cloud; tests/studies/test_job.py makes such a token",
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
    "results/README.md",
)


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def _commands(page: str) -> list[str]:
    """Return the commands of a page, joined over continued lines, without comments."""
    text = "\n".join(_blocks(page, "sh")).replace("\\\n", " ")
    return [shlex.join(words) for line in text.splitlines() if (words := shlex.split(line, True))]


def _is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader: the scripts, a study, and pictures of two classes."""
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    for name in ("fashion", "mnist"):
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
