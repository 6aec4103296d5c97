import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import batchcam
from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.export.bundle import save_bundle
from batchcam.training.fit import EpochReport
from studies.engine.checkpoints import Checkpoints
from studies.engine.ledger import Ledger, State
from studies.engine.protocol import Objective
from studies.objectives import ACCURACY, SIMILARITY, SPEED
from studies.outcome import export
from studies.outcome.export import BundleFiles, MakeBundles, StudyError, TrialRecord
from studies.trial import METRICS

BOTH = (ACCURACY, SIMILARITY)
LOSS = Objective("loss", "loss", "minimize", ".3f")

Make = Callable[..., TrialRecord]
Reports = list[tuple[EpochReport, str]]
ReadCsv = Callable[[Path], list[dict[str, str]]]


def ids(records: list[TrialRecord]) -> list[str]:
    return [record.trial_id for record in records]


def test_front_is_what_no_other_beats(make_record: Make) -> None:
    records = [
        make_record("beaten", 0.90, 0.50),
        make_record("ssim", 0.80, 0.95),
        make_record("between", 0.95, 0.90),
        make_record("accuracy", 0.99, 0.10),
    ]
    assert ids(export.pareto_front(records, BOTH)) == ["accuracy", "between", "ssim"]


def test_equal_trials_are_on_the_front_together(make_record: Make) -> None:
    records = [make_record("a", 0.9, 0.5), make_record("b", 0.9, 0.5), make_record("c", 0.8, 0.5)]
    assert ids(export.pareto_front(records, BOTH)) == ["a", "b"]


def test_front_of_one_objective_is_its_best(make_record: Make) -> None:
    records = [make_record("a", 0.9, 0.5), make_record("b", 0.8, 0.6)]
    assert ids(export.pareto_front(records, (SIMILARITY,))) == ["b"]


def test_trial_without_metrics_is_not_on_the_front(make_record: Make) -> None:
    records = [
        make_record("no-metrics", 1.0, 1.0, metrics={}),
        make_record("a", 0.9, 0.5),
    ]
    assert ids(export.pareto_front(records, BOTH)) == ["a"]
    assert export.pareto_front(records[:1], BOTH) == []


def chosen_ids(records: list[TrialRecord]) -> dict[str, str]:
    chosen = export.choose(records, export.pareto_front(records, BOTH), BOTH)
    return {name: record.trial_id for name, record in chosen.items()}


def test_knee_is_the_compromise(make_record: Make) -> None:
    records = [
        make_record("baseline", 0.99, 0.10),
        make_record("compromise", 0.985, 0.90),
        make_record("explained", 0.90, 0.95),
        make_record("poor", 0.85, 0.20),
    ]
    assert chosen_ids(records) == {
        "accuracy": "baseline",
        "ssim": "explained",
        "knee": "compromise",
    }


def test_knee_of_a_front_of_two_gives_up_the_least(make_record: Make) -> None:
    # 0.2 points of accuracy are a small loss for most of the SSIM.
    records = [
        make_record("baseline", 0.992, 0.10),
        make_record("bcpl", 0.990, 0.90),
        make_record("half", 0.980, 0.50),
        make_record("poor", 0.950, 0.05),
    ]
    assert chosen_ids(records)["knee"] == "bcpl"


def test_baseline_is_the_most_accurate_without_explanation(make_record: Make) -> None:
    plain = TrialConfig(lambda_batch=0.0)
    records = [
        make_record("poor", 0.90, 0.10, config=plain),
        make_record("plain", 0.95, 0.05, config=plain),
        make_record("cut", 0.99, 0.05, config=plain, metrics={}),
        make_record("explained", 0.97, 0.90),
        make_record("energy", 0.96, 0.10, config=replace(plain, lambda_energy=1.0)),
    ]
    assert chosen_ids(records)["baseline"] == "plain"
    assert "baseline" not in chosen_ids(records[3:])


def test_one_trial_is_the_best_of_everything(make_record: Make) -> None:
    assert set(chosen_ids([make_record("only", 0.5, 0.5)]).values()) == {"only"}


def test_ties_are_broken_by_the_other_metric(make_record: Make) -> None:
    records = [make_record("a", 0.9, 0.5), make_record("b", 0.9, 0.6), make_record("c", 0.8, 0.6)]
    front = [records[0], records[1], records[2]]
    chosen = export.choose(records, front, BOTH)
    assert chosen["accuracy"].trial_id == "b"
    assert chosen["ssim"].trial_id == "b"


@pytest.fixture
def rivals(make_record: Make) -> list[TrialRecord]:
    """Return three records, none best in everything; one that diverged; one without a loss."""
    losses = {"low": 0.1, "middle": 0.2, "high": 0.9, "diverged": math.nan}
    accuracies = {"low": 0.5, "middle": 0.8, "high": 0.9, "diverged": 0.99, "lacking": 0.99}
    plain = TrialConfig(lambda_batch=0.0)
    return [
        make_record(
            name,
            accuracy,
            0.5,
            config=plain if name in ("high", "middle", "lacking") else None,
            metrics={"epoch": 5, "val_accuracy": accuracy}
            | ({"loss": losses[name]} if name in losses else {}),
        )
        for name, accuracy in accuracies.items()
    ]


