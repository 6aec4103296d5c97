"""Check that the examples in docstrings run."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import batchcam


def _modules() -> list[ModuleType]:
    names = [module.name for module in pkgutil.walk_packages(batchcam.__path__, "batchcam.")]
    return [importlib.import_module(name) for name in names]


def _with_examples() -> list[ModuleType]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [module for module in _modules() if any(test.examples for test in finder.find(module))]


@pytest.mark.parametrize("module", _with_examples(), ids=lambda module: module.__name__)
def test_examples_run(module: ModuleType) -> None:
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_public_losses_and_maps_have_examples() -> None:
    names = {module.__name__ for module in _with_examples()}
    assert names >= {
        "batchcam.cam",
        "batchcam.losses.energy",
        "batchcam.losses.exchange",
        "batchcam.losses.mask_gradient",
        "batchcam.losses.prototype",
        "batchcam.models.create",
        "batchcam.prototypes",
        "batchcam.similarity",
        "batchcam.training.fit",
    }
