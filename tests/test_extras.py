"""Tests of an installation without extras: what works, and what names the extra it needs."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "results" / "mnist" / "bcpl_l1" / "seed0"
EXTRAS = ("ray", "optuna", "wandb", "altair")

BLOCK = """
import sys

class _Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
"""
"""A `sitecustomize`, which Python imports at its start, that hides modules as if not installed."""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


def _needed(names: list[str]) -> set[str]:
    """Return the distributions that the named requirements install, dependencies included."""
    found: set[str] = set()
    open_ends = [Requirement(name) for name in names]
    while open_ends:
        requirement = open_ends.pop()
        name = canonicalize_name(requirement.name)
        try:
            dependencies = [] if name in found else requires(name) or []
        except PackageNotFoundError:  # Needed on another platform only.
            continue
        found.add(name)
        for each in map(Requirement, dependencies):
            extras = [*requirement.extras, ""]
            if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras):
                open_ends.append(each)
    return found


def _modules_of_extras() -> set[str]:
    """Return the installed modules that a plain installation lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = _needed(project["dependencies"]) | {"batchcam", "setuptools"}
    return {
        module
        for module, owners in packages_distributions().items()
        if not needed & {canonicalize_name(owner) for owner in owners}
    }


@pytest.fixture
def python(tmp_path: Path, environment: dict[str, str]) -> Python:
    """Return a function that runs Python without the given modules."""

    def run(*words: str | Path, absent: set[str]) -> subprocess.CompletedProcess[str]:
        (tmp_path / "sitecustomize.py").write_text(BLOCK.format(names=sorted(absent)))
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


def test_a_plain_installation_lacks_the_packages_of_studies() -> None:
    modules = _modules_of_extras()
    assert modules >= {*EXTRAS, "captum"}
    assert not modules & {"torch", "timm", "safetensors", "PIL", "batchcam"}


def test_a_bundle_is_loaded_and_explained_without_extras(python: Python) -> None:
    script = (
        "import sys, numpy, batchcam\n"
        f"loaded = batchcam.load({str(BUNDLE)!r})\n"
        "images = numpy.zeros((2, 28, 28), numpy.uint8)\n"
        "images[:, 4:24, 12:16] = 255\n"
        "maps = loaded.explain(images)\n"
        "print(maps.shape, loaded.predict(images))\n"
        f"assert not set({EXTRAS}) & set(sys.modules)\n"
    )
    done = python("-c", script, absent=_modules_of_extras())
    assert (done.returncode, done.stdout) == (0, "(2, 28, 28) [1 1]\n"), done.stderr


@pytest.mark.faults
def test_the_command_trains_and_explains_without_extras(python: Python, tmp_path: Path) -> None:
    command = "from batchcam.cli.main import main; main()"
    PIL.Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(tmp_path / "photo.png")
    for words in (
        ["train", "--dataset", "digits", "--resolution", "14", "--epochs", "1", "--out", "mine"],
        ["explain", "mine", "photo.png", "--out", "explained"],
        ["evaluate", "mine"],
    ):
        done = python("-c", command, *words, absent=_modules_of_extras())
        assert done.returncode == 0, done.stderr
    done = python("-c", command, "export", "mine", "--out", "other", absent=_modules_of_extras())
    assert done.returncode == 2
    assert "model.onnx needs the package onnxscript" in done.stderr


@pytest.mark.parametrize(
    ("words", "absent", "message"),
    [
        (["-m", "studies.bcpl_sweep"], "ray", "a study needs the package ray"),
        ([ROOT / "studies" / "bcpl_sweep.py"], "optuna", "a study needs the package optuna"),
        (["-c", "from studies.cli import main; main()", "run"], "ray", "a study needs"),
        (["-c", "from studies.cli import main; main()", "compare", "a", "b"], "ray", "compare"),
        (["-c", "from studies.cli import main; main()", "view", "a"], "optuna", "view"),
        (["-c", "from studies.cli import main; main()", "dashboard", "a"], "wandb", "dashboard"),
        (["-c", "from studies.cli import main; main()", "report", "a"], "altair", "report"),
        (["-m", "cluster.local"], "ray", "a Ray cluster needs the package ray"),
        (["-m", "cluster.wait", "--nodes", "1"], "ray", "cluster.wait needs the package ray"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    python: Python, words: list[str | Path], absent: str, message: str
) -> None:
    done = python(*words, absent={absent})
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    extra = "report" if absent == "altair" else "studies"
    assert f"run pip install '.[{extra}]' in a checkout of batchcam." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.faults
@pytest.mark.xdist_group("ray")
def test_a_study_without_the_report_says_so(python: Python, tmp_path: Path) -> None:
    words = ["--study", "mine", "--num-trials", "1", "--max-epochs", "1", "--resolutions", "14"]
    done = python(ROOT / "studies" / "bcpl_sweep.py", *words, absent={"altair", "vl_convert"})
    assert done.returncode == 0, done.stderr
    assert "no report will be written: report.html needs the package" in done.stdout
    folder = tmp_path / "results" / "mine"
    assert not (folder / "report.html").exists()
    assert f"`batchcam-study report {folder}`" in (folder / "README.md").read_text()