def test_front_and_bundles_follow_the_directions(rivals: list[TrialRecord]) -> None:
    front = export.pareto_front(rivals, (LOSS, ACCURACY))
    assert ids(front) == ["low", "middle", "high"]
    chosen = export.choose(rivals, front, (LOSS, ACCURACY))
    assert {name: record.trial_id for name, record in chosen.items()} == {
        "loss": "low",
        "accuracy": "high",
        "knee": "middle",
        "baseline": "middle",
    }


def test_minimised_objective_alone_has_one_best(rivals: list[TrialRecord]) -> None:
    front = export.pareto_front(rivals, (LOSS,))
    assert ids(front) == ["low"]
    chosen = export.choose(rivals, front, (LOSS,))
    assert {name: record.trial_id for name, record in chosen.items()} == {
        "loss": "low",
        "knee": "low",
        "baseline": "middle",
    }


def test_speed_alone_is_not_judged_by_accuracy(make_record: Make) -> None:
    fast, accurate = make_record("fast", 0.5, 0.1), make_record("accurate", 0.9, 0.9)
    fast.metrics["images_per_second"] = 2000.0
    front = export.pareto_front([accurate, fast], (SPEED,))
    chosen = export.choose([accurate, fast], front, (SPEED,))
    assert {name: record.trial_id for name, record in chosen.items()} == {
        "speed": "fast",
        "knee": "fast",
    }


def test_directions_are_in_the_front_and_other_metrics_in_the_table(
    rivals: list[TrialRecord], read_csv: ReadCsv, tmp_path: Path
) -> None:
    export.write_pareto(tmp_path / "pareto.json", rivals[:1], (LOSS, ACCURACY))
    content = json.loads((tmp_path / "pareto.json").read_text())
    assert content["objectives"] == {"loss": "minimise", "val_accuracy": "maximise"}
    rivals[0].metrics["f1"] = 0.25
    export.write_trials(tmp_path / "trials.csv", rivals)
    rows = read_csv(tmp_path / "trials.csv")
    assert [row["f1"] for row in rows] == ["0.25", "", "", "", ""]
    assert list(rows[0])[-2:] == ["f1", "error"]


def test_table_has_every_field_and_every_metric(
    make_record: Make, read_csv: ReadCsv, tmp_path: Path
) -> None:
    config = TrialConfig(metric="ssim", lambda_proto=0.25)
    good = make_record("good", 0.9, 0.5, config=config)
    bad = make_record("bad", 0, 0, state="failed", metrics={}, error='it, "said", no')
    export.write_trials(tmp_path / "trials.csv", [good, bad])
    first, second = read_csv(tmp_path / "trials.csv")
    names = [field.name for field in fields(TrialConfig)]
    assert list(first) == ["trial_id", "state", *names, *METRICS, "error"]
    assert (first["trial_id"], first["state"], first["error"]) == ("good", "completed", "")
    assert (first["metric"], first["lambda_proto"]) == ("ssim", "0.25")
    assert (first["val_accuracy"], first["loss"]) == ("0.9", "")
    assert (second["state"], second["error"]) == ("failed", 'it, "said", no')
    assert second["val_accuracy"] == ""


def test_front_is_written_as_json_that_makes_the_configurations_again(
    make_record: Make, tmp_path: Path
) -> None:
    record = make_record("a", 0.9, 0.5, config=TrialConfig(lambda_proto=0.5))
    export.write_pareto(tmp_path / "pareto.json", [record], BOTH)
    content = json.loads((tmp_path / "pareto.json").read_text())
    assert content["objectives"] == {"val_accuracy": "maximise", "cam_ssim": "maximise"}
    (trial,) = content["trials"]
    assert (trial["trial_id"], trial["state"]) == ("a", "completed")
    assert trial["metrics"] == record.metrics
    assert TrialConfig.from_dict(trial["config"]) == record.config


@pytest.fixture
def trained(config: TrialConfig, reports: Reports, make_record: Make) -> list[TrialRecord]:
    """Return two records of a real trial: after its last epoch, and stopped after its first."""
    first, *_, last = reports
    return [
        make_record(name, 0, 0, config=config, metrics=dict(report.metrics), checkpoints=folder)
        for name, (report, folder) in (("whole", last), ("stopped", first))
    ]


@pytest.fixture
def make(prepared: PreparedData) -> MakeBundles:
    """Return a function that makes bundles in this process."""

    def here(records: Sequence[TrialRecord]) -> Iterator[tuple[TrialRecord, BundleFiles]]:
        for record in records:
            yield record, export.make_bundle(record, prepared, "the-study", "the command", "cpu")

    return here


