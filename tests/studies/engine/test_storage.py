from pathlib import Path

import pyarrow.fs
import pytest

from batchcam.errors import ConfigError
from studies.engine.storage import check_storage, copy_file, is_file, open_storage


def names(place: str) -> list[str]:
    fs, root = open_storage(place)
    return sorted(info.base_name for info in fs.get_file_info(pyarrow.fs.FileSelector(root)))


def test_storage_that_can_be_used_is_left_as_it_was(place: str) -> None:
    check_storage(place)
    assert names(place) == []


@pytest.mark.parametrize("wrong", ["s3://no-such-bucket/study", "s3://bucket/a name", "gopher://x"])
def test_storage_that_cannot_be_used_is_refused(s3: str, wrong: str) -> None:
    assert s3 == "s3://bucket"
    with pytest.raises(ConfigError, match=rf"cannot be stored in {wrong}: .*Check --storage"):
        check_storage(wrong)


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be stored in"):
        check_storage(str(tmp_path / "file" / "study"))


def test_files_go_from_one_place_to_another_and_back(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    far = f"{place}/in/a/folder"
    assert not is_file(far)
    copy_file(str(tmp_path / "file"), far)
    assert is_file(far)
    assert not is_file(f"{place}/in/a")
    copy_file(far, str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "content"


def test_place_that_cannot_be_read_is_an_error_that_says_what_to_look_at(s3: str) -> None:
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        is_file("gopher://x/file")
    with pytest.raises(OSError, match="none"):
        copy_file(f"{s3}/none", "/tmp/none")


def test_keys_are_read_when_a_place_is_opened(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the keys after opening, as the driver does to keep them from Ray."""
    fs, path = open_storage(f"{s3}/kept")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with fs.open_output_stream(path) as file:
        file.write(b"written")
    assert fs.get_file_info(path).is_file
