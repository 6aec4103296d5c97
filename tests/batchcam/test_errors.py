"""Tests of the error classes, the check of formats and the suggestion of names."""

from pathlib import Path

import pytest

from batchcam import errors
from batchcam.errors import BatchCamError, FormatError, check_format, first_line, suggest_names


@pytest.mark.parametrize(
    "name",
    ["ConfigError", "DataError", "BackboneError", "BundleError", "DivergedError", "FormatError"],
)
def test_every_error_can_be_caught_as_one_and_as_a_value_error(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, BatchCamError)
    assert issubclass(kind, ValueError)


@pytest.mark.parametrize("found", [None, 1, 2, 3])
def test_format_that_is_known_is_accepted(found: int | None) -> None:
    check_format(Path("file"), found, 3)


@pytest.mark.parametrize("found", [4, 0, "3", 2.5])
def test_format_that_is_newer_is_refused_with_the_remedy(found: object) -> None:
    with pytest.raises(FormatError) as error:
        check_format(Path("some/file"), found, 3)
    assert str(error.value) == (
        f"some/file has the format {found!r}, but this version of batchcam reads formats up to 3; "
        "upgrade batchcam to the version that wrote the file, or a later one."
    )


def test_the_nearest_names_are_suggested() -> None:
    assert suggest_names("resnet81", ["resnet18", "vgg"]) == " Did you mean resnet18?"


def test_no_more_names_are_suggested_than_asked_for() -> None:
    known = [f"resnet{n}" for n in range(10, 20)]
    assert suggest_names("resnet1", known, limit=2).count(",") == 1


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert suggest_names("zzz", ["resnet18", "vgg"]) == ""
    assert suggest_names("zzz", []) == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n one\ntwo"), "one"),
        (MemoryError(), "MemoryError"),
        (OSError("x" * 300), "x" * 200),
    ],
)
def test_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line
