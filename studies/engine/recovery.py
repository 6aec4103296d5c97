"""After a crash: bring the ledger, Optuna's study and the scheduler to one state.

The ledger says what was reported, in which order. Replayed through a new scheduler it gives back
the rungs, and the decisions: a trial that was to be stopped when the driver died is stopped now.
Then each side is told what it missed of the ends of trials. What remains is RUNNING in Optuna's
study, and is proposed again by the bridge.
"""

from batchcam.errors import DivergedError
from batchcam.training.fit import Metrics
from studies.engine.ledger import Ledger
from studies.engine.optuna_searcher import OptunaSearcher
from studies.engine.scheduler import ParetoASHA


def recover(ledger: Ledger, bridge: OptunaSearcher, scheduler: ParetoASHA, max_epochs: int) -> None:
    """Reconcile the parts of a study that was cut; does nothing where there is nothing to do.

    Trials that failed are proposed once more: whoever resumes a study has mended what can be
    mended. One that diverged is not, for it would diverge again.
    """
    stopped = set()
    for number, metrics in ledger.reports:
        if not scheduler.replay(number, metrics):
            stopped.add(number)
    for trial in ledger.trials:
        last: Metrics = trial.reports[-1] if trial.reports else {}
        if trial.state is None and (trial.epoch >= max_epochs or trial.number in stopped):
            ledger.end(trial.number, bridge.tell(trial.number, last))
        elif trial.state is None and bridge.is_told(trial.number):
            # Optuna is told first; what it was not told as ended is that it failed.
            ledger.end(trial.number, "failed", "the driver died as this trial failed")
        elif trial.state is not None:
            bridge.tell(trial.number, last, error=trial.state == "failed")
    for number in bridge.failed():
        failed = ledger.get(number)
        if failed is None or DivergedError.__name__ not in (failed.error or ""):
            bridge.retry(number)
