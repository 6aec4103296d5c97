"""Asynchronous successive halving on several objectives: the algorithm, without Ray.

Schmucker et al. 2021, "Multi-objective Asynchronous Successive Halving", in its stopping form: a
trial is judged when it reaches a rung, against the trials that reached it before, and continues or
ends. Resources are epochs. Every objective is maximised; the caller negates those to be minimised.
"""

import math
from collections import Counter
from collections.abc import Sequence

import moocore
import numpy as np
import numpy.typing as npt

from batchcam.errors import ConfigError

Vector = tuple[float, ...]
"""A trial's objectives at a rung."""


class ParetoHalving:
    """Decides after each epoch whether a trial continues.

    Rungs are at `min_epochs * reduction_factor**k`, below `max_epochs`. At a rung, a trial
    continues if it is among the best `1 / reduction_factor` of all trials that reached the rung,
    itself included. Trials are ordered by :func:`has_place`; with one objective this is the order
    of ASHA (Li et al. 2020). The number of places is rounded up, where the papers round it down:
    they can promote a paused trial later, while a stopped trial is lost. The first trial at a rung
    thus continues.

    Bracket `s` omits the first `s` rungs. A trial's bracket depends on `seed` and its number only;
    the chance of a bracket with `r` rungs is proportional to `exp(r)`.

    Raises:
        ConfigError: a value is too small, or there are more brackets than rungs.

    Example:
        >>> halving = ParetoHalving(min_epochs=2, max_epochs=8)
        >>> halving.judge(number=0, epoch=2, values=(0.9, 0.1))  # The first at the rung continues.
        True
        >>> halving.judge(number=1, epoch=2, values=(0.8, 0.0))  # Dominated by trial 0.
        False
    """

    def __init__(
        self,
        *,
        min_epochs: int,
        max_epochs: int,
        reduction_factor: int = 2,
        brackets: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("min_epochs", min_epochs, 1),
            ("max_epochs", max_epochs, 1),
            ("reduction_factor", reduction_factor, 2),
            ("brackets", brackets, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value} must be at least {least}.")
        epochs: list[int] = []
        while (epoch := min_epochs * reduction_factor ** len(epochs)) < max_epochs:
            epochs.append(epoch)
        if brackets > max(1, len(epochs)):
            raise ConfigError(
                f"brackets={brackets} are more than the {len(epochs)} rungs between epochs "
                f"{min_epochs} and {max_epochs}; name fewer."
            )
        self._max_epochs = max_epochs
        self._reduction_factor = reduction_factor
        self._seed = seed
        self._brackets = [
            {epoch: Counter[Vector]() for epoch in epochs[skipped:]} for skipped in range(brackets)
        ]
        sizes = np.array([len(rungs) for rungs in self._brackets])
        self._shares = np.cumsum(np.exp(sizes - sizes.max()))
        self._decisions: dict[tuple[int, int], bool] = {}
        self._passed: dict[int, int] = {}
        self._stopped: set[int] = set()

    def bracket(self, number: int) -> int:
        """Return the bracket of trial `number`, from 0."""
        drawn = np.random.default_rng((self._seed, number)).random() * self._shares[-1]
        return int(np.searchsorted(self._shares, drawn, side="right"))

    @property
    def rungs(self) -> list[dict[int, list[Vector]]]:
        """For each bracket, by the epoch of a rung, the recorded vectors, sorted."""
        return [
            {epoch: sorted(recorded.elements()) for epoch, recorded in rungs.items()}
            for rungs in self._brackets
        ]

    def judge(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        """Return whether a trial continues after an epoch.

        The answer for the same trial and epoch is always the first one given, and a stopped trial
        stays stopped. At `max_epochs` a trial ends by itself: the answer is True, and nothing is
        recorded. A trial whose first report is beyond several rungs is judged at the last of them.

        Args:
            number: the trial's number, from 0.
            epoch: epochs that the trial has finished, from 1.
            values: its objectives, all maximised. A value that is not finite stops the trial, and
                the vector is not recorded.
        """
        key = (number, epoch)
        if key not in self._decisions:
            continues = number not in self._stopped and self._judge(
                number, epoch, tuple(float(value) for value in values)
            )
            self._decisions[key] = continues
            if not continues:
                self._stopped.add(number)
        return self._decisions[key]

    def _judge(self, number: int, epoch: int, vector: Vector) -> bool:
        if not all(map(math.isfinite, vector)):
            return False
        if epoch >= self._max_epochs:
            return True
        rungs = self._brackets[self.bracket(number)]
        reached = max((rung for rung in rungs if rung <= epoch), default=0)
        if reached <= self._passed.get(number, 0):
            return True
        self._passed[number] = reached
        recorded = rungs[reached]
        recorded[vector] += 1
        places = math.ceil(recorded.total() / self._reduction_factor)
        return has_place(recorded, vector, places)


def has_place(recorded: Counter[Vector], vector: Vector, places: int) -> bool:
    """Return whether fewer than `places` trials rank before `vector`.

    Trials rank by their non-dominated fronts. Within a front they rank by spread: first the best in
    the first objective, then repeatedly the trial farthest from all ranked ones, each objective in
    units of its range in the front. Equal trials share the rank of the first.

    Args:
        recorded: the number of trials with each vector; `vector` is one of them.
        vector: the objectives of the trial to rank.
        places: the number of trials that may continue; at least 1.
    """
    # Sorted, so that ties are broken by values and not by the order of arrival.
    vectors = sorted(recorded, reverse=True)
    counts = np.array([recorded[each] for each in vectors])
    points = np.array(vectors)
    own = vectors.index(vector)
    ranks = moocore.pareto_rank(points, maximise=True)
    before = int(counts[ranks < ranks[own]].sum())
    front = np.flatnonzero(ranks == ranks[own])
    if before >= places:
        return False
    if before + counts[front].sum() - counts[own] < places:
        return True
    return own in front[_spread(points[front], counts[front], places - before)]


def _spread(
    points: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], places: int
) -> list[int]:
    """Return the indices of a front's first points by spread, until they fill `places`.

    Args:
        points: `(N, objectives)`; the first one is taken first.
        counts: `(N,)`, the trials at each point.
        places: the number of trials to take; at most the sum of `counts`.
    """
    span = np.ptp(points, axis=0)
    # One row per objective: distances to a point are then sums of rows.
    scaled = (points / np.where(span > 0, span, 1)).T.copy()
    chosen = [0]
    nearest = np.full(len(points), np.inf)
    filled = counts[0]
    while filled < places:
        difference = scaled - scaled[:, chosen[-1], None]
        nearest = np.minimum(nearest, np.square(difference).sum(axis=0))
        chosen.append(int(nearest.argmax()))
        filled += counts[chosen[-1]]
    return chosen
