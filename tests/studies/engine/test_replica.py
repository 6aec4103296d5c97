import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from batchcam.errors import ConfigError
from studies.engine import replica as replica
from studies.engine import retry as patience
from studies.engine.ledger import LEDGER
from studies.engine.optuna_storage import JOURNAL
from studies.engine.replica import Replica
from studies.engine.retry import StorageLostError
from studies.engine.storage import open_storage


def add(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("a") as file:
        file.write(text)


def memory(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def objects(place: str) -> list[str]:
    fs, root = open_storage(place)
    selector = pyarrow.fs.FileSelector(root, allow_not_found=True)
    return sorted(info.base_name for info in fs.get_file_info(selector))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Return the study's folder on the driver's machine."""
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Return the study's folder on another machine, where nothing of it exists yet."""
    return tmp_path / "there"


def test_other_machine_has_what_was_copied(here: Path, there: Path, place: str) -> None:
    copy = Replica(here, place)
    copy.flush()
    assert objects(place) == []
    for count in range(3):
        add(here, LEDGER, f"event {count}, grüß\n")
        copy.flush()
        add(here, JOURNAL, f"proposal {count}\n")
    copy.flush()
    copy.flush()
    Replica(there, place)
    assert memory(there) == memory(here)


def test_line_that_is_not_at_its_end_is_not_copied_before_it_is(
    here: Path, there: Path, place: str
) -> None:
    copy = Replica(here, place)
    add(here, LEDGER, "whole\nhal")
    copy.flush()
    add(here, LEDGER, "f\n")
    Replica(there, place)
    assert memory(there) == {LEDGER: "whole\n"}
    copy.flush()
    Replica(there, place)
    assert memory(there) == {LEDGER: "whole\nhalf\n"}


def test_copy_stays_few_objects(
    here: Path, there: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "_PARTS", 4)
    copy = Replica(here, place)
    for count in range(11):
        add(here, LEDGER, f"event {count}\n")
        copy.flush()
        assert len(objects(place)) == count % 4 + 1
    Replica(there, place)
    assert memory(there) == memory(here)
    # A resumed replica first writes an object that holds everything, and replaces all others by it.
    copy = Replica(there, place)
    add(there, LEDGER, "one more\n")
    copy.flush()
    assert objects(place) == ["00000012.whole.json"]


def test_study_goes_on_on_either_machine(here: Path, there: Path, place: str) -> None:
    copy = Replica(here, place)
    add(here, LEDGER, "first\n")
    copy.flush()
    add(here, JOURNAL, "ahead of the copy\n")
    Replica(here, place).flush()
    copy = Replica(there, place)
    add(there, LEDGER, "second\n")
    add(there, JOURNAL, "second\n")
    copy.flush()
    Replica(here, place)
    assert memory(here) == memory(there)


def test_two_that_have_gone_apart_are_refused_and_left_alone(
    here: Path, there: Path, place: str
) -> None:
    copy = Replica(here, place)
    add(here, LEDGER, "first\n")
    copy.flush()
    Replica(there, place)
    add(here, LEDGER, "second, here\n")
    copy.flush()
    add(there, LEDGER, "second, there\n")
    before = memory(there)
    with pytest.raises(ConfigError, match="have diverged"):
        Replica(there, place)
    assert memory(there) == before


def test_two_files_of_different_moments_are_refused(here: Path, there: Path, place: str) -> None:
    copy = Replica(here, place)
    for name in (LEDGER, JOURNAL):
        add(here, name, "first\n")
    copy.flush()
    add(there, LEDGER, "first\nsecond\n")  # Without a journal.
    with pytest.raises(ConfigError, match="have diverged"):
        Replica(there, place)


@pytest.mark.parametrize("number", [1, 2])
def test_missing_object_is_noticed(here: Path, there: Path, place: str, number: int) -> None:
    copy = Replica(here, place)
    for count in range(4):
        add(here, LEDGER, f"event {count}\n")
        copy.flush()
    fs, root = open_storage(place)
    fs.delete_file(f"{root}/{number:08d}.part.json")
    with pytest.raises(ConfigError, match=f"{number + 1:08d}.part.json .* an object was deleted"):
        Replica(there, place)
    assert not there.exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({LEDGER: {"from": 0}})])
def test_damaged_object_is_noticed(there: Path, place: str, content: str) -> None:
    fs, root = open_storage(place)
    fs.create_dir(root)
    with fs.open_output_stream(f"{root}/00000000.whole.json") as file:
        file.write(content.encode())
    with pytest.raises(ConfigError, match=r"00000000.whole.json .* is damaged"):
        Replica(there, place)


def test_storage_that_is_gone_ends_the_study_to_be_resumed(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "RETRY_SECONDS", 0.3)
    copy = Replica(here, str(tmp_path / "place"))
    (tmp_path / "place").write_text("in the way of the folder")
    add(here, LEDGER, "event\n")
    with pytest.raises(StorageLostError, match="place cannot be used"):
        copy.flush()
    (tmp_path / "place").unlink()
    copy.flush()
    assert objects(str(tmp_path / "place")) == ["00000000.whole.json"]


def test_reports_alone_are_copied_every_few_seconds(
    here: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    copy = Replica(here, place)
    trial: Any = None
    add(here, LEDGER, "proposed\n")
    copy.on_trial_start(0, [], trial)
    for _ in range(3):
        now += 2
        add(here, LEDGER, "report\n")
        copy.on_trial_result(0, [], trial, {})
    assert len(objects(place)) == 2
    add(here, LEDGER, "ended\n")
    copy.on_trial_complete(0, [], trial)
    assert len(objects(place)) == 3
    assert pickle.loads(pickle.dumps(copy)).__dict__ == {}


def test_place_that_cannot_be_read_is_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match="Check --storage"):
        Replica(here, "gopher://x")
