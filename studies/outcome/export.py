"""The export of a study: the table of trials, the Pareto front, and the best trials as bundles.

Selection reads the reported objectives only, which are of the validation split. The test split is
read once for each exported trial, after the choice. `export_tasks.py` makes the bundles where
trials run.
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.errors import BatchCamError
from batchcam.export.bundle import read_metrics, save_bundle
from batchcam.export.model_card import loss_terms
from batchcam.training.fit import restore
from studies.engine.checkpoints import Checkpoints
from studies.engine.ledger import Ledger
from studies.engine.protocol import TRIAL_ID, Objective, gains, has_objectives
from studies.engine.retry import retry_in_trial
from studies.objectives import OBJECTIVES
from studies.trial import METRICS, trial_config

KNEE = "knee"
"""Bundle of the best compromise between the objectives; there is always one."""
BASELINE = "baseline"
"""Bundle of the best trial without explanation; absent where there is no such trial."""
BUNDLES = (*(each.short for each in OBJECTIVES.values()), KNEE, BASELINE)
"""Names of bundles in their order: the best by each objective, the knee, and the baseline."""


class StudyError(BatchCamError):
    """A study has nothing to export."""


@dataclass(frozen=True)
class TrialRecord:
    """The state of a trial at the end of a study.

    Attributes:
        trial_id: the trial's id, which also names its checkpoints and its W&B run.
        state: "completed", "stopped" (early, by the scheduler), "failed" or "unfinished".
        config: the trial's configuration.
        metrics: the metrics of its last report; empty if it reported nothing.
        checkpoints: the folder or URI of its saved states.
        error: the last line of the error of a failed trial.
        facts: further entries of the metrics.json of its bundle.
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
        """Whether the trial reported an epoch, and so has a checkpoint."""
        return bool(self.metrics)


def collect(ledger: Ledger, base: TrialConfig, checkpoints: str) -> list[TrialRecord]:
    """Return a record for each trial, in the order of the proposals.

    `checkpoints` is the folder or URI that holds the folder of each trial.
    """
    return [
        TrialRecord(
            trial_id=trial.params[TRIAL_ID],
            state=trial.state or "unfinished",
            config=trial_config(base, trial.params),
            metrics=trial.reports[-1] if trial.reports else {},
            checkpoints=f"{checkpoints}/{trial.params[TRIAL_ID]}",
            error=trial.error,
        )
        for trial in ledger.trials
    ]


def pareto_front(
    records: Sequence[TrialRecord], objectives: Sequence[Objective]
) -> list[TrialRecord]:
    """Return the non-dominated records, the best in the first objective first.

    Records that lack an objective, or have one that is not finite, are left out.
    """
    judged = [record for record in records if has_objectives(record.metrics, objectives)]
    if not judged:
        return []
    points = _gains(judged, objectives)
    kept = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    front = [record for record, keep in zip(judged, kept, strict=True) if keep]
    first = objectives[0]
    return sorted(front, key=lambda record: -first.gain(record.metrics[first.name]))


def choose(
    records: Sequence[TrialRecord],
    front: Sequence[TrialRecord],
    objectives: Sequence[Objective],
) -> dict[str, TrialRecord]:
    """Return the records to export by the names of their bundles.

    These are the best by each objective, under its short name; the knee between the objectives; and
    the baseline. Of records with the same best value, the best in the other objectives is taken, in
    the order of the objectives.

    The knee is the record of the front nearest to the ideal point, which has the best value of each
    objective. Distances are Euclidean, each objective in units of the distance between the median
    of all records and the best: a small front does not determine the scales, and outliers do not
    stretch them. With a single objective the knee is the best record, so that `best/knee` is the
    bundle to use in every study.

    The baseline is the best, in the first objective, of the records whose loss is cross-entropy
    alone, if there is one.
    """

    def order(record: TrialRecord, objective: Objective) -> tuple[float, ...]:
        others = [each for each in objectives if each != objective]
        return tuple(each.gain(record.metrics[each.name]) for each in (objective, *others))

    judged = [record for record in records if has_objectives(record.metrics, objectives)]
    chosen = {each.short: max(front, key=partial(order, objective=each)) for each in objectives}
    points = _gains(front, objectives)
    ideal = points.max(axis=0)
    everyone = _gains(judged, objectives)
    unit = ideal - np.median(everyone, axis=0)
    distance = (ideal - points) / np.where(unit > 0, unit, np.ptp(everyone, axis=0) + 1e-12)
    chosen[KNEE] = front[int(np.linalg.norm(distance, axis=1).argmin())]
    plain = [record for record in judged if not loss_terms(record.config)]
    if plain:
        first = objectives[0]
        chosen[BASELINE] = max(plain, key=lambda record: first.gain(record.metrics[first.name]))
    return chosen


