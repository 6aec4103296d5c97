"""Asynchronous successive halving on several objectives: the algorithm, without Ray.

Schmucker et al. 2021, "Multi-objective Asynchronous Successive Halving", in its stopping form: a
trial is judged as it reaches a rung, by those that came there before it, and goes on or ends.
Resources are epochs; every objective is maximised.
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
    """Decides after each epoch whether a trial goes on.

    Rungs are at `min_epochs * reduction_factor**k`, below `max_epochs`. At a rung, a trial goes on
    if it is among the best `1 / reduction_factor` of all that came there, itself included. Trials
    are ordered by :func:`has_place`; with one objective this is the order of ASHA (Li et al. 2020).
    Places are rounded up, where the papers round them down: they come back to a trial that was left
    behind, while one that was stopped is lost. The first one to arrive thus goes on.

    Bracket `s` leaves out the first `s` rungs. A trial's bracket is a function of `seed` and its
    number alone; the chance of a bracket with `r` rungs is proportional to `exp(r)`.

    Raises:
        ConfigError: a value that cannot work, or more brackets than rungs.
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
        """What is recorded: for each bracket, by the epoch of a rung, its vectors, sorted."""
        return [
            {epoch: sorted(recorded.elements()) for epoch, recorded in rungs.items()}
            for rungs in self._brackets
        ]

    def judge(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        """Return whether a trial goes on after an epoch.

        The answer to the same trial and epoch is always the first one given, and a trial that was
        stopped stays so. At `max_epochs` a trial has ended by itself: True, and nothing is
        recorded. A trial that reports first beyond several rungs is judged at the last of them.

        Args:
            number: of the trial, from 0.
            epoch: epochs that the trial has finished, from 1.
            values: its objectives. One that is not finite stops it, and is not recorded.
        """
        key = (number, epoch)
        if key not in self._decisions:
            going_on = number not in self._stopped and self._judge(
                number, epoch, tuple(float(value) for value in values)
            )
            self._decisions[key] = going_on
            if not going_on:
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
    """Return whether fewer than `places` trials come before `vector`.

    Trials come in the order of their non-dominated fronts. Inside a front they come by spread: the
    best in the first objective, then always the one that is farthest from all before it, each
    objective in units of its range in the front. Equal trials share the place of the first.

    Args:
        recorded: how many trials have each vector; `vector` is one of them.
        vector: the trial in question.
        places: how many trials may come; at least 1.
    """
    # Sorted, so that ties are broken by values and not by who came first.
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
        points: `(N, objectives)`, the first one to start with.
        counts: `(N,)`, the trials at each point.
        places: how many trials may come; at most the sum of `counts`.
    """
    span = np.ptp(points, axis=0)
    # A row per objective: the distances to a point are then sums of rows.
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
