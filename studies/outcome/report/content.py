"""Reads the content of a report from a study's folder.

Only the ledger and study.json are required. Optional content that is missing is left out, such as
the pictures of trials whose checkpoints were deleted.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError, FormatError
from batchcam.export.model_card import loss_terms
from batchcam.losses import compares_cams
from studies import paths
from studies.engine.checkpoints import PICTURE
from studies.engine.ledger import LEDGER, Ledger
from studies.engine.storage import copy_file
from studies.outcome.export import TrialRecord, collect, pareto_front, read_bundles
from studies.settings import StudySettings, load_settings
from studies.space import SEARCHED
from studies.trial import run_name

_THUMBNAIL = 28
"""Side of a class in a trial's thumbnail, in pixels."""


@dataclass(frozen=True)
class Content:
    """The content of a study's report.

    Attributes:
        settings: the study's settings.
        settings_file: text of study.json.
        records: all trials, in the order of their proposals.
        front: the trials of the Pareto front.
        rows: one row of :func:`trial_row` per trial with a report, for charts and table.
        curves: one row per epoch of each trial.
        chosen: metrics.json of each bundle, by bundle name.
        configs: config.yaml of each bundle, by bundle name.
        pictures: by trial id, an image with the class prototypes above the class CAMs.
    """

    settings: StudySettings
    settings_file: str
    records: Sequence[TrialRecord]
    front: Sequence[TrialRecord]
    rows: Sequence[Mapping[str, Any]]
    curves: Sequence[Mapping[str, Any]]
    chosen: Mapping[str, Mapping[str, Any]]
    configs: Mapping[str, TrialConfig]
    pictures: Mapping[str, PIL.Image.Image]

    @property
    def class_names(self) -> list[str]:
        """The class names, read from a bundle; empty if there is no bundle."""
        for metrics in self.chosen.values():
            return list(metrics["cam_ssim_per_class"])
        return []


def read(folder: Path) -> Content:
    """Read the content of a report from a study's folder.

    Raises:
        ConfigError: the folder is not a study's, no trial has reported, or a bundle is damaged.
    """
    path = folder / paths.SETTINGS
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no study: it contains no {paths.SETTINGS}; name a study's folder."
        )
    settings = replace(load_settings(path), out=folder.resolve().parent)
    ledger = Ledger(folder / LEDGER)
    records = collect(ledger, settings.base_config(), settings.checkpoints)
    front = pareto_front(records, settings.objective_records)
    if not front:
        raise ConfigError(
            f"no trial of {folder} has reported yet, so there is nothing to show; "
            "write the report after the first epoch of a trial."
        )
    try:
        bundles = read_bundles(folder / paths.BUNDLES)
    except FormatError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"a bundle in {folder / 'best'} is damaged: {error}; write it again with --resume."
        ) from error
    chosen = {name: metrics for name, (_, metrics) in bundles.items()}
    folders = {record.trial_id: record.checkpoints for record in records}
    for metrics in chosen.values():  # Confirmation runs are bundled but are not in the records.
        trial_id = str(metrics["trial_id"])
        folders.setdefault(trial_id, f"{settings.checkpoints}/{trial_id}")
    pictures = {
        trial_id: picture
        for trial_id, checkpoints in folders.items()
        if (picture := _picture(checkpoints)) is not None
    }
    on_front = {record.trial_id for record in front}
    return Content(
        settings=settings,
        settings_file=path.read_text(encoding="utf-8"),
        records=records,
        front=front,
        rows=[
            trial_row(
                record,
                number,
                record.trial_id in on_front,
                _thumbnail(pictures.get(record.trial_id)),
                sum(report["seconds"] for report in trial.reports),
            )
            for number, (record, trial) in enumerate(zip(records, ledger.trials, strict=True))
            if record.usable
        ],
        curves=[
            {
                "number": number,
                "epoch": report["epoch"],
                "accuracy": report["val_accuracy"],
                "ssim": report["cam_ssim"],
                "last": report is trial.reports[-1],
            }
            for number, trial in enumerate(ledger.trials)
            for report in trial.reports
        ],
        chosen=chosen,
        configs={name: config for name, (config, _) in bundles.items()},
        pictures=pictures,
    )


def trial_row(
    record: TrialRecord, number: int, on_front: bool, picture: str | None, seconds: float
) -> dict[str, Any]:
    """Return a trial's row of the report's data, by column.

    Columns that have a filter hold strings.

    Args:
        record: the trial.
        number: its index in the order of proposals.
        on_front: whether it is on the Pareto front.
        picture: its thumbnail as a data URI.
        seconds: total time of training and evaluation.
    """
    config, metrics = record.config, record.metrics
    return {
        "number": number,
        "name": run_name(config),
        "state": record.state,
        "loss": " + ".join(loss_terms(config)) or "cross-entropy",
        "backbone": config.backbone,
        "resolution": f"{config.resolution} px",
        "metric": config.metric.upper() if compares_cams(config) else "none",
        "front": on_front,
        "epochs": int(metrics["epoch"]),
        "val_accuracy": metrics["val_accuracy"],
        "val_error": 1 - metrics["val_accuracy"],
        "cam_ssim": metrics["cam_ssim"],
        "cam_ssim_ceiling": metrics["cam_ssim_ceiling"],
        "images_per_second": metrics["images_per_second"],
        "seconds": seconds,
        **{f"of_{name}": value for name, value in searched_values(config).items()},
        "picture": picture,
    }


def searched_values(config: TrialConfig) -> dict[str, Any]:
    """Return the fields of a configuration that a search may vary; see `studies.space.SEARCHED`.

    `metric` is "none" if no loss term uses it. A field that the search did not vary has the same
    value in all trials.
    """
    values = {name: getattr(config, name) for name, _ in SEARCHED}
    for name in ("resolution", "output_stride"):
        values[name] = str(values[name])
    return values | {"metric": config.metric if compares_cams(config) else "none"}


def split_picture(picture: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Return the upper half (class prototypes) and the lower half (class CAMs) of a picture."""
    width, height = picture.size
    return (
        picture.crop((0, 0, width, height // 2)),
        picture.crop((0, height // 2, width, height)),
    )


def data_uri(picture: PIL.Image.Image) -> str:
    """Return a picture as a data URI of a PNG image with at most 256 colours."""
    content = io.BytesIO()
    picture.convert("RGB").quantize(256).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _thumbnail(picture: PIL.Image.Image | None) -> str | None:
    """Return a reduced picture as a data URI."""
    if picture is None:
        return None
    side = picture.height // 2
    size = (picture.width * _THUMBNAIL // side, 2 * _THUMBNAIL)
    return data_uri(picture.resize(size, PIL.Image.Resampling.BOX))


def _picture(checkpoints: str) -> PIL.Image.Image | None:
    """Return the picture in a trial's checkpoint folder, or None if there is none."""
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / PICTURE
        try:
            copy_file(f"{checkpoints}/{PICTURE}", str(copy))
            with PIL.Image.open(copy) as picture:
                return picture.convert("RGB")
        except OSError:
            return None
