"""Check that the examples in docstrings run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import batchcam
import studies.engine


def _modules() -> list[ModuleType]:
    names = [
        module.name
        for package in (batchcam, studies.engine)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    return [importlib.import_module(name) for name in names]


def _with_examples() -> list[ModuleType]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [module for module in _modules() if any(test.examples for test in finder.find(module))]


@pytest.mark.parametrize("module", _with_examples(), ids=lambda module: module.__name__)
def test_examples_run(module: ModuleType) -> None:
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_public_modules_have_examples() -> None:
    names = {module.__name__ for module in _with_examples()}
    assert names >= {
        "batchcam.cam",
        "batchcam.config",
        "batchcam.data.dataset",
        "batchcam.data.decoys",
        "batchcam.data.image_folder",
        "batchcam.data.prepared",
        "batchcam.data.preprocessing",
        "batchcam.data.splits",
        "batchcam.devices",
        "batchcam.errors",
        "batchcam.explainers",
        "batchcam.export.bundle",
        "batchcam.extras",
        "batchcam.figures",
        "batchcam.losses.energy",
        "batchcam.losses.exchange",
        "batchcam.losses.mask_gradient",
        "batchcam.losses.prototype",
        "batchcam.models.create",
        "batchcam.prototypes",
        "batchcam.provenance",
        "batchcam.similarity",
        "batchcam.training.fit",
        "studies.engine.checkpoints",
        "studies.engine.halving",
        "studies.engine.ledger",
        "studies.engine.protocol",
    }


def test_reference_has_every_module_but_those_of_the_command_line() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text().replace("\\\n", "")
    listed = re.search(r"^DOCUMENTED = batchcam \$\(addprefix batchcam\.,([^)]+)\)", makefile, re.M)
    assert listed is not None
    modules = {module.name for module in pkgutil.iter_modules(batchcam.__path__)}
    assert set(listed[1].split()) == modules - {"cli"}
