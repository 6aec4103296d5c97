"""The progress of a search on the terminal: a line for each trial that ends, and a status table."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray import tune

from studies.engine.ledger import Ledger
from studies.engine.run import Progress, Search
from studies.monitoring.console import TrialLines, console
from studies.monitoring.status_table import StatusTable, live_table


def on_terminal(search: Search) -> Progress:
    """Return a context that shows the progress of a search on this process's terminal."""

    @contextmanager
    def progress(ledger: Ledger, num_trials: int) -> Iterator[Sequence[tune.Callback]]:
        ended = sum(trial.state is not None for trial in ledger.trials)
        table = StatusTable(ledger, num_trials, search.objectives, search.max_epochs)
        with live_table(console, table):
            yield [TrialLines(ledger, num_trials, ended)]

    return progress


class _ConsoleHandler(logging.Handler):
    """Prints log records on the console, above a status table."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage(), markup=False)


def print_engine_warnings() -> None:
    """Print the engine's log on the console, for example that a storage does not answer."""
    log = logging.getLogger("studies.engine")
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler(logging.WARNING))
