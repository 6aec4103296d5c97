"""Early stopping: which trials are not worth going on with."""

from ray.tune.schedulers import AsyncHyperBandScheduler


def make_scheduler(objective: str, min_epochs: int, max_epochs: int) -> AsyncHyperBandScheduler:
    """Return asynchronous successive halving (ASHA, Li et al. 2020) on one objective.

    At `min_epochs`, and at each doubling of it, a trial goes on only if it is among the better half
    of those that came as far. Epochs are counted by the trial itself: Ray's own iterations start
    anew after a restart.
    """
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=objective,
        mode="max",
        grace_period=min(min_epochs, max_epochs),
        max_t=max_epochs,
        reduction_factor=2,
    )
