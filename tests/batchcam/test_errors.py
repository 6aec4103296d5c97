"""Errors: one family, and suggestions that help."""

import pytest

from batchcam import errors
from batchcam.errors import BatchCamError, suggest_names


@pytest.mark.parametrize(
    "name", ["ConfigError", "DataError", "BackboneError", "BundleError", "DivergedError"]
)
def test_every_error_can_be_caught_as_one_and_as_a_value_error(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, BatchCamError)
    assert issubclass(kind, ValueError)


def test_the_nearest_names_are_suggested() -> None:
    assert suggest_names("resnet81", ["resnet18", "vgg"]) == " Did you mean resnet18?"


def test_no_more_names_are_suggested_than_asked_for() -> None:
    known = [f"resnet{n}" for n in range(10, 20)]
    assert suggest_names("resnet1", known, limit=2).count(",") == 1


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert suggest_names("zzz", ["resnet18", "vgg"]) == ""
    assert suggest_names("zzz", []) == ""
