"""The ledger of a study: its events, in the order in which they happened, one line of JSON each.

An event is written before anything acts on it, so the ledger survives whatever kills the driver.
Resuming, the scheduler's rungs and the export need nothing else. Optuna's storage holds the
proposals; the checkpoints hold the weights.

The first line that a version writes to an empty file carries the key `format`. Files without it are
of format 1.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from batchcam.errors import ConfigError, check_format
from studies.engine.protocol import EPOCH, NUMBER, Metrics, has_diverged
from studies.engine.retry import retry

LEDGER = "ledger.jsonl"
"""Name of the ledger's file in the study's folder."""
FORMAT = 1
"""The newest format of the file that this version reads, and the one that it writes."""

State = Literal["completed", "stopped", "failed"]


@dataclass
class TrialHistory:
    """The events of one trial.

    Attributes:
        number: the trial's number in Optuna's study, from 0 in the order of the proposals.
        params: the parameters that the search proposed, `trial_id` and `number`.
        reports: the metrics of each epoch, in order.
        state: how the trial ended; None before its end.
        error: the last line of the error of a failed trial.
        resource_multiplier: how many times the usual resources the trial asks for.
    """

    number: int
    params: dict[str, Any]
    reports: list[Metrics] = field(default_factory=list)
    state: State | None = None
    error: str | None = None
    resource_multiplier: int = 1

    @property
    def epoch(self) -> int:
        """The last epoch that was reported; 0 before the first."""
        return int(self.reports[-1][EPOCH]) if self.reports else 0


class Ledger:
    """The events of a study; opening one that exists reads it.

    A method that records an event returns when the whole line is on the disk. A last line that a
    crash truncated is dropped when the ledger is opened.

    Raises:
        ConfigError: the file is damaged before its last line.
        FormatError: the file has a newer format.
        StorageLostError: the file could not be written for a long time.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ledger = Ledger(Path(folder) / LEDGER)
        ...     ledger.propose({"number": 0, "learning_rate": 0.1})
        ...     new = ledger.report(0, {"epoch": 1, "accuracy": 0.5})
        ...     (trial,) = Ledger(Path(folder) / LEDGER).trials
        >>> new, trial.epoch, trial.state
        (True, 1, None)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trials: dict[int, TrialHistory] = {}
        self._order: list[tuple[int, Metrics]] = []
        self._size = 0
        if path.exists():
            self._read()

    @property
    def trials(self) -> list[TrialHistory]:
        """All trials, in the order of their proposals."""
        return [self._trials[number] for number in sorted(self._trials)]

    @property
    def num_final(self) -> int:
        """The number of trials that ended for good: completed, stopped early or diverged.

        Any other trial that failed is tried once more when the study is resumed.
        """
        return sum(
            trial.state in ("completed", "stopped") or has_diverged(trial.error)
            for trial in self._trials.values()
        )

    @property
    def reports(self) -> Iterator[tuple[int, Metrics]]:
        """Every report as (number of the trial, metrics), in the order of arrival."""
        return iter(self._order)

    def get(self, number: int) -> TrialHistory | None:
        """Return a trial, or None if it was never started."""
        return self._trials.get(number)

    def propose(self, params: dict[str, Any]) -> None:
        """Record the parameters of a trial; only once, however often the trial is started."""
        if params[NUMBER] not in self._trials:
            self._record({"event": "proposed", "number": params[NUMBER], "params": params})

    def report(self, number: int, metrics: Metrics) -> bool:
        """Record the metrics of an epoch; return False, recording nothing, if they are known.

        A trial that starts again reports the epoch of its checkpoint again.
        """
        if metrics[EPOCH] <= self._trials[number].epoch:
            return False
        self._record({"event": "report", "number": number, "metrics": metrics})
        return True

    def end(self, number: int, state: State, error: str | None = None) -> None:
        """Record how a trial ended; only the first time."""
        if self._trials[number].state is None:
            self._record({"event": "ended", "number": number, "state": state, "error": error})

    def enlarge(self, number: int, share: int) -> None:
        """Record that a trial is to start again with `share` times the usual resources."""
        self._record({"event": "enlarged", "number": number, "share": share})

    def _record(self, event: dict[str, Any]) -> None:
        if not self._size:
            event = {"format": FORMAT, **event}
        line = (json.dumps(event, separators=(",", ":")) + "\n").encode()
        retry(lambda: self._append(line), str(self._path))
        self._size += len(line)
        self._apply(event)

    def _append(self, line: bytes) -> None:
        with self._path.open("ab") as file:
            file.truncate(self._size)  # Drop what an earlier try may have left.
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _apply(self, event: dict[str, Any]) -> None:
        number = event["number"]
        if event["event"] == "proposed":
            self._trials[number] = TrialHistory(number, event["params"])
            return
        trial = self._trials[number]
        if event["event"] == "report":
            trial.reports.append(event["metrics"])
            self._order.append((number, event["metrics"]))
        elif event["event"] == "ended":
            trial.state, trial.error = event["state"], event["error"]
        else:
            trial.resource_multiplier = event["share"]

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for count, line in enumerate(whole.splitlines(), start=1):
            try:
                event = json.loads(line)
                newest = event.get("format")
            except (AttributeError, ValueError) as error:
                raise self._damaged(count, error) from error
            check_format(self._path, newest, FORMAT)
            try:
                self._apply(event)
            except (KeyError, TypeError, ValueError) as error:
                raise self._damaged(count, error) from error
        self._size = len(whole)

    def _damaged(self, line: int, error: Exception) -> ConfigError:
        return ConfigError(
            f"line {line} of {self._path} is no event of a study ({error!r}); restore the file "
            "from a backup, or start another study."
        )
