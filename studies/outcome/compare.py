"""Compares the exports of several studies side by side: `batchcam-study compare`.

Reads trials.csv, pareto.json, and metrics.json and config.yaml of the bundles; a copy of these is
enough.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError, FormatError
from studies import paths
from studies.markdown import markdown_table
from studies.monitoring.console import console
from studies.outcome.export import BUNDLES, read_bundles
from studies.trial import run_name


@dataclass(frozen=True)
class Exported:
    """The exports of a study.

    Attributes:
        name: the name of the study's folder.
        trials: a row per trial, as in trials.csv.
        front: accuracy and SSIM of each trial of the Pareto front, `(n, 2)`.
        bundles: configuration and metrics of each bundle, by its name.
    """

    name: str
    trials: pd.DataFrame
    front: Any
    bundles: dict[str, tuple[TrialConfig, dict[str, Any]]]

    @property
    def dataset(self) -> str:
        """The data set that the study trained on."""
        return str(self.trials["dataset"].iloc[0])

    @property
    def hypervolume(self) -> float:
        """The area of accuracy times SSIM that its front dominates, in [0, 1]."""
        return float(moocore.hypervolume(-self.front, ref=[0.0, 0.0]))


def read(folder: Path) -> Exported:
    """Read the exports of a study.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    try:
        trials = pd.read_csv(folder / paths.TRIALS)
        front = json.loads((folder / paths.PARETO).read_text(encoding="utf-8"))["trials"]
        values = [
            [each["metrics"][name] for name in ("val_accuracy", "cam_ssim")] for each in front
        ]
        bundles = read_bundles(folder / paths.BUNDLES)
        return Exported(folder.resolve().name, trials, np.array(values, dtype=float), bundles)
    except FormatError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder} lacks the exports of a study ({error}); name the folder of a finished "
            "study, such as results/mine, or finish the study by --resume."
        ) from error


Rows = tuple[list[str], list[list[str]]]


def studies_table(studies: Sequence[Exported]) -> Rows:
    """Return header and rows of the comparison: settings and results, a column per study."""
    columns = []
    for each in studies:
        states = each.trials["state"].value_counts()
        # A row of trials.csv has the seconds of the last epoch only.
        hours = each.trials["seconds"].mul(each.trials["epoch"]).sum() / 3600
        columns.append(
            {
                "data set": each.dataset,
                "trials": str(len(each.trials)),
                "stopped early": str(states.get("stopped", 0)),
                "failed": str(states.get("failed", 0)),
                "total epochs": f"{each.trials['epoch'].sum():.0f}",
                "hours of training, estimated": f"{hours:.2f}",
                "Pareto front": str(len(each.front)),
                "hypervolume of the front": f"{each.hypervolume:.4f}",
            }
        )
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return ["", *(each.name for each in studies)], rows


def bundles_table(studies: Sequence[Exported]) -> Rows:
    """Return header and rows of the bundles of all studies, grouped by the bundle's name."""
    header = ["best by", "study", "accuracy", "test", "SSIM / ceiling", "configuration"]
    rows = []
    for name in BUNDLES:
        for each in studies:
            if name in each.bundles:
                config, metrics = each.bundles[name]
                accuracy = [f"{metrics[key]:.4f}" for key in ("val_accuracy", "test_accuracy")]
                similar = f"{metrics['cam_ssim']:.3f} / {metrics['cam_ssim_ceiling']:.3f}"
                rows.append([name, each.name, *accuracy, similar, run_name(config)])
    return header, rows


def show(out: Console, title: str, table: Rows) -> None:
    """Print a table."""
    header, rows = table
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in header[:-1]:
        shown.add_column(column, no_wrap=True)
    shown.add_column(header[-1])
    for row in rows:
        shown.add_row(*row)
    out.print(shown)


def compare(folders: Sequence[Path], out: Path | None = None) -> None:
    """Print the tables of several studies, and write them as Markdown if a file is given.

    Args:
        folders: of the studies.
        out: the Markdown file.

    Raises:
        ConfigError: no folder is given, or a file of a study is missing or damaged.
    """
    studies = [read(folder) for folder in folders]
    if not studies:
        raise ConfigError("no study is given; name the folders to compare, such as results/one.")
    tables = {"Studies": studies_table(studies), "Bundles": bundles_table(studies)}
    for title, table in tables.items():
        show(console, title, table)
    datasets = sorted({each.dataset for each in studies})
    note = "" if len(datasets) == 1 else f"Different data sets: {', '.join(datasets)}.\n"
    if note:
        console.print(note.rstrip())
    if out is not None:
        parts = [f"## {title}\n\n{markdown_table(*table)}" for title, table in tables.items()]
        out.write_text("\n".join([*parts, note] if note else parts), encoding="utf-8")
