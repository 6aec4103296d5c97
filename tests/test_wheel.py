"""Tests of the wheel: it is built, installed into an environment of its own, and used there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import batchcam

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("wheel"),
]

Installed = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def installed(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> tuple[Path, Installed]:
    """Return a folder, and a function that runs a program of the installed wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    python = folder / "venv" / "bin" / "python"

    def run(program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python.with_name(program), *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    copy = folder / "checkout"  # Without build/, whose old files setuptools would pack.
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "batchcam", "studies", "cluster", "pyproject.toml", "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.rstrip("\0").split("\0"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    wheel = folder / f"batchcam-{batchcam.__version__}-py3-none-any.whl"
    commands: tuple[list[str | Path], ...] = (
        ["wheel", "--no-deps", "--wheel-dir", folder, copy],
        ["install", "-c", ROOT / "constraints.txt", wheel],
    )
    for words in commands:
        done = run("python", "-m", "pip", "--disable-pip-version-check", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder, run


def test_the_wheel_trains_explains_and_reloads(installed: tuple[Path, Installed]) -> None:
    folder, run = installed
    PIL.Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(folder / "photo.png")
    for words in (
        ["train", "--dataset", "digits", "--resolution", "14", "--epochs", "1", "--out", "mine"],
        ["explain", "mine", "photo.png", "--out", "explained"],
        ["evaluate", "mine"],
    ):
        done = run("batchcam", *words)
        assert done.returncode == 0, done.stderr
    script = "import batchcam; print(batchcam.__version__, batchcam.load('mine').config.dataset)"
    done = run("python", "-c", script)
    assert done.stdout == f"{batchcam.__version__} digits\n", done.stderr
    assert '"git_commit": null' in (folder / "mine" / "metrics.json").read_text()


def test_the_wheel_without_extras_names_the_one_that_studies_need(
    installed: tuple[Path, Installed],
) -> None:
    _, run = installed
    for name in ("ray", "optuna", "wandb", "altair", "pandas"):
        assert run("python", "-c", f"import {name}").returncode == 1, name
    done = run("batchcam-study", "run")
    assert done.returncode == 2
    assert "a study needs the package" in done.stderr


def test_the_wheel_has_the_files_of_the_report(installed: tuple[Path, Installed]) -> None:
    _, run = installed
    script = (
        "from importlib.resources import files\n"
        "folder = files('studies.outcome') / 'report'\n"
        "print(all((folder / name).is_file() for name in ('template.html', 'page.css', 'page.js')))"
    )
    done = run("python", "-c", script)
    assert done.stdout == "True\n", done.stderr
