"""Check the command `batchcam-study`: help, errors, and the effect of each subcommand."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from studies.cli import main
from tests.studies.conftest import ROOT, STUDY_COMMAND

COMMANDS = ("run", "report", "compare", "dashboard", "view")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return a copy of the committed study."""
    return Path(shutil.copytree(ROOT / "results" / "fashion", tmp_path / "fashion"))


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit status and its output."""
    status = 0
    try:
        main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    return status, out + err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = _printed(capsys, "--help")
    assert status == 0
    assert all(f"{name} " in printed for name in COMMANDS)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("run", "--num-trials"),
        ("report", "results/mine"),
        ("compare", "--out"),
        ("dashboard", "--offline"),
        ("view", "--port"),
    ],
)
def test_each_command_has_help_of_its_own(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = _printed(capsys, command, "--help")
    assert status == 0
    assert f"batchcam-study {command}" in printed
    assert flag in printed


def test_help_loads_neither_torch_nor_ray() -> None:
    script = (
        "import sys; from studies.cli import main\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'wandb', 'optuna'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_report_is_written(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.outcome.report.importance._ROUNDS", 1)
    (study / "report.html").unlink()
    status, printed = _printed(capsys, "report", str(study))
    assert (status, printed.strip()) == (0, str(study / "report.html"))
    assert "<html" in (study / "report.html").read_text(encoding="utf-8")


def test_studies_are_compared(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison.md"
    status, printed = _printed(capsys, "compare", str(study), str(study), "--out", str(out))
    assert status == 0
    assert "hypervolume" in printed
    assert out.read_text(encoding="utf-8").startswith("## Studies")


def test_dashboard_is_written_offline(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = _printed(capsys, "dashboard", str(study), "--offline")
    assert (status, printed.strip()) == (0, str(study / "dashboard.json"))
    assert (study / "dashboard.json").stat().st_size > 1000


@pytest.mark.parametrize("command", ["report", "compare", "dashboard", "view"])
def test_a_folder_without_a_study_is_refused_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = _printed(capsys, command, str(tmp_path))
    assert status == 2
    assert printed.startswith("error: ")
    assert str(tmp_path) in printed
    assert len(printed.strip().splitlines()) == 1


def test_run_takes_the_flags_of_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed = _printed(capsys, "run", "--num-trials", "0")
    assert status == 2
    assert "num_trials=0 must be at least 1" in printed


def test_the_command_is_installed() -> None:
    done = subprocess.run([*STUDY_COMMAND, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "compare" in done.stdout


def test_a_loss_that_needs_masks_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed = _printed(capsys, "run", "--study", "s", "--losses", "mask_gradient")
    assert status == 2
    assert "needs a mask for every training image, and dataset digits has none" in printed
    assert not (tmp_path / "results" / "s").exists()


@pytest.mark.parametrize(
    "flag",
    [
        "--dataset {digits,mnist,fashion_mnist",
        "--objectives [{val_accuracy,cam_ssim,images_per_second}",
        "--precision {fp32,bf16,fp16}",
        "--metrics [{l1,l2,ssim}",
        "--losses [{proto,batch,energy,exchange,mask_gradient}",
    ],
)
def test_help_lists_the_choices_of_a_flag(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    status, printed = _printed(capsys, "run", "--help")
    assert status == 0
    assert flag in printed
