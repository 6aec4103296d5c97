"""From trials to what is kept: a table of all, the Pareto front, and the best as bundles.

Selection reads validation metrics only. The test split is read once for each exported bundle, after
the choice.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from ray import tune

from batchcam.bundle import save_bundle
from batchcam.config import TrialConfig
from batchcam.errors import BatchCamError
from batchcam.train import Inputs, restore
from studies.trial import STATE_FILE, trial_config

METRICS = (
    "epoch",
    "val_accuracy",
    "cam_ssim",
    "cam_ssim_ceiling",
    "cam_ssim_sample",
    "images_per_second",
    "seconds",
    "loss",
    "loss_class",
    "loss_proto",
    "loss_batch",
)
"""The metrics of a trial, as `batchcam.train.EpochReport` names them."""


class StudyError(BatchCamError):
    """A study has nothing to export."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial as it ended.

    Attributes:
        trial_id: Ray's id; also the id of its W&B run.
        state: "completed", "stopped" (early, by the scheduler), "failed" or "unfinished".
        config: its configuration.
        metrics: the last of each of `METRICS` that it reported.
        checkpoint: its last one, if it came as far.
        error: the last line of what made it fail.
    """

    trial_id: str
    state: str
    config: TrialConfig
    metrics: dict[str, float]
    checkpoint: tune.Checkpoint | None
    error: str | None

    @property
    def usable(self) -> bool:
        """Whether it can be chosen: it has metrics, and a checkpoint to export."""
        return self.checkpoint is not None and "val_accuracy" in self.metrics


def collect(results: tune.ResultGrid, base: TrialConfig) -> list[TrialRecord]:
    """Return a record per trial, in the order in which they were proposed."""
    found = [results[index] for index in range(len(results))]
    found.sort(key=lambda result: (result.config or {}).get("number", 0))
    return [_record(result, base) for result in found]


def _record(result: tune.Result, base: TrialConfig) -> TrialRecord:
    config = trial_config(base, result.config or {})
    reported = result.metrics or {}
    metrics = {name: reported[name] for name in METRICS if name in reported}
    if result.error is not None:
        state = "failed"
    elif metrics.get("epoch", 0) >= config.epochs:
        state = "completed"
    else:
        state = "stopped" if reported.get("done") else "unfinished"
    return TrialRecord(
        trial_id=Path(result.path).name,
        state=state,
        config=config,
        metrics=metrics,
        checkpoint=result.checkpoint,
        error=str(result.error).strip().splitlines()[-1] if result.error else None,
    )


def pareto_front(records: Sequence[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """Return the records that no other beats in all objectives, best in the first one first."""
    usable = [record for record in records if record.usable]
    if not usable:
        return []
    kept = moocore.is_nondominated(_values(usable, objectives), maximise=True, keep_weakly=True)
    front = [record for record, keep in zip(usable, kept, strict=True) if keep]
    return sorted(front, key=lambda record: -record.metrics[objectives[0]])


def choose(
    records: Sequence[TrialRecord], front: Sequence[TrialRecord], objectives: Sequence[str]
) -> dict[str, TrialRecord]:
    """Return the best by accuracy, the best by SSIM, and the knee between the objectives.

    The knee is the point of the front nearest to the ideal one, which has the best value of each
    objective. Distances are Euclidean, each objective in units of what separates the median trial
    from the best: a small front says nothing of the scales, and outliers do not stretch them.
    """

    def best(name: str, then: str) -> TrialRecord:
        return max(front, key=lambda record: (record.metrics[name], record.metrics[then]))

    values = _values(front, objectives)
    ideal = values.max(axis=0)
    everyone = _values([record for record in records if record.usable], objectives)
    unit = ideal - np.median(everyone, axis=0)
    distance = (ideal - values) / np.where(unit > 0, unit, np.ptp(everyone, axis=0) + 1e-12)
    knee = front[int(np.linalg.norm(distance, axis=1).argmin())]
    return {
        "accuracy": best("val_accuracy", "cam_ssim"),
        "ssim": best("cam_ssim", "val_accuracy"),
        "knee": knee,
    }


def _values(records: Sequence[TrialRecord], objectives: Sequence[str]) -> Any:
    return np.array([[record.metrics[name] for name in objectives] for record in records])


def write_trials(path: Path, records: Sequence[TrialRecord]) -> None:
    """Write a row per trial: id, state, every configuration field, the last of each metric."""
    names = [field.name for field in fields(TrialConfig)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["trial_id", "state", *names, *METRICS, "error"])
        writer.writeheader()
        for record in records:
            row = record.config.as_dict() | record.metrics
            row |= {"trial_id": record.trial_id, "state": record.state, "error": record.error}
            writer.writerow(row)


def write_pareto(path: Path, front: Sequence[TrialRecord], objectives: Sequence[str]) -> None:
    """Write the Pareto front as JSON: objectives, and a configuration with metrics per trial."""
    content = {
        "objectives": dict.fromkeys(objectives, "maximise"),
        "trials": [
            {
                "trial_id": record.trial_id,
                "state": record.state,
                "metrics": record.metrics,
                "config": record.config.as_dict(),
            }
            for record in front
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_bundles(
    folder: Path, chosen: dict[str, TrialRecord], inputs: Inputs, study: str
) -> dict[str, dict[str, Any]]:
    """Write `folder/<name>` for each chosen trial; return the content of each metrics.json.

    A trial chosen under several names is evaluated on the test split once.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, record in chosen.items():
        target = folder / name
        if record.trial_id in written:
            source, metrics = written[record.trial_id]
            shutil.copytree(source, target)
        else:
            assert record.checkpoint is not None
            with record.checkpoint.as_directory() as checkpoint:
                state = Path(checkpoint) / STATE_FILE
                result = restore(record.config, state, inputs=inputs)
            facts = {"study": study, "trial_id": record.trial_id}
            metrics = save_bundle(target, result, extra_metrics=facts)
        written[record.trial_id] = (target, metrics)
    return {name: written[record.trial_id][1] for name, record in chosen.items()}