def _gains(
    records: Sequence[TrialRecord], objectives: Sequence[Objective]
) -> npt.NDArray[np.float64]:
    return gains([record.metrics for record in records], objectives)


def write_trials(path: Path, records: Sequence[TrialRecord]) -> None:
    """Write a row per trial: id, state, every configuration field, the last value of each metric.

    The columns of `METRICS` are always there; other metrics that a trial reported follow them.
    """
    names = [field.name for field in fields(TrialConfig)]
    reported = dict.fromkeys([*METRICS, *(name for record in records for name in record.metrics)])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["trial_id", "state", *names, *reported, "error"])
        writer.writeheader()
        for record in records:
            row = record.config.as_dict() | record.metrics
            row |= {"trial_id": record.trial_id, "state": record.state, "error": record.error}
            writer.writerow(row)


_DIRECTIONS = {"maximize": "maximise", "minimize": "minimise"}
"""Directions as pareto.json spells them."""


def write_pareto(path: Path, front: Sequence[TrialRecord], objectives: Sequence[Objective]) -> None:
    """Write the Pareto front as JSON: directions, and configuration and metrics of each trial."""
    content = {
        "objectives": {each.name: _DIRECTIONS[each.direction] for each in objectives},
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
    """Return the configuration and the metrics of each exported bundle, by its name.

    Raises:
        ConfigError: a config.yaml cannot be used.
        BundleError: a metrics.json is damaged.
        FormatError: a newer version wrote the bundle.
        OSError: a file is missing.
    """
    return {
        name: (
            TrialConfig.from_yaml(folder / name / "config.yaml"),
            read_metrics(folder / name),
        )
        for name in BUNDLES
        if (folder / name).is_dir()
    }


BundleFiles = dict[str, bytes]
"""The files of a bundle by their names."""

MakeBundles = Callable[[Sequence[TrialRecord]], Iterable[tuple[TrialRecord, BundleFiles]]]
"""Makes the bundle of each record, in any order; the records are different trials."""


def make_bundle(
    record: TrialRecord, prepared: PreparedData, study: str, command: str, device: str
) -> BundleFiles:
    """Restore a trial from its checkpoint, evaluate the test split once, and return its bundle.

    Args:
        record: the trial.
        prepared: the data of the study.
        study: name of the study.
        command: the command that made the study.
        device: where the trial is evaluated; config.yaml keeps the device of `record.config`.

    Raises:
        StudyError: the trial has no undamaged checkpoint.
        OSError: the checkpoints cannot be read for longer than the engine retries.
    """
    checkpoints = Checkpoints(record.checkpoints)
    with ExitStack() as stack:
        state = retry_in_trial(
            lambda: stack.enter_context(checkpoints.newest()), record.checkpoints
        )
        if state is None:
            raise StudyError(
                f"trial {record.trial_id} has no whole checkpoint left in "
                f"{record.checkpoints}; delete its folder and its lines in the ledger, "
                "and --resume."
            )
        result = restore(replace(record.config, device=device), state, prepared=prepared)
    result = replace(result, config=record.config)
    facts = {"study": study, "trial_id": record.trial_id, **record.facts}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        save_bundle(folder, result, command=command, extra_metrics=facts)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def export_bundles(
    folder: Path, chosen: Mapping[str, TrialRecord], make: MakeBundles
) -> dict[str, dict[str, Any]]:
    """Write the bundle `folder/<name>` of each chosen trial; return each metrics.json.

    The folder is replaced when all bundles are whole; until then an earlier one stays as it is. The
    bundle of a trial that was chosen under several names is made once.

    Raises:
        Exception: whatever `make` raises.
    """
    records = {record.trial_id: record for record in chosen.values()}
    metrics: dict[str, dict[str, Any]] = {}
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for record, files in make(list(records.values())):
            metrics[record.trial_id] = json.loads(files["metrics.json"])
            for name, each in chosen.items():
                if each.trial_id == record.trial_id:
                    (staging / name).mkdir()
                    for file, content in files.items():
                        (staging / name / file).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return {name: metrics[record.trial_id] for name, record in chosen.items()}
