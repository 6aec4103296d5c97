"""Rivals timed in turns, in one process, and what one costs over another.

On a machine that others use too, the time of a step says little; the ratio of two steps done one
after the other says much. So each round runs every rival once, in an order of its own, and what is
reported is the median over rounds of the ratio within a round.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Clock = str
CLOCKS: dict[Clock, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
}
"""Seconds as they pass, and those that this process had a CPU: less disturbed by other processes,
but only with one thread, since threads that wait for each other count too, and not on a GPU."""

Seconds = dict[Clock, dict[str, npt.NDArray[np.float64]]]
"""By clock and rival: the seconds of each round."""


@dataclass(frozen=True)
class Interval:
    """A median, and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Return the three, rounded to what can be meant."""
        return [round(value, 4) for value in (self.median, self.low, self.high)]


def race(
    rivals: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    min_rounds: int = 5,
    warm_up: int = 2,
    seed: int = 0,
    device: torch.device | None = None,
) -> Seconds:
    """Run rivals in turns for about so many seconds, but some rounds at least.

    Args:
        rivals: by name, what to run.
        seconds: the budget; warm-up is not part of it.
        min_rounds: rounds that are run even if the budget does not suffice.
        warm_up: rounds that are not timed: caches, allocators and compilers settle.
        seed: of the order within each round.
        device: what to wait for before a clock is read, if it works asynchronously.

    Raises:
        ValueError: there is no round to measure.
    """
    if min_rounds < 1:
        raise ValueError(f"min_rounds={min_rounds} must be 1 or more.")
    order = list(rivals)
    shuffle = random.Random(seed).shuffle
    found: dict[Clock, dict[str, list[float]]] = {
        clock: {name: [] for name in rivals} for clock in CLOCKS
    }
    for _ in range(warm_up):
        for run in rivals.values():
            run()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            wait_for(device)
            began = {clock: now() for clock, now in CLOCKS.items()}
            rivals[name]()
            wait_for(device)
            for clock, now in CLOCKS.items():
                found[clock][name].append(now() - began[clock])
        rounds += 1
    return {
        clock: {name: np.array(values) for name, values in times.items()}
        for clock, times in found.items()
    }


def median_ratio(
    times: npt.NDArray[np.float64], base: npt.NDArray[np.float64], seed: int = 0
) -> Interval:
    """Return the median of `times / base`, round by round, with its interval.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if times.shape != base.shape or times.ndim != 1:
        raise ValueError(f"expected pairs, got {times.shape} and {base.shape} rounds.")
    ratios = times / base
    drawn = np.random.default_rng(seed).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Interval(float(np.median(ratios)), float(low), float(high))


def wait_for(device: torch.device | None) -> None:
    """Wait until a device that works asynchronously has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run, waited for."""
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - began
