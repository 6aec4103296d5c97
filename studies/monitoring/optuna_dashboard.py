"""Optuna Dashboard on a study, with the picture of each trial's class CAMs.

    python -m studies.monitoring.optuna_dashboard results/mine

Pictures are attached by the study's driver when a trial ends: Optuna takes nothing more about it
afterwards. They are kept in `<study>/artifacts`.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import optuna
import tyro
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from batchcam.errors import ConfigError
from studies.cli import run_command
from studies.engine.checkpoints import PICTURE
from studies.engine.optuna_storage import STORAGE_VARIABLE, open_optuna_storage, storage_kind
from studies.engine.run import trial_id
from studies.engine.storage import copy_file
from studies.settings import SETTINGS_FILE, StudySettings, load_settings

log = logging.getLogger(__name__)

ARTIFACTS = "artifacts"


def attach_picture(trial: optuna.Trial, settings: StudySettings) -> None:
    """Attach the newest picture of a trial, if it has any; nothing about it stops a study."""
    source = f"{settings.checkpoints}/{trial_id(settings.key, trial.number)}/{PICTURE}"
    store = settings.folder / ARTIFACTS
    try:
        store.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            picture = str(Path(scratch) / PICTURE)
            copy_file(source, picture)
            upload_artifact(
                artifact_store=FileSystemArtifactStore(str(store)),
                file_path=picture,
                study_or_trial=trial,
            )
    except FileNotFoundError:
        pass  # It ended before its first epoch did.
    except Exception:  # Whatever a storage that is lost leads to.
        log.warning("the picture of trial %d was not attached", trial.number, exc_info=True)


@dataclass(frozen=True, kw_only=True)
class OptunaView:
    """Serve Optuna Dashboard on a study, until Ctrl-C."""

    folder: tyro.conf.Positional[Path]
    """Of the study, as results/mine."""
    port: int = 8080
    """On this machine only."""


def main(view: OptunaView) -> None:
    """Serve the study's storage and its pictures on 127.0.0.1."""
    path = view.folder / SETTINGS_FILE
    if not path.is_file():
        raise ConfigError(f"{view.folder} holds no study; there is no {SETTINGS_FILE} in it.")
    settings = load_settings(path)
    if settings.optuna_storage != storage_kind():
        raise ConfigError(
            f"{view.folder} keeps Optuna's trials in {settings.optuna_storage}, but "
            f"{STORAGE_VARIABLE} names {storage_kind()}; set it as it was."
        )
    import optuna_dashboard

    artifacts = view.folder / ARTIFACTS
    artifacts.mkdir(exist_ok=True)
    optuna_dashboard.run_server(
        open_optuna_storage(view.folder),
        host="127.0.0.1",
        port=view.port,
        artifact_store=FileSystemArtifactStore(str(artifacts)),
    )


if __name__ == "__main__":
    run_command(main, OptunaView)
