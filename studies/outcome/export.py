"""From trials to what is kept: a table of all, the Pareto front, and the best as bundles.

Selection reads validation metrics only. The test split is read once for each exported bundle, after
the choice.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.errors import BatchCamError
from batchcam.export.bundle import save_bundle
from batchcam.export.model_card import loss_terms
from batchcam.training.fit import restore
from studies.engine.checkpoints import Checkpoints
from studies.engine.ledger import Ledger
from studies.trial import METRICS, trial_config

BUNDLES = ("accuracy", "ssim", "knee", "baseline")
"""What is exported: the best by accuracy, by SSIM, between them, and without explanation."""


class StudyError(BatchCamError):
    """A study has nothing to export."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial as it ended.

    Attributes:
        trial_id: names its checkpoints and its W&B run too.
        state: "completed", "stopped" (early, by the scheduler), "failed" or "unfinished".
        config: its configuration.
        metrics: the last of each of `METRICS` that it reported.
        checkpoints: where its saved states are.
        error: the last line of what made it fail.
        facts: what the metrics.json of its bundle is to say besides.
    """

    trial_id: str
    state: str
    config: TrialConfig
    metrics: dict[str, float]
    checkpoints: str
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether it can be chosen: it has metrics, and with them a checkpoint."""
        return "val_accuracy" in self.metrics


def collect(ledger: Ledger, base: TrialConfig, checkpoints: str) -> list[TrialRecord]:
    """Return a record per trial, in the order in which they were proposed.

    `checkpoints` is the folder or URI in which each trial has one of its own.
    """
    return [
        TrialRecord(
            trial_id=trial.params["trial_id"],
            state=trial.state or "unfinished",
            config=trial_config(base, trial.params),
            metrics=trial.reports[-1] if trial.reports else {},
            checkpoints=f"{checkpoints}/{trial.params['trial_id']}",
            error=trial.error,
        )
        for trial in ledger.trials
    ]


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
    """Return the best by accuracy, by SSIM, the knee between the objectives, and the baseline.

    The knee is the point of the front nearest to the ideal one, which has the best value of each
    objective. Distances are Euclidean, each objective in units of what separates the median trial
    from the best: a small front says nothing of the scales, and outliers do not stretch them.

    The baseline is the most accurate of the records whose loss is cross-entropy alone, if there is
    one: what the others are to be compared with.
    """

    def best(name: str, then: str) -> TrialRecord:
        return max(front, key=lambda record: (record.metrics[name], record.metrics[then]))

    values = _values(front, objectives)
    ideal = values.max(axis=0)
    everyone = _values([record for record in records if record.usable], objectives)
    unit = ideal - np.median(everyone, axis=0)
    distance = (ideal - values) / np.where(unit > 0, unit, np.ptp(everyone, axis=0) + 1e-12)
    knee = front[int(np.linalg.norm(distance, axis=1).argmin())]
    chosen = {
        "accuracy": best("val_accuracy", "cam_ssim"),
        "ssim": best("cam_ssim", "val_accuracy"),
        "knee": knee,
    }
    plain = [record for record in records if record.usable and not loss_terms(record.config)]
    if plain:
        chosen["baseline"] = max(plain, key=lambda record: record.metrics["val_accuracy"])
    return chosen


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


def read_bundles(folder: Path) -> dict[str, tuple[TrialConfig, dict[str, Any]]]:
    """Return configuration and metrics of each exported bundle, by its name.

    Raises:
        ConfigError: a config.yaml cannot be used.
        OSError: a file is missing.
        ValueError: a metrics.json is not JSON.
    """
    return {
        name: (
            TrialConfig.from_yaml(folder / name / "config.yaml"),
            json.loads((folder / name / "metrics.json").read_text(encoding="utf-8")),
        )
        for name in BUNDLES
        if (folder / name).is_dir()
    }


def export_bundles(
    folder: Path, chosen: dict[str, TrialRecord], prepared: PreparedData, study: str
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
            with Checkpoints(record.checkpoints).newest() as state:
                if state is None:
                    raise StudyError(
                        f"trial {record.trial_id} has no whole checkpoint left in "
                        f"{record.checkpoints}; delete its folder and its lines in the ledger, "
                        "and --resume."
                    )
                result = restore(record.config, state, prepared=prepared)
            facts = {"study": study, "trial_id": record.trial_id, **record.facts}
            metrics = save_bundle(target, result, extra_metrics=facts)
        written[record.trial_id] = (target, metrics)
    return {name: written[record.trial_id][1] for name, record in chosen.items()}
