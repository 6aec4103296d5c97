"""Optuna Dashboard on a study, with the class CAMs of each trial: `batchcam-study view`.

The study's driver attaches the picture of a trial before the trial ends, since Optuna accepts
nothing about a trial afterwards. Pictures are kept in `<study>/artifacts`.
"""

import logging
import tempfile
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from batchcam.errors import ConfigError
from studies import paths
from studies.engine.checkpoints import PICTURE
from studies.engine.optuna_storage import STORAGE_VARIABLE, open_optuna_storage, storage_kind
from studies.engine.run import trial_id
from studies.engine.storage import copy_file
from studies.settings import StudySettings, load_settings

log = logging.getLogger(__name__)


def attach_picture(trial: optuna.Trial, settings: StudySettings) -> None:
    """Attach the newest picture of a trial, if there is one. An error is logged, not raised."""
    source = f"{settings.checkpoints}/{trial_id(settings.key, trial.number)}/{PICTURE}"
    store = settings.folder / paths.ARTIFACTS
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
        pass  # The trial ended before its first epoch.
    except Exception:  # A lost storage raises various errors.
        log.warning("the picture of trial %d was not attached", trial.number, exc_info=True)


def serve(folder: Path, port: int) -> None:
    """Serve a study's storage and its pictures on 127.0.0.1, until Ctrl-C.

    Raises:
        ConfigError: the folder holds no study, or its trials are in another storage than the one
            that the environment names.
    """
    path = folder / paths.SETTINGS
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no study: it contains no {paths.SETTINGS}; name a study's folder."
        )
    settings = load_settings(path)
    if settings.optuna_storage != storage_kind():
        raise ConfigError(
            f"{folder} keeps Optuna's trials in {settings.optuna_storage}, but "
            f"{STORAGE_VARIABLE} names {storage_kind()}; set it as it was."
        )
    import optuna_dashboard

    artifacts = folder / paths.ARTIFACTS
    artifacts.mkdir(exist_ok=True)
    optuna_dashboard.run_server(
        open_optuna_storage(folder),
        host="127.0.0.1",
        port=port,
        artifact_store=FileSystemArtifactStore(str(artifacts)),
    )
