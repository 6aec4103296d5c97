"""Interleaved timing of several functions, and the median of paired ratios of their times.

On a shared machine the absolute time of a step depends on the load, which affects two steps
executed one after the other alike. Each round therefore executes every function once, in random
order. The result is the median over rounds of the ratio within a round.
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
"""Wall time, and CPU time of this process. CPU time is less affected by other processes, but is
meaningful only with one thread, because it includes threads' busy waiting, and not on a GPU."""

Seconds = dict[Clock, dict[str, npt.NDArray[np.float64]]]
"""Seconds of each round, by clock and by name of the timed function."""


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Return `[median, low, high]`, rounded to 4 decimals."""
        return [round(value, 4) for value in (self.median, self.low, self.high)]


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    min_rounds: int = 5,
    warm_up: int = 2,
    seed: int = 0,
    device: torch.device | None = None,
) -> Seconds:
    """Execute functions in rounds and return the seconds of each function in each round.

    Starts no new round after `seconds`, but completes at least `min_rounds`.

    Args:
        functions: functions to time, by name.
        seconds: time limit, warm-up excluded.
        min_rounds: rounds to complete even if they exceed the limit.
        warm_up: rounds that are not timed, in which caches, allocators and compilers settle.
        seed: of the order within each round.
        device: synchronised before a clock is read, if it is asynchronous.

    Raises:
        ValueError: `min_rounds` is less than 1.
    """
    if min_rounds < 1:
        raise ValueError(f"min_rounds={min_rounds} must be 1 or more.")
    order = list(functions)
    shuffle = random.Random(seed).shuffle
    measured: dict[Clock, dict[str, list[float]]] = {
        clock: {name: [] for name in functions} for clock in CLOCKS
    }
    for _ in range(warm_up):
        for run in functions.values():
            run()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            synchronize(device)
            started = {clock: now() for clock, now in CLOCKS.items()}
            functions[name]()
            synchronize(device)
            for clock, now in CLOCKS.items():
                measured[clock][name].append(now() - started[clock])
        rounds += 1
    return {
        clock: {name: np.array(values) for name, values in times.items()}
        for clock, times in measured.items()
    }


def median_ratio(
    times: npt.NDArray[np.float64], base: npt.NDArray[np.float64], seed: int = 0
) -> Interval:
    """Return the median over rounds of `times / base`, with its 95 % bootstrap interval.

    Args:
        times: seconds `(rounds,)`.
        base: seconds `(rounds,)` of the baseline in the same rounds.
        seed: of the bootstrap.

    Raises:
        ValueError: the arrays are not 1-D of the same length.
    """
    if times.shape != base.shape or times.ndim != 1:
        raise ValueError(
            f"expected two 1-D arrays of the same length, got shapes {times.shape} and "
            f"{base.shape}."
        )
    ratios = times / base
    drawn = np.random.default_rng(seed).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Interval(float(np.median(ratios)), float(low), float(high))


def synchronize(device: torch.device | None) -> None:
    """Wait until a CUDA device has completed its queued work; do nothing for other devices."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of `run` in seconds, including its asynchronous work on `device`."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started
