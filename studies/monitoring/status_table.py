"""A live table of the running trials at the foot of a terminal, at most 80 columns wide.

The lines of :mod:`studies.monitoring.console` scroll above it. Without a terminal, as in the log of
a job, only the lines are printed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import moocore
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from studies.engine.ledger import Ledger, TrialHistory
from studies.engine.protocol import Objective, gains, has_objectives

WIDTH = 80
_ROWS = 12
"""Maximum number of running trials that are shown."""
_STATES = ("completed", "stopped", "failed")


class StatusTable:
    """The state of a study, from its ledger, as a table for rich.

    Args:
        ledger: the ledger of the study.
        num_trials: number of trials of the study.
        objectives: the objectives of the study.
        max_epochs: epochs of a trial that is not stopped early.
        clock: returns seconds since any fixed moment.
    """

    def __init__(
        self,
        ledger: Ledger,
        num_trials: int,
        objectives: Sequence[Objective],
        max_epochs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._num_trials = num_trials
        self._objectives = tuple(objectives)
        self._max_epochs = max_epochs
        self._clock = clock
        self._started = clock()
        self._before = sum(len(trial.reports) for trial in ledger.trials)

    def __rich__(self) -> RenderableType:
        """Render the current state of the ledger; rich calls this twice a second."""
        trials = self._ledger.trials
        return Group("", *self._lines(trials), self._table(trials))

    def _lines(self, trials: list[TrialHistory]) -> list[Text]:
        ended = [trial for trial in trials if trial.state is not None]
        counts = [
            f"{sum(trial.state == state for trial in ended)} {state}"
            for state in _STATES
            if any(trial.state == state for trial in ended)
        ]
        running = len(trials) - len(ended)
        first = f"{len(ended)} of {self._num_trials} trials ended"
        first += f" ({', '.join(counts)})" if counts else ""
        lines = [f"{first}, {running} running"]
        last = [trial.reports[-1] for trial in ended if trial.state != "failed" and trial.reports]
        found = [metrics for metrics in last if has_objectives(metrics, self._objectives)]
        if found:
            points = gains(found, self._objectives)
            front = int(moocore.is_nondominated(points, maximise=True, keep_weakly=True).sum())
            best = ", ".join(
                f"{each.name} {found[place][each.name]:.4f}"
                for each, place in zip(self._objectives, points.argmax(axis=0), strict=True)
            )
            lines.append(f"best {best}; {front} on the Pareto front")
        left = self._left(trials)
        if left is not None:
            lines.append(f"{left} left at most")
        return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]

    def _left(self, trials: list[TrialHistory]) -> timedelta | None:
        """Return an upper bound of the time left, from the pace of the epochs since the start."""
        done = sum(len(trial.reports) for trial in trials) - self._before
        if not done:
            return None
        to_come = sum(self._max_epochs - trial.epoch for trial in trials if trial.state is None)
        to_come += (self._num_trials - len(trials)) * self._max_epochs
        seconds = (self._clock() - self._started) / done * max(0, to_come)
        return timedelta(seconds=round(seconds))

    def _table(self, trials: list[TrialHistory]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=WIDTH)
        table.add_column("running", no_wrap=True, overflow="ellipsis", ratio=1)
        for column in ("epoch", *(each.name for each in self._objectives), "images/s"):
            table.add_column(column, justify="right", no_wrap=True)
        running = [trial for trial in trials if trial.state is None]
        for trial in running[:_ROWS]:
            last: dict[str, Any] = trial.reports[-1] if trial.reports else {}
            values = [
                f"{last[each.name]:.4f}" if each.name in last else "" for each in self._objectives
            ]
            speed = last.get("images_per_second")
            table.add_row(
                str(trial.params.get("trial_id", trial.number)),
                f"{trial.epoch}/{self._max_epochs}",
                *values,
                f"{speed:,.0f}" if speed else "",
            )
        if len(running) > _ROWS:
            table.add_row(f"and {len(running) - _ROWS} more")
        return table


@contextmanager
def live_table(console: Console, table: StatusTable) -> Iterator[None]:
    """Show the table at the foot of the terminal during the context; nothing without a terminal."""
    if not console.is_terminal:
        yield
        return
    with Live(table, console=console, refresh_per_second=2, transient=True):
        yield
