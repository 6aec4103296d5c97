"""After a crash, bring the ledger, Optuna's study and the scheduler to one state.

The ledger holds the reports in the order in which they arrived. Replayed through a new scheduler,
they restore the rungs and the decisions: a trial that was about to be stopped when the driver died
is stopped now. Then each side learns the ends of trials that it missed. Trials that remain RUNNING
in Optuna's study are proposed again by the searcher.
"""

from studies.engine.ledger import Ledger
from studies.engine.optuna_searcher import OptunaSearcher
from studies.engine.protocol import Metrics, has_diverged
from studies.engine.scheduler import ParetoASHA


def recover(
    ledger: Ledger, searcher: OptunaSearcher, scheduler: ParetoASHA, max_epochs: int
) -> None:
    """Reconcile the parts of an interrupted study; change nothing where they agree.

    A trial that failed is proposed once more: a study is resumed after the cause was fixed. A trial
    that diverged is not, since it would diverge again.
    """
    stopped = set()
    for number, metrics in ledger.reports:
        if not scheduler.replay(number, metrics):
            stopped.add(number)
    for trial in ledger.trials:
        last: Metrics = trial.reports[-1] if trial.reports else {}
        if trial.state is None and (trial.epoch >= max_epochs or trial.number in stopped):
            ledger.end(trial.number, searcher.tell(trial.number, last))
        elif trial.state is None and searcher.is_told(trial.number):
            # Optuna learns an end before the ledger does. Every other end is in the ledger's
            # reports, so this one is a failure.
            ledger.end(trial.number, "failed", "the driver died as this trial failed")
        elif trial.state is not None:
            searcher.tell(trial.number, last, error=trial.state == "failed")
    for number in searcher.failed():
        failed = ledger.get(number)
        if failed is None or not has_diverged(failed.error):
            searcher.propose_again(number)
