"""The summary of a finished study: a table on the terminal, and README.md beside its results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from batchcam.provenance import command_line, git_commit, package_versions
from studies import paths
from studies.engine.protocol import Objective, has_objectives
from studies.objectives import SIMILARITY
from studies.outcome.confirm import Confirmed
from studies.outcome.export import TrialRecord
from studies.settings import StudySettings
from studies.trial import run_name

_ROWS = 12


@dataclass(frozen=True)
class Outcome:
    """The outcome of a study.

    Attributes:
        objectives: the study's objectives.
        records: all trials.
        front: the trials of the Pareto front.
        confirmed: the trials that were trained again with fresh seeds, if any were.
        chosen: the exported trials, by the names of their bundles.
        metrics: metrics.json of each bundle, by its name.
    """

    objectives: Sequence[Objective]
    records: Sequence[TrialRecord]
    front: Sequence[TrialRecord]
    confirmed: Sequence[Confirmed]
    chosen: Mapping[str, TrialRecord]
    metrics: Mapping[str, Mapping[str, Any]]


def print_summary(console: Console, outcome: Outcome, folder: Path) -> None:
    """Print the best trials, the test metrics of the bundles, and the path of the best bundle."""
    records, front, chosen = outcome.records, outcome.front, outcome.chosen
    heading = f"Best of {len(records)} trials ({_count_states(records)})"
    table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in (*_columns(outcome.objectives), "epochs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("configuration")
    table.add_column("best by", no_wrap=True)
    table.add_column("trial", no_wrap=True)
    for record in _ranked(outcome):
        names = [name for name, picked in chosen.items() if picked.trial_id == record.trial_id]
        table.add_row(
            *_columns(outcome.objectives, record).values(),
            f"{record.metrics['epoch']:g}",
            run_name(record.config),
            "\n".join(names) or ("(front)" if record in front else ""),
            str(records.index(record)),
        )
    console.print(table)
    if outcome.confirmed:
        _print_confirmed(console, outcome)
    console.print("Accuracy and SSIM are of the validation split; on the test split, read once:")
    for name in chosen:
        metrics = outcome.metrics[name]
        accuracy, similarity = metrics["test_accuracy"], metrics["test_cam_ssim"]
        console.print(f"  {name:<9} accuracy {accuracy:.4f}  SSIM {similarity:.3f}")
    console.print(f"Best bundle: {folder / 'best' / 'knee'}", soft_wrap=True)


def _print_confirmed(console: Console, outcome: Outcome) -> None:
    seeds = len(outcome.confirmed[0].runs)
    title = f"Confirmed with {seeds} fresh seeds: mean ± 95 % confidence interval"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for objective in outcome.objectives:
        table.add_column(objective.title, no_wrap=True)
    for column in ("configuration", "best by", "trial"):
        table.add_column(column)
    numbers = {record.trial_id: index for index, record in enumerate(outcome.records)}
    for each in outcome.confirmed:
        names = [n for n, picked in outcome.chosen.items() if picked == each.as_record]
        table.add_row(
            *(_interval(each, objective) for objective in outcome.objectives),
            run_name(each.candidate.config),
            "\n".join(names),
            str(numbers[each.candidate.trial_id]),
        )
    console.print(table)


def _columns(objectives: Sequence[Objective], record: TrialRecord | None = None) -> dict[str, str]:
    """Return the columns of a trial's objectives, and the ceiling beside the SSIM.

    By their titles; with empty texts where `record` is None.
    """
    columns = {}
    for each in objectives:
        columns[each.title] = "" if record is None else each.show(record.metrics[each.name])
        if each == SIMILARITY:
            ceiling = "" if record is None else each.show(record.metrics["cam_ssim_ceiling"])
            columns["ceiling"] = ceiling
    return columns


def _interval(confirmed: Confirmed, objective: Objective) -> str:
    mean, _, high = confirmed.intervals[objective.name]
    return f"{objective.show(mean)} ± {objective.show(high - mean)}"


def write_readme(
    path: Path, settings: StudySettings, outcome: Outcome, dataset_sha256: str
) -> None:
    """Write the study's page: its command, its Pareto front, and the use of its bundles."""
    records, front, chosen = outcome.records, outcome.front, outcome.chosen
    versions = package_versions("ray", "optuna", "wandb").items()
    lines = [
        f"# Study {settings.study}",
        "",
        f"{len(records)} trials on {settings.dataset} ({_count_states(records)}), up to "
        f"{settings.max_epochs} epochs each, {_goal(outcome.objectives)}; "
        f"seed {settings.seed}. Accuracy and SSIM are of the validation split. The SSIM stands "
        "beside its ceiling, the highest value that the CAM grid allows. The test split was read "
        "once for each exported bundle, after the bundle was chosen.",
        "",
        "    " + command_line(),
        "",
        f"Commit {git_commit() or 'unknown'}; data set SHA-256 {dataset_sha256[:16]}…; "
        + ", ".join(f"{name} {number}" for name, number in versions)
        + ".",
        "",
        "## Best",
        "",
        "| bundle | trial | configuration | val. accuracy | SSIM / ceiling | images/s "
        "| test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in chosen.items():
        lines.append(
            f"| [{name}](best/{name}) | {record.trial_id} | {run_name(record.config)} | "
            f"{record.metrics['val_accuracy']:.4f} | {record.metrics['cam_ssim']:.3f} / "
            f"{record.metrics['cam_ssim_ceiling']:.3f} | "
            f"{record.metrics['images_per_second']:,.0f} | "
            f"{outcome.metrics[name]['test_accuracy']:.4f} |"
        )
    if outcome.confirmed:
        lines += _confirmed_section(outcome)
    lines += [
        "",
        "![Class CAMs of the knee beside their prototypes](best/knee/cams.png)",
        "",
        "## Pareto front",
        "",
        "| trial | configuration | val. accuracy | SSIM / ceiling | images/s | epochs |",
        "|---|---|---|---|---|---|",
    ]
    for record in front:
        values = record.metrics
        lines.append(
            f"| {record.trial_id} | {run_name(record.config)} | {values['val_accuracy']:.4f} | "
            f"{values['cam_ssim']:.3f} / {values['cam_ssim_ceiling']:.3f} | "
            f"{values['images_per_second']:,.0f} | {values['epoch']:g} |"
        )
    lines += [
        "",
        f"{_charts(path.parent)} [trials.csv](trials.csv) has all trials. "
        "[pareto.json](pareto.json) has the front with full configurations.",
        "",
        "## Reuse",
        "",
        "```sh",
        f"batchcam verify {settings.out}/{settings.study}/best/knee",
        f"batchcam train --config {settings.out}/{settings.study}/best/knee/config.yaml --out DIR",
        "```",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _charts(folder: Path) -> str:
    """Return the sentence about the charts, which need the extra `report`."""
    if (folder / paths.REPORT).exists():
        return "[report.html](report.html) has charts; it is one file to open in a browser."
    return f"`batchcam-study report {folder}` writes charts, which are missing, to report.html."


def _confirmed_section(outcome: Outcome) -> list[str]:
    titles = [each.title for each in outcome.objectives]
    seeds = ", ".join(str(run.config.seed) for run in outcome.confirmed[0].runs)
    lines = [
        "",
        f"The bundles were chosen by the means over fresh runs (seeds {seeds}) of the best of the "
        "front, on the full budget. ± is the 95 % confidence interval of the mean (Student's t). A "
        "bundle holds the run of the first of these seeds.",
        "",
        f"| trial | configuration | {' | '.join(titles)} |",
        "|---|---" + "|---" * len(titles) + "|",
    ]
    lines += [
        f"| {each.candidate.trial_id} | {run_name(each.candidate.config)} | "
        f"{' | '.join(_interval(each, objective) for objective in outcome.objectives)} |"
        for each in outcome.confirmed
    ]
    return lines


def _goal(objectives: Sequence[Objective]) -> str:
    """Return "maximising a and b, minimising c"."""
    goals = []
    for verb, direction in (("maximising", "maximize"), ("minimising", "minimize")):
        names = [each.name for each in objectives if each.direction == direction]
        if names:
            goals.append(f"{verb} {' and '.join(names)}")
    return ", ".join(goals)


def _ranked(outcome: Outcome) -> list[TrialRecord]:
    """Return the front, then the others by the first objective, at most `_ROWS` in all."""
    first = outcome.objectives[0]
    others = [
        record
        for record in outcome.records
        if has_objectives(record.metrics, outcome.objectives) and record not in outcome.front
    ]
    others.sort(key=lambda record: -first.gain(record.metrics[first.name]))
    return [*outcome.front, *others][:_ROWS]


def _count_states(records: Sequence[TrialRecord]) -> str:
    states = ("completed", "stopped", "failed", "unfinished")
    counts = {state: sum(record.state == state for record in records) for state in states}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
