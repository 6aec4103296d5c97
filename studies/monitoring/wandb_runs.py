"""Record each trial as a run of Weights & Biases. A failure of W&B never stops a trial.

Runs are recorded offline without an API key or if the server cannot be reached; `wandb sync` sends
them later. W&B never prompts. It reads its API key from the environment or netrc by itself; this
code does not handle the key.
"""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import wandb

from batchcam.errors import first_line
from batchcam.figures import Image
from batchcam.training.fit import EpochReport

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
_REACH_SECONDS = 5
_INIT_SECONDS = 30
_FINISH_SECONDS = 30
"""W&B waits for ever for a lost server by default. Records that were not sent stay on the disk."""


@dataclass(frozen=True)
class Tracking:
    """Where the runs of a study are recorded. Holds no secret, because Ray writes it to disk."""

    project: str
    group: str
    folder: Path
    mode: Mode


def choose_mode() -> tuple[Mode, str]:
    """Return how runs are recorded, and the reason as a message for the user.

    `WANDB_MODE` decides if it is set. Otherwise runs are offline without an API key or if the
    server cannot be reached.
    """
    wanted = os.environ.get("WANDB_MODE")
    if wanted in MODES:
        return wanted, f"WANDB_MODE={wanted}"
    try:
        if not wandb.login(prompt=False, verify=False):
            return "offline", "no API key"
    except wandb.Error as error:  # The key is malformed.
        return "offline", first_line(error)
    problem = server_problem()
    return ("offline", problem) if problem else ("online", _server())


def _server() -> str:
    """Return the server's address according to the environment and `wandb login --host`."""
    # A new Settings object reads neither the file that `wandb login` writes nor the environment.
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings = wandb.Settings(settings_system=str(folder / "settings"))
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    return settings.base_url


def server_problem() -> str | None:
    """Return why no connection to W&B's server can be made, or None if one can."""
    url = _server()
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        return f"{url} cannot be reached: {error}"
    return None


class Run:
    """The W&B run of a trial. No method raises if W&B fails."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, report: EpochReport, picture: Image) -> None:
        """Record the metrics of an epoch, and the picture of class CAMs under their prototypes."""
        if self._run is None:
            return
        try:
            image = wandb.Image(picture, caption="class prototypes above, CAMs below")
            # The dashboard draws the Pareto front of the error, which is minimised.
            error = 1 - report.metrics["val_accuracy"]
            content = {**report.metrics, "val_error": error, "cams": image}
            self._run.log(content, step=report.epoch)
        except Exception:  # A record may be lost; the trial may not.
            log.warning("W&B did not take epoch %d", report.epoch, exc_info=True)

    def finish(self, failed: bool) -> None:
        """End the run. Actors are reused, and an open run would receive the next trial's epochs."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except Exception:
            log.warning("W&B did not finish the run", exc_info=True)


@contextmanager
def track(
    tracking: Tracking,
    trial_id: str,
    name: str,
    config: dict[str, Any],
    tags: Sequence[str] = (),
) -> Iterator[Run]:
    """Open the W&B run of a trial; finish it when the trial ends or fails.

    `config` must be flat: W&B's parallel coordinates show top-level keys only.
    """
    run = Run(_init(tracking, trial_id, name, config, tags))
    failed = True
    try:
        yield run
        failed = False
    except SystemExit:  # Ray ends a trial that the scheduler stopped with SystemExit.
        failed = False
        raise
    finally:
        run.finish(failed)


def _init(
    tracking: Tracking, trial_id: str, name: str, config: dict[str, Any], tags: Sequence[str]
) -> Any | None:
    if tracking.mode == "disabled":
        return None
    online = tracking.mode == "online" and not server_problem()
    tries: list[Mode] = ["online", "offline"] if online else ["offline"]
    for mode in tries:
        try:
            return wandb.init(
                project=tracking.project,
                group=tracking.group,
                id=trial_id,
                name=name,
                config=config,
                tags=tags,
                mode=mode,
                resume="allow" if mode == "online" else None,
                dir=str(tracking.folder),
                reinit="finish_previous",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=_INIT_SECONDS,
                    finish_timeout=_FINISH_SECONDS,
                ),
            )
        except Exception:
            log.warning("W&B could not start a run %s", mode, exc_info=True)
            with suppress(Exception):  # Its service may have died.
                wandb.teardown()  # Otherwise W&B refuses the run's id as one in use.
    return None
