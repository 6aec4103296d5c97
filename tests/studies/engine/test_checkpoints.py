from collections.abc import Callable
from pathlib import Path

import pyarrow.fs
import pytest

from studies.engine.checkpoints import Checkpoints
from studies.engine.storage import open_storage


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def save(kept: Checkpoints, *epochs: int) -> None:
    for epoch in epochs:
        kept.save(epoch, write(f"state {epoch}"))


def newest(place: str) -> str | None:
    with Checkpoints(place).newest() as state:
        return None if state is None else state.read_text()


def names(place: str) -> list[str]:
    fs, root = open_storage(place)
    return sorted(info.base_name for info in fs.get_file_info(pyarrow.fs.FileSelector(root)))


def put(place: str, name: str, text: str) -> None:
    fs, root = open_storage(place)
    with fs.open_output_stream(f"{root}/{name}") as file:
        file.write(text.encode())


def test_trial_that_never_saved_has_no_state(place: str) -> None:
    assert newest(place) is None


def test_newest_state_is_taken_and_two_are_kept(place: str) -> None:
    kept = Checkpoints(place)
    for epoch in (1, 2, 9, 10, 11):
        save(kept, epoch)
        assert newest(place) == f"state {epoch}"
    assert [name[:12] for name in names(place)] == ["epoch_000010", "epoch_000011"]


def test_damaged_state_is_passed_over_and_said_so(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(Checkpoints(place), 1, 2)
    older, newer = names(place)
    put(place, newer, "state")
    assert newest(place) == "state 1"
    assert f"{newer} is damaged; using the state before it" in caplog.text
    put(place, older, "")
    assert newest(place) is None


def test_epoch_trained_again_after_damage_replaces_what_was_damaged(place: str) -> None:
    kept = Checkpoints(place)
    save(kept, 1, 2)
    damaged = names(place)[1]
    put(place, damaged, "damage")
    kept.save(2, write("state 2, again"))
    assert newest(place) == "state 2, again"
    assert damaged not in names(place)
    assert [name[:12] for name in names(place)] == ["epoch_000001", "epoch_000002"]


def test_epoch_trained_again_to_the_same_state_mends_it(place: str) -> None:
    kept = Checkpoints(place)
    save(kept, 1, 2)
    put(place, names(place)[1], "damage")
    save(kept, 2)
    assert newest(place) == "state 2"
    assert len(names(place)) == 2


def test_state_that_was_cut_as_it_was_written_does_not_count(place: str) -> None:
    kept = Checkpoints(place)
    save(kept, 1)
    (name,) = names(place)
    put(place, f".{name.replace('epoch_000001', 'epoch_000002')}.partial", "sta")
    assert newest(place) == "state 1"
    save(kept, 2, 3)
    assert newest(place) == "state 3"


def test_what_is_no_state_is_left_alone(place: str) -> None:
    save(Checkpoints(place), 1)
    for name in ("notes.txt", "epoch_1.pt", "epoch_000009.0123.pt"):
        put(place, name, "of someone else")
    save(Checkpoints(place), 2, 3)
    assert newest(place) == "state 3"
    assert len(names(place)) == 5


def test_trials_do_not_see_each_other(place: str) -> None:
    first, second = f"{place}/a", f"{place}/b"
    save(Checkpoints(first), 1)
    save(Checkpoints(second), 2, 3)
    assert (newest(first), newest(second)) == ("state 1", "state 3")


def test_writing_that_fails_leaves_what_was_there(place: str) -> None:
    kept = Checkpoints(place)
    save(kept, 1)

    def fail(path: Path) -> None:
        path.write_text("sta")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        kept.save(2, fail)
    assert newest(place) == "state 1"
    assert len(names(place)) == 1


def test_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save(Checkpoints(str(tmp_path / "file" / "k_00000")), 1)


def test_bucket_that_is_not_there_is_an_error_of_the_system(s3: str) -> None:
    with pytest.raises(OSError, match="nobucket"):
        save(Checkpoints(s3.replace("bucket", "nobucket")), 1)


def test_relative_folder_is_where_the_study_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Checkpoints("checkpoints")
    monkeypatch.chdir("/")
    save(kept, 1)
    assert newest(str(tmp_path / "checkpoints")) == "state 1"
