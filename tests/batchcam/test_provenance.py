"""Tests of the provenance of a number: its command and commit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchcam import provenance
from batchcam.provenance import command_line, git_commit


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_checkout_says_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bundle.py"
    file.write_text("one")
    person = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    for command in (("init", "-q"), ("add", "."), (*person, "commit", "-q", "-m", "one")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(file))
    commit = git_commit()
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    file.write_text("two")
    assert git_commit() == f"{commit}+dirty"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_an_installed_copy_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    for command in (("init", "-q"), (*person, "commit", "-q", "--allow-empty", "-m", "one")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "installed.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "installed.py"))
    assert git_commit() is None


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", os.devnull)
    assert git_commit() is None


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_the_command_of_this_process_is_one_that_can_be_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # Not python -m pytest.
    monkeypatch.setattr("sys.argv", ["/usr/bin/batchcam", "train", "--out", "my bundle"])
    assert command_line() == "batchcam train --out 'my bundle'"
    monkeypatch.setattr("sys.argv", ["studies/sweep.py", "--study", "mine"])
    assert command_line() == "python studies/sweep.py --study mine"


def test_a_module_is_named_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "study.py").write_text(
        "from batchcam.provenance import command_line\nprint(command_line())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "room.study", "--out", "a folder"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "python -m room.study --out 'a folder'"
