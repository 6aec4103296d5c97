"""Tests of the package's public names, which are imported on first use."""

import subprocess
import sys
from importlib import import_module

import pytest

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
