"""Check whole studies on local Ray clusters, most of them started by the command itself."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
import torch

import batchcam
from batchcam.config import TrialConfig
from batchcam.errors import BackboneError, BundleError, ConfigError, DataError
from batchcam.export.bundle import FILES
from studies import paths
from studies.engine.ledger import LEDGER, Ledger
from studies.engine.ledger_callback import ERRORS
from studies.engine.optuna_storage import JOURNAL
from studies.engine.replica import Replica
from studies.outcome.export import StudyError
from studies.settings import StudySettings
from studies.space import SearchSpace
from studies.study import _trials_left, main, run_study
from tests.studies.conftest import API_KEY, SMALL, STUDY, Finished, Recorded

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("ray")]


@pytest.fixture
def rows(study: Finished, read_csv: Callable[[Path], list[dict[str, str]]]) -> list[dict[str, str]]:
    return read_csv(study.folder / "trials.csv")


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the modification time and the size of each file."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_table_has_a_row_per_trial(rows: list[dict[str, str]]) -> None:
    assert len({row["trial_id"] for row in rows}) == 3
    for row in rows:
        assert row["state"] in ("completed", "stopped")
        assert row["resolution"] == "14"
        assert row["epoch"] == ("2" if row["state"] == "completed" else "1")
        assert 0 < float(row["val_accuracy"]) <= 1
        assert float(row["cam_ssim"]) <= float(row["cam_ssim_ceiling"])


def test_first_trials_are_the_baseline_and_bcpl(rows: list[dict[str, str]]) -> None:
    assert (rows[0]["lambda_proto"], rows[0]["lambda_batch"]) == ("0.0", "0.0")
    assert (rows[1]["lambda_proto"], rows[1]["lambda_batch"]) == ("0.0", "0.1")


def test_pareto_front_is_of_trials_of_the_study(
    study: Finished, rows: list[dict[str, str]]
) -> None:
    front = json.loads((study.folder / "pareto.json").read_text())
    assert front["objectives"] == {"val_accuracy": "maximise", "cam_ssim": "maximise"}
    by_id = {row["trial_id"]: row for row in rows}
    for trial in front["trials"]:
        row = by_id[trial["trial_id"]]
        assert float(row["val_accuracy"]) == trial["metrics"]["val_accuracy"]
        assert float(row["learning_rate"]) == trial["config"]["learning_rate"]


@pytest.mark.parametrize("name", ["accuracy", "ssim", "knee", "baseline"])
def test_exported_bundle_loads_and_is_the_trial(
    study: Finished, rows: list[dict[str, str]], name: str
) -> None:
    folder = study.folder / "best" / name
    assert {path.name for path in folder.iterdir()} == set(FILES)
    model = batchcam.load(folder)
    row = next(row for row in rows if row["trial_id"] == model.metrics["trial_id"])
    assert model.metrics["study"] == "small"
    # The bundle's metrics are measured again, on the saved weights.
    assert model.metrics["val_accuracy"] == float(row["val_accuracy"])
    assert model.metrics["cam_ssim"] == pytest.approx(float(row["cam_ssim"]), abs=1e-6)
    assert model.config.learning_rate == float(row["learning_rate"])
    assert model.metrics["epochs"] == int(row["epoch"])


def test_a_study_ends_with_its_report(study: Finished) -> None:
    report = (study.folder / "report.html").read_text()
    assert "3 trials of up to 2 epochs on digits" in report
    assert f"Report: {study.folder / 'report.html'}" in study.stdout


def test_best_by_accuracy_is_the_most_accurate(study: Finished, rows: list[dict[str, str]]) -> None:
    best = json.loads((study.folder / "best" / "accuracy" / "metrics.json").read_text())
    assert best["val_accuracy"] == max(float(row["val_accuracy"]) for row in rows)


def test_each_trial_is_a_run_of_the_group(
    study: Finished,
    rows: list[dict[str, str]],
    recorded: Callable[[Path], list[Recorded]],
) -> None:
    runs = {record.run["run_id"]: record for record in recorded(study.folder)}
    # Two actors ran three trials: a run that was left open would contain the next trial too.
    assert runs.keys() == {row["trial_id"] for row in rows}
    for row in rows:
        record = runs[row["trial_id"]]
        assert record.run["run_group"] == "small"
        assert record.summary["project"] == "batchcam"
        assert record.summary["state"] == "finished"
        assert record.summary["config"]["learning_rate"] == float(row["learning_rate"])
        assert [item["epoch"] for item in record.history] == list(range(1, int(row["epoch"]) + 1))
        assert record.summary["summary"]["val_accuracy"] == float(row["val_accuracy"])
        assert record.summary["summary"]["cams"]["_type"] == "image-file"


def test_journal_holds_the_study(study: Finished) -> None:
    backend = optuna.storages.journal.JournalFileBackend(str(study.folder / JOURNAL))
    loaded = optuna.load_study(study_name="small", storage=optuna.storages.JournalStorage(backend))
    assert loaded.directions == [optuna.study.StudyDirection.MAXIMIZE] * 2
    assert len(loaded.trials) == 3
    assert all(trial.state.is_finished() for trial in loaded.trials)


def test_page_tells_how_it_was_made_and_how_to_reuse_it(study: Finished) -> None:
    page = (study.folder / "README.md").read_text()
    assert f"bcpl_sweep.py {' '.join(STUDY)}\n" in page
    assert "batchcam verify results/small/best/knee" in page
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (study.folder / link).exists(), link


def test_output_ends_with_the_best_bundle(study: Finished, rows: list[dict[str, str]]) -> None:
    assert study.stdout.rstrip().endswith(f"Best bundle: {study.folder / 'best' / 'knee'}")
    assert "Best of 3 trials" in study.stdout
    for row in rows:
        assert study.stdout.count(row["trial_id"]) == 1  # When it ends; the table has numbers.


def test_w_and_b_went_offline_and_said_why(study: Finished) -> None:
    line = study.stdout.splitlines()[0]
    assert re.search(r"W&B offline \(http://127.0.0.1:\d+ cannot be reached: .*refused\)", line)


def test_no_secret_is_written(study: Finished) -> None:
    assert API_KEY not in study.stdout + study.stderr
    for path in snapshot(study.folder):
        assert API_KEY.encode() not in path.read_bytes(), path


def test_second_study_of_a_name_is_refused_and_the_first_left_alone(
    study: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.folder.parents[1])
    before = snapshot(study.folder)
    with pytest.raises(SystemExit) as ended:
        main(STUDY)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: study 'small' exists in ")
    assert "--resume" in message
    assert snapshot(study.folder) == before


@pytest.mark.faults
def test_resuming_a_finished_study_exports_again_without_training(
    study: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the driver evaluates, which may lack the GPU that this needs")

    monkeypatch.setattr("batchcam.training.evaluate.Evaluator.evaluate", fail)
    # Works on a copy under the same name, because other tests read the original.
    folder = tmp_path / "results" / "small"
    shutil.copytree(study.folder, folder, symlinks=True)
    table = (folder / "trials.csv").read_bytes()
    ledger = (folder / LEDGER).read_bytes()
    runs = sorted(folder.glob("wandb/offline-run-*"))
    for gone in ("trials.csv", "pareto.json", "README.md"):
        (folder / gone).unlink()
    shutil.rmtree(folder / "best")

    monkeypatch.chdir(tmp_path)
    main(["--study", "small", "--resume"])
    assert (folder / "trials.csv").read_bytes() == table
    assert (folder / LEDGER).read_bytes() == ledger
    assert sorted(folder.glob("wandb/offline-run-*")) == runs
    assert (folder / "README.md").is_file()
    assert batchcam.load(folder / "best" / "knee").metrics["study"] == "small"


def test_resuming_a_study_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--study", "nowhere", "--resume"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "holds no study to resume" in message
    assert "check --study, --out and --storage" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by_environment", [False, True])
def test_cluster_that_does_not_answer_is_refused(
    free_port: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_environment: bool,
) -> None:
    address = f"127.0.0.1:{free_port()}"
    if by_environment:
        monkeypatch.setenv("RAY_ADDRESS", address)
    settings = StudySettings(study="s", out=tmp_path, address=None if by_environment else address)
    with pytest.raises(ConfigError, match=rf"no Ray cluster answers at '{address}'.*ray start"):
        run_study(settings)
    assert not ray.is_initialized()


@pytest.mark.faults
def test_local_study_does_not_join_a_cluster_that_is_there(
    environment: dict[str, str], free_port: Callable[[], int], tmp_path: Path
) -> None:
    command = ["ray", "start", "--head", "--block", "--num-cpus", "0"]
    command += ["--include-dashboard=False", "--port", str(free_port())]
    log = tmp_path / "ray.log"
    # Both studies request too much; the error names what their cluster has.
    alone = StudySettings(study="s", out=tmp_path, cpus_per_trial=100_000)
    with log.open("w") as file:
        head = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            while "runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                time.sleep(0.2)
            with pytest.raises(ConfigError, match=f"largest node has {os.cpu_count()} CPUs"):
                run_study(alone)
            with pytest.raises(ConfigError, match="largest node has 0 CPUs"):
                run_study(replace(alone, address="auto"))
        finally:
            head.terminate()
            head.wait(timeout=60)


@pytest.mark.faults
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_gpus_that_cannot_be_used_stop_a_study_at_once_and_cpus_finish_it(
    environment: dict[str, str],
    free_port: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    port = free_port()
    command = ["ray", "start", "--head", "--block", "--num-cpus", "2", "--num-gpus", "2"]
    command += ["--include-dashboard=False", "--port", str(port)]
    settings = StudySettings(
        study="s",
        out=tmp_path,
        address=f"127.0.0.1:{port}",
        num_trials=3,
        max_epochs=1,
        space=SearchSpace(resolutions=(14,)),
    )
    message = r"^Ray gave GPU [01] of node .*torch.version.cuda=.* wheel.* --gpus-per-trial 0\."
    log = tmp_path / "ray.log"
    with log.open("w") as file:
        head = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            while "runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                time.sleep(0.2)
            with pytest.raises(ConfigError, match=message):
                run_study(settings)  # The probe finds it.
            assert not settings.folder.exists()
            with pytest.raises(ConfigError, match=message + " Then resume"):
                run_study(replace(settings, gpus_per_trial=1.0))  # The first trial finds it.
            trials = Ledger(settings.folder / LEDGER).trials
            assert all(trial.state is None and not trial.reports for trial in trials)
            run_study(replace(settings, gpus_per_trial=0.0, resume=True))
        finally:
            head.terminate()
            head.wait(timeout=60)
    assert [t.state for t in Ledger(settings.folder / LEDGER).trials] == ["completed"] * 3
    bundle = batchcam.load(settings.folder / "best" / "knee")
    assert (bundle.config.device, bundle.metrics["device"]) == ("auto", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("gpus", [None, 0.0])
def test_fp16_without_gpus_is_refused_before_any_trial(tmp_path: Path, gpus: float | None) -> None:
    settings = StudySettings(
        study="s", out=tmp_path, precision="fp16", cpus_per_trial=1, gpus_per_trial=gpus
    )
    with pytest.raises(ConfigError, match=r"precision='fp16' needs CUDA, not cpu"):
        run_study(settings)
    assert list(tmp_path.iterdir()) == []


def test_folder_under_a_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    with pytest.raises(BundleError, match=r"results is a file; choose another folder"):
        run_study(StudySettings(study="s", out=tmp_path / "results"))
    assert (tmp_path / "results").read_text() == "mine"


def test_folder_that_cannot_be_written_is_refused_before_anything_starts() -> None:
    # Not even root can create a folder there.
    with pytest.raises(BundleError, match=r"/proc/nowhere/s cannot be written"):
        run_study(StudySettings(study="s", out=Path("/proc/nowhere")))


def test_data_set_without_its_files_is_refused_before_anything_starts(tmp_path: Path) -> None:
    settings = StudySettings(
        study="s", out=tmp_path, dataset="imagefolder", data_root=str(tmp_path / "gone")
    )
    with pytest.raises(DataError, match="gone"):
        run_study(settings)
    assert list(tmp_path.iterdir()) == []


def test_backbone_without_pretrained_weights_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    with pytest.raises(BackboneError, match="simple_cnn has no pretrained weights"):
        run_study(StudySettings(study="s", out=tmp_path, pretrained=True))
    assert list(tmp_path.iterdir()) == []


def test_trials_still_to_run_are_counted_on_another_machine_too(tmp_path: Path) -> None:
    settings = StudySettings(
        study="s", out=tmp_path / "here", num_trials=5, storage=str(tmp_path / "storage")
    )
    assert _trials_left(settings) == 5
    settings.folder.mkdir(parents=True)
    ledger = Ledger(settings.folder / LEDGER)
    for number in range(2):
        ledger.propose({"number": number})
    ledger.end(0, "completed")
    ledger.end(1, "failed", "RuntimeError: broken")
    # A trial that failed is tried again.
    assert _trials_left(settings) == 4

    replica = settings.replica_of(settings.folder / paths.MEMORY)
    assert replica
    Replica(settings.folder, replica).flush()
    elsewhere = replace(settings, out=tmp_path / "there", resume=True)
    elsewhere.folder.mkdir(parents=True)
    assert _trials_left(elsewhere) == 4
    assert _trials_left(replace(elsewhere, num_trials=1)) == 1


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> StudySettings:
    """Return the settings of a study of one objective that ran in this process, without W&B."""
    settings = StudySettings(
        study="here",
        out=tmp_path_factory.mktemp("in-process"),
        num_trials=2,
        max_epochs=1,
        objectives=("images_per_second",),
        space=SearchSpace(resolutions=(14,)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        assert run_study(settings) == settings.folder
    return settings


@pytest.mark.faults
def test_study_of_one_objective_has_one_best(in_process: StudySettings) -> None:
    front = json.loads((in_process.folder / "pareto.json").read_text())
    assert front["objectives"] == {"images_per_second": "maximise"}
    assert len(front["trials"]) == 1
    # Only the objective chooses the bundles.
    best = in_process.folder / "best"
    assert {path.name for path in best.iterdir()} == {"speed", "knee", "baseline"}
    chosen = {batchcam.load(best / name).metrics["trial_id"] for name in ("speed", "knee")}
    assert chosen == {front["trials"][0]["trial_id"]}


@pytest.mark.faults
def test_disabled_w_and_b_leaves_nothing(in_process: StudySettings) -> None:
    assert not (in_process.folder / "wandb").exists()


@pytest.mark.faults
def test_study_is_extended_and_its_best_confirmed(
    in_process: StudySettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_csv: Callable[[Path], list[dict[str, str]]],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    shutil.copytree(in_process.folder, tmp_path / "here")
    before = read_csv(tmp_path / "here" / "trials.csv")
    words = ["--study", "here", "--out", str(tmp_path)]
    main([*words, "--extend", "1", "--confirm", "1", "--seeds", "2"])

    rows = read_csv(tmp_path / "here" / "trials.csv")
    assert rows[:2] == before
    assert [row["state"] for row in rows] == ["completed"] * 3
    metrics = batchcam.load(tmp_path / "here" / "best" / "knee").metrics
    confirmed = metrics["confirmed"]
    assert confirmed["seeds"] == [1000, 1001]
    assert confirmed["candidate"] in {row["trial_id"] for row in rows}
    speed = confirmed["images_per_second"]
    assert speed["low"] < speed["mean"] < speed["high"]
    assert metrics["seed"] == 1000
    page = (tmp_path / "here" / "README.md").read_text()
    assert "seeds 1000, 1001" in page
    assert " ± " in page

    # Resuming finds the confirmation complete: nothing is trained.
    ledgers = {path: path.read_bytes() for path in (tmp_path / "here").rglob("ledger.jsonl")}
    assert len(ledgers) == 2
    main([*words, "--resume"])
    assert {path: path.read_bytes() for path in ledgers} == ledgers
    assert json.loads((tmp_path / "here" / "study.json").read_text())["num_trials"] == 3


@pytest.mark.faults
def test_earlier_winners_are_tried_first(
    in_process: StudySettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_csv: Callable[[Path], list[dict[str, str]]],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    winner = tmp_path / "winner"
    shutil.copytree(in_process.folder / "best" / "knee", winner)
    config = TrialConfig.from_yaml(winner / "config.yaml")
    replace(config, learning_rate=0.00123, lambda_proto=0.5, metric="l2").to_yaml(
        winner / "config.yaml"
    )
    words = ["--study", "warm", "--num-trials", "3", "--max-epochs", "1", *SMALL]
    main([*words, "--out", str(tmp_path), "--warm-start", str(winner)])
    rows = read_csv(tmp_path / "warm" / "trials.csv")
    assert [rows[2][name] for name in ("learning_rate", "lambda_proto", "metric")] == [
        "0.00123",
        "0.5",
        "l2",
    ]


def test_winner_that_the_space_does_not_have_is_refused_before_anything_starts(
    study: Finished, tmp_path: Path
) -> None:
    settings = StudySettings(study="s", out=tmp_path, warm_start=(study.folder / "best" / "knee",))
    with pytest.raises(ConfigError, match=r"resolution=14 is not among .* --resolutions"):
        run_study(settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_dry_run_says_what_a_study_takes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--dry-run", "--resolutions", "14", "--num-trials", "4", "--max-epochs", "2"])
    out = capsys.readouterr().out
    assert re.search(r"simple_cnn +14 +own +[\d,]+ +[\d,]+ +\d\.\d GiB +\d+", out)
    assert re.search(r"4 trials: 8 epochs in \d+\.\d (min|h) if none is stopped", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_study_in_which_every_trial_fails_says_why_and_what_to_do(
    tmp_path: Path,
    read_csv: Callable[[Path], list[dict[str, str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = StudySettings(
        study="diverging",
        out=tmp_path,
        num_trials=1,
        max_epochs=1,
        max_failures=0,
        space=SearchSpace(resolutions=(14,), learning_rate=(1e30, 1e30)),
    )
    with pytest.raises(StudyError, match=r"no trial .* succeeded; .*diverged.* --resume") as raised:
        run_study(settings)
    assert str(settings.folder / "trials.csv") in str(raised.value)
    (row,) = read_csv(settings.folder / "trials.csv")
    assert row["state"] == "failed"
    assert "lower learning_rate" in row["error"]
    error_file = f"{ERRORS}/{row['trial_id']}.txt"
    assert f"1/1  {row['trial_id']}  failed; see {error_file}" in capsys.readouterr().out
    assert "DivergedError" in (settings.folder / error_file).read_text()
    assert not (settings.folder / "best").exists()