def test_bundle_is_the_trial_as_it_ended(
    trained: list[TrialRecord], make: MakeBundles, tmp_path: Path
) -> None:
    whole, stopped = trained
    chosen = {"accuracy": whole, "ssim": stopped}
    written = export.export_bundles(tmp_path / "best", chosen, make)
    for name, record in chosen.items():
        loaded = batchcam.load(tmp_path / "best" / name)
        assert loaded.metrics == written[name]
        assert loaded.config == record.config
        assert loaded.metrics["study"] == "the-study"
        assert loaded.metrics["command"] == "the command"
        assert loaded.metrics["trial_id"] == record.trial_id
        assert loaded.metrics["epochs"] == record.metrics["epoch"]
        assert loaded.metrics["val_accuracy"] == record.metrics["val_accuracy"]
        assert loaded.metrics["cam_ssim"] == record.metrics["cam_ssim"]
        assert 0 <= loaded.metrics["test_accuracy"] <= 1


def test_test_split_is_read_once_for_each_trial(
    trained: list[TrialRecord],
    make: MakeBundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = []

    def counted(*words: Any, **options: Any) -> dict[str, Any]:
        metrics = save_bundle(*words, **options)
        saved.append(metrics["trial_id"])
        return metrics

    monkeypatch.setattr(export, "save_bundle", counted)
    whole, stopped = trained
    chosen = {"accuracy": whole, "ssim": stopped, "knee": whole}
    written = export.export_bundles(tmp_path / "best", chosen, make)
    assert saved == ["whole", "stopped"]
    assert written["knee"] == written["accuracy"]
    for name in chosen:
        assert batchcam.load(tmp_path / "best" / name).metrics == written[name]


def test_device_of_the_evaluation_is_not_in_the_bundle(
    trained: list[TrialRecord], make: MakeBundles, tmp_path: Path
) -> None:
    anywhere = replace(trained[0], config=replace(trained[0].config, device="auto"))
    export.export_bundles(tmp_path / "best", {"knee": anywhere}, make)
    assert "device: auto\n" in (tmp_path / "best" / "knee" / "config.yaml").read_text()


def test_bundles_of_an_earlier_export_are_replaced(
    trained: list[TrialRecord], make: MakeBundles, tmp_path: Path
) -> None:
    for left in ("best", ".best.partial"):  # A driver was killed during its export.
        (tmp_path / left / "old").mkdir(parents=True)
    export.export_bundles(tmp_path / "best", {"knee": trained[0]}, make)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["knee"]


def test_trial_whose_states_are_gone_is_named_and_earlier_bundles_stay(
    trained: list[TrialRecord], make: MakeBundles, tmp_path: Path
) -> None:
    (tmp_path / "best" / "old").mkdir(parents=True)
    lost = replace(trained[1], checkpoints=str(tmp_path / "gone"))
    with pytest.raises(StudyError, match=r"stopped has no whole checkpoint left in .*gone; delete"):
        export.export_bundles(tmp_path / "best", {"accuracy": trained[0], "knee": lost}, make)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["old"]


def test_bundle_is_made_of_the_state_before_one_that_is_damaged(
    trained: list[TrialRecord], reports: Reports, make: MakeBundles, tmp_path: Path
) -> None:
    kept = Checkpoints(str(tmp_path / "trial"))
    for report, folder in reports[-2:]:
        with Checkpoints(folder).newest() as state:
            assert state is not None
            kept.save(report.epoch, partial(shutil.copyfile, state))
    newest = max((tmp_path / "trial").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    damaged = replace(trained[0], checkpoints=kept.folder)
    written = export.export_bundles(tmp_path / "best", {"knee": damaged}, make)
    assert written["knee"]["epochs"] == reports[-2][0].epoch


def test_records_tell_how_trials_ended(config: TrialConfig, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    last = {"epoch": 1, "val_accuracy": 0.5}
    states: list[State | None] = ["completed", "stopped", "failed", "failed", None]
    for number in (2, 0, 1, 4, 3):
        ledger.propose({"number": number, "trial_id": f"k_{number:05d}", "lambda_batch": 0.5})
        if number != 3:
            ledger.report(number, last)
    for number, state in enumerate(states):
        if state is not None:
            ledger.end(number, state, "the reason" if state == "failed" else None)
    records = export.collect(ledger, config, "s3://bucket/s/checkpoints")
    assert ids(records) == [f"k_{number:05d}" for number in range(5)]
    assert [record.state for record in records] == [*states[:4], "unfinished"]
    assert all(record.config.lambda_batch == 0.5 for record in records)
    assert records[0].metrics == last
    assert records[0].checkpoints == "s3://bucket/s/checkpoints/k_00000"
    assert [record.error for record in records] == [None, None, "the reason", "the reason", None]
    # A trial that failed after an epoch can be exported.
    assert [record.usable for record in records] == [True, True, True, False, True]
