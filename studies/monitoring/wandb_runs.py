"""Weights & Biases: each trial is a run, and nothing about it can stop or delay a trial.

Without an API key, or with one but no way to the server, runs are written offline, to be sent later
with `wandb sync`. There is never a prompt. Keys are read from the environment (or netrc) by W&B
itself, and pass through nothing of ours.
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

from batchcam.figures import Image
from batchcam.training.fit import EpochReport

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
_REACH_SECONDS = 5
_INIT_SECONDS = 30
_FINISH_SECONDS = 30
"""W&B would wait for ever for a server that was lost; what it has not sent stays on the disk."""


@dataclass(frozen=True)
class Tracking:
    """Where the runs of a study go; holds no secret, for Ray writes it to disk."""

    project: str
    group: str
    folder: Path
    mode: Mode


def choose_mode() -> tuple[Mode, str]:
    """Return how runs are recorded, and why, in words for the user.

    `WANDB_MODE` decides if it is set; else offline without a key or without a way to the server.
    """
    wanted = os.environ.get("WANDB_MODE")
    if wanted in MODES:
        return wanted, f"WANDB_MODE={wanted}"
    try:
        if not wandb.login(prompt=False, verify=False):
            return "offline", "no API key"
    except wandb.Error as error:  # A key that cannot be one.
        return "offline", str(error).splitlines()[0]
    url = _server()
    unreachable = _unreachable(url)
    if unreachable:
        return "offline", f"{url} cannot be reached: {unreachable}"
    return "online", url


def _server() -> str:
    """Return the server's address, by what the environment and `wandb login` say of it."""
    return wandb.setup().settings.base_url


def _unreachable(url: str) -> str | None:
    """Return why no connection to the server can be made, or None if one can."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


class Run:
    """A trial's W&B run; every call is safe, whatever has become of the run."""

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, report: EpochReport, picture: Image) -> None:
        """Record an epoch: its metrics, and the picture of its class CAMs under the prototypes."""
        if self._run is None:
            return
        try:
            image = wandb.Image(picture, caption="class prototypes above, CAMs below")
            # An error is small where accuracy is high: by it the dashboard draws the Pareto front.
            error = 1 - report.metrics["val_accuracy"]
            content = {**report.metrics, "val_error": error, "cams": image}
            self._run.log(content, step=report.epoch)
        except Exception:  # Losing a record must not lose the trial.
            log.warning("W&B did not take epoch %d", report.epoch, exc_info=True)

    def finish(self, failed: bool) -> None:
        """End the run. Actors are reused: a run left open would swallow the next trial's."""
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
    """Open the W&B run of a trial, and finish it when the trial ends, however it ends.

    `config` is flat, since W&B's parallel coordinates show top-level keys only.
    """
    run = Run(_init(tracking, trial_id, name, config, tags))
    failed = True
    try:
        yield run
        failed = False
    except SystemExit:  # Ray ends a trial that the scheduler stopped this way.
        failed = False
        raise
    finally:
        run.finish(failed)


def _init(
    tracking: Tracking, trial_id: str, name: str, config: dict[str, Any], tags: Sequence[str]
) -> Any | None:
    if tracking.mode == "disabled":
        return None
    online = tracking.mode == "online" and not _unreachable(_server())
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
                    x_disable_stats=True,
                ),
            )
        except Exception:
            log.warning("W&B could not start a run %s", mode, exc_info=True)
            with suppress(Exception):  # Its service may have died.
                wandb.teardown()  # It would refuse the id, which it holds to be in use.
    return None
