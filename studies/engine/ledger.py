"""What happened in a study, in the order in which it happened: a line of JSON for each event.

The ledger is what a study knows about its trials. It is written before anything is made of an
event, survives whatever kills the driver, and is all that resuming, the scheduler's rungs and the
export need. Optuna's storage holds what was proposed; the checkpoints hold the weights.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from batchcam.errors import ConfigError
from batchcam.training.fit import Metrics
from studies.engine.retry import retry

LEDGER = "ledger.jsonl"

State = Literal["completed", "stopped", "failed"]


@dataclass
class TrialHistory:
    """A trial as the ledger knows it.

    Attributes:
        number: Optuna's, counted from 0 in the order of the proposals.
        params: what the search decided, and `trial_id`.
        reports: the metrics of each epoch, in order.
        state: how it ended; None while it has not.
        error: the last line of what made it fail.
        resource_multiplier: how many times the usual resources it asks for.
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
        return int(self.reports[-1]["epoch"]) if self.reports else 0


class Ledger:
    """The events of a study; opening one that exists reads it.

    Each event is on the disk, whole, before the method that records it returns. A line that a crash
    cut short is dropped when the ledger is opened.

    Raises:
        ConfigError: the file is damaged before its last line.
        StorageLostError: it could not be written for a long time.
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
        """All trials, in the order in which they were proposed."""
        return [self._trials[number] for number in sorted(self._trials)]

    @property
    def reports(self) -> Iterator[tuple[int, Metrics]]:
        """Every report as (trial's number, metrics), in the order of arrival."""
        return iter(self._order)

    def get(self, number: int) -> TrialHistory | None:
        """Return a trial, or None if it was never started."""
        return self._trials.get(number)

    def propose(self, params: dict[str, Any]) -> None:
        """Record what a trial is to be; once, however often it is started."""
        if params["number"] not in self._trials:
            self._record({"event": "proposed", "number": params["number"], "params": params})

    def report(self, number: int, metrics: Metrics) -> bool:
        """Record the metrics of an epoch; return False, recording nothing, if they are there.

        A trial that starts again repeats the report of its checkpoint.
        """
        if metrics["epoch"] <= self._trials[number].epoch:
            return False
        self._record({"event": "report", "number": number, "metrics": metrics})
        return True

    def end(self, number: int, state: State, error: str | None = None) -> None:
        """Record how a trial ended; once."""
        if self._trials[number].state is None:
            self._record({"event": "ended", "number": number, "state": state, "error": error})

    def enlarge(self, number: int, share: int) -> None:
        """Record that a trial starts again with `share` times the usual resources."""
        self._record({"event": "enlarged", "number": number, "share": share})

    def _record(self, event: dict[str, Any]) -> None:
        line = (json.dumps(event, separators=(",", ":")) + "\n").encode()
        retry(lambda: self._append(line), str(self._path))
        self._size += len(line)
        self._apply(event)

    def _append(self, line: bytes) -> None:
        with self._path.open("ab") as file:
            file.truncate(self._size)  # What an earlier try may have left.
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
                self._apply(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"line {count} of {self._path} is no event of a study ({error!r}); restore the "
                    "file from a backup, or start another study."
                ) from error
        self._size = len(whole)
