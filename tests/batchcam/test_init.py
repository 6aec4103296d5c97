"""Tests of the package's public names, which are imported on first use."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import batchcam


def test_public_names_are_those_of_their_modules() -> None:
    for name in batchcam.__all__:
        assert getattr(batchcam, name).__name__ == name
        assert name in dir(batchcam)
    assert batchcam.fit is import_module("batchcam.training.fit").fit
    assert batchcam.load is import_module("batchcam.export.bundle").load


def test_submodules_are_attributes_without_being_imported() -> None:
    code = (
        "import sys, batchcam; assert 'torch' not in sys.modules; print(batchcam.cam.grad_cam, "
        "batchcam.models.create_model)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "grad_cam" in done.stdout
    assert "create_model" in done.stdout


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'batchcam' has no attribute 'nothing'"):
        _ = batchcam.nothing  # type: ignore[attr-defined]
    assert not hasattr(batchcam, "__wrapped__")


def test_version_is_that_of_the_package_and_of_the_citation() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert batchcam.__version__ == project["version"] == citation["version"]
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert f"## {project['version']}" in (root / "CHANGELOG.md").read_text()
