"""Compare early-stopping methods on recorded learning curves: quality lost and epochs saved.

python -m studies.benchmarks.early_stopping --curves results/early_stopping/curves.csv.gz

Needs the extra `benchmarks`.

Replays a study from recorded curves. Workers take trials in a seeded order, each epoch takes its
recorded time, and the method decides on each report when it arrives. After each epoch the
hypervolume of the last reports of all trials is computed: these are the models that the study could
export.
"""

import csv
import gzip
import heapq
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from ray.tune.schedulers import AsyncHyperBandScheduler

from batchcam.provenance import git_commit, package_versions
from studies.engine.halving import ParetoHalving, Vector

OBJECTIVES = ("val_accuracy", "cam_ssim")
"""Both are maximised; single-objective methods use the first one."""

CHANCE = 0.1
"""Accuracy of guessing among ten classes."""

Array = npt.NDArray[np.float64]
Judge = Callable[[int, int, Vector], bool]
"""`(number, epoch, objectives)` of a report -> whether the trial continues."""

Method = Callable[["Rules"], Judge]
"""Returns the decision function of a new study with these settings."""


@dataclass(frozen=True)
class Curve:
    """A trial trained without early stopping: objectives `(epochs, 2)` and seconds `(epochs,)`."""

    values: Array
    seconds: Array


@dataclass(frozen=True)
class Report:
    """The report of a trial after an epoch, and whether the trial continued."""

    number: int
    epoch: int
    values: Vector
    continued: bool


@dataclass(frozen=True)
class Rules:
    """Settings shared by all methods."""

    max_epochs: int
    min_epochs: int = 1
    reduction_factor: int = 2


def read_curves(path: Path) -> dict[int, Curve]:
    """Return the curves written by `studies.benchmarks.record_curves`, by trial number.

    Trials that diverged before the last epoch are left out.
    """
    by_number: dict[int, list[dict[str, str]]] = {}
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            by_number.setdefault(int(row["number"]), []).append(row)
    longest = max(len(rows) for rows in by_number.values())
    return {
        number: Curve(
            np.array([[float(row[name]) for name in OBJECTIVES] for row in rows]),
            np.array([float(row["seconds"]) for row in rows]),
        )
        for number, rows in by_number.items()
        if len(rows) == longest
    }


def simulate(
    curves: Mapping[int, Curve], order: Sequence[int], judge: Judge, workers: int = 4
) -> list[Report]:
    """Simulate a study of the trials in `order`; return its reports in chronological order."""
    pending = iter(order)
    running: list[tuple[float, int, int]] = []

    def start(now: float) -> None:
        if (number := next(pending, None)) is not None:
            heapq.heappush(running, (now + curves[number].seconds[0], number, 1))

    for _ in range(workers):
        start(0.0)
    reports = []
    while running:
        now, number, epoch = heapq.heappop(running)
        curve = curves[number]
        values = tuple(curve.values[epoch - 1].tolist())
        continued = judge(number, epoch, values)
        reports.append(Report(number, epoch, values, continued))
        if continued and epoch < len(curve.values):
            heapq.heappush(running, (now + curve.seconds[epoch], number, epoch + 1))
        else:
            start(now)
    return reports


def hypervolumes(reports: Sequence[Report], reference: Sequence[float]) -> Array:
    """Return the hypervolume of all trials' last reports after each report, `(reports,)`."""
    last: dict[int, Vector] = {}
    volumes = []
    for report in reports:
        last[report.number] = report.values
        volumes.append(moocore.hypervolume(list(last.values()), ref=reference, maximise=True))
    return np.array(volumes)


def epochs_to_reach(trace: Array, level: float) -> float:
    """Return the epochs after which `trace` stays at or above `level`; inf if it never does."""
    below = np.flatnonzero(trace < level)
    if len(below) == 0:
        return 1.0
    return float(below[-1] + 2) if below[-1] + 1 < len(trace) else float("inf")


def random_search(rules: Rules) -> Judge:
    """Return a decision function that never stops a trial."""
    del rules
    return lambda number, epoch, values: True  # noqa: ARG005


def asha(rules: Rules) -> Judge:
    """Return ASHA on the first objective, by our implementation of successive halving."""
    halving = _halving(rules)
    return lambda number, epoch, values: halving.judge(number, epoch, values[:1])


def pareto_asha(rules: Rules) -> Judge:
    """Return the early stopping that studies use, on all objectives."""
    return _halving(rules).judge


def _halving(rules: Rules) -> ParetoHalving:
    return ParetoHalving(
        min_epochs=rules.min_epochs,
        max_epochs=rules.max_epochs,
        reduction_factor=rules.reduction_factor,
    )


def ray_asha(rules: Rules) -> Judge:
    """Return Ray's AsyncHyperBandScheduler on the first objective."""
    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=OBJECTIVES[0],
        mode="max",
        max_t=rules.max_epochs,
        grace_period=rules.min_epochs,
        reduction_factor=rules.reduction_factor,
    )
    return _judge_by_scheduler(scheduler, lambda trial, result: (None, trial, result))


def syne_tune_moasha(rules: Rules) -> Judge:
    """Return Syne Tune's MOASHA, unchanged; needs the extra `benchmarks`."""
    return _syne_tune(rules, None)


def syne_tune_corrected(rules: Rules) -> Judge:
    """Return Syne Tune's MOASHA with the rank of each trial as its priority.

    Uses Syne Tune's Pareto fronts and its order within each front. Syne Tune returns the sorted
    order (argsort) where MOASHA expects ranks; see results/early_stopping.
    """
    module = importlib.import_module(
        "syne_tune.optimizer.schedulers.multiobjective.non_dominated_priority"
    )

    def rank(objectives: Array) -> npt.NDArray[np.int64]:
        ranks = np.empty(len(objectives), dtype=np.int64)
        rest = np.arange(len(objectives))
        while len(rest):
            front = module.pareto_efficient(objectives[rest])
            start = len(objectives) - len(rest)
            ranks[rest[front]] = start + module.compute_epsilon_net(objectives[rest[front]], dim=0)
            rest = rest[~front]
        return ranks

    return _syne_tune(rules, rank)


def _syne_tune(rules: Rules, priority: Callable[[Array], Any] | None) -> Judge:
    module = importlib.import_module("syne_tune.optimizer.schedulers.multiobjective.moasha")
    scheduler = module.MOASHA(
        {},
        list(OBJECTIVES),
        do_minimize=False,
        time_attr="epoch",
        multiobjective_priority=priority,
        max_t=rules.max_epochs,
        grace_period=rules.min_epochs,
        reduction_factor=rules.reduction_factor,
        random_seed=0,
    )
    return _judge_by_scheduler(scheduler, lambda trial, result: (trial, result))


def _judge_by_scheduler(
    scheduler: Any, arguments: Callable[[Any, dict[str, float]], tuple[Any, ...]]
) -> Judge:
    """Return the decision function of another library's scheduler.

    A trial is added to the scheduler when it first reports.

    Args:
        scheduler: has `on_trial_add` and `on_trial_result`.
        arguments: of `on_trial_result`, from a trial and its result; those of `on_trial_add` are
            the same without the last one.
    """
    trials: dict[int, Any] = {}

    def judge(number: int, epoch: int, values: Vector) -> bool:
        result = {"epoch": epoch, **dict(zip(OBJECTIVES, values, strict=True))}
        if number not in trials:
            trials[number] = SimpleNamespace(trial_id=number)
            scheduler.on_trial_add(*arguments(trials[number], result)[:-1])
        return bool(scheduler.on_trial_result(*arguments(trials[number], result)) == "CONTINUE")

    return judge


METHODS: Mapping[str, Method] = {
    "random search": random_search,
    "ASHA on accuracy": asha,
    "Ray's ASHA on accuracy": ray_asha,
    "ParetoASHA": pareto_asha,
    "Syne Tune's MOASHA": syne_tune_moasha,
    "Syne Tune's MOASHA, mended": syne_tune_corrected,
}
"""The compared methods, by their names in summary.json."""


def orders(numbers: Sequence[int], count: int) -> Iterator[list[int]]:
    """Yield `count` random permutations of the trials; the seed of each is its index."""
    for seed in range(count):
        yield np.random.default_rng(seed).permutation(numbers).tolist()


def references(curves: Mapping[int, Curve]) -> dict[str, tuple[float, ...]]:
    """Return the reference points of the hypervolume, a lenient and a strict one.

    The lenient one is an untrained model: a single good trial attains most of the hypervolume. The
    strict one is the median of the trials' final values, per objective: only trials that are better
    than it in both objectives add hypervolume.
    """
    ends = np.array([curve.values[-1] for curve in curves.values()])
    return {
        "a model that knows nothing": (CHANCE, 0.0),
        "the median trial": tuple(np.median(ends, axis=0).tolist()),
    }


@dataclass(frozen=True)
class Comparison:
    """A method compared with random search, for one order of the trials.

    Attributes:
        trace: hypervolume after each epoch of the method, relative to random search's final one.
        budget: the epochs that random search needs.
    """

    trace: Array
    budget: int

    @property
    def at_a_third(self) -> float:
        """The relative hypervolume after a third of the budget, or at the end if it is earlier."""
        return float(self.trace[min(self.budget // 3, len(self.trace)) - 1])

    def share_to_reach(self, level: float) -> float:
        """Return the epochs after which the trace stays at or above `level`, over `budget`."""
        # The tolerance: the last digits of a hypervolume depend on the order of the points.
        return epochs_to_reach(self.trace, level - 1e-9) / self.budget


def compare(
    curves: Mapping[int, Curve],
    order: Sequence[int],
    reports: Sequence[Report],
    reference: Sequence[float],
    baseline_trials: int,
) -> Comparison:
    """Compare a simulated study with random search over the first `baseline_trials` trials.

    Args:
        curves: of all trials.
        order: in which both take the trials.
        reports: of the simulated study.
        reference: reference point of the hypervolume.
        baseline_trials: number of trials that random search trains.
    """
    ends = np.array([curves[number].values[-1] for number in order[:baseline_trials]])
    baseline = moocore.hypervolume(ends, ref=reference, maximise=True)
    budget = baseline_trials * len(curves[order[0]].values)
    return Comparison(hypervolumes(reports, reference) / baseline, budget)


def foresight(curves: Mapping[int, Curve]) -> dict[str, list[float]]:
    """Return Spearman's correlation of each epoch's values with the last epoch's, by objective."""
    values = np.array([curve.values for curve in curves.values()])
    return {
        name: pd.DataFrame(values[:, :, index]).rank().corr().iloc[-1].round(3).tolist()
        for index, name in enumerate(OBJECTIVES)
    }


def agreement(
    curves: Mapping[int, Curve],
    order: Sequence[int],
    rules: Rules,
    leader: Method,
    other: Method,
) -> list[tuple[bool, bool]]:
    """Return the decisions `(leader, other)` on each report at a rung.

    `leader` decides which trials of the study continue; `other` sees the same reports, and its
    decisions have no effect.
    """
    rungs = set()
    rung = rules.min_epochs
    while rung < rules.max_epochs:
        rungs.add(rung)
        rung *= rules.reduction_factor
    other_judge = other(rules)
    return [
        (report.continued, other_judge(report.number, report.epoch, report.values))
        for report in simulate(curves, order, leader(rules))
        if report.epoch in rungs
    ]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Compare early-stopping methods on recorded learning curves."""

    curves: Path = Path("results/early_stopping/curves.csv.gz")
    """Curves written by `studies.benchmarks.record_curves`."""
    out: Path = Path("results/early_stopping")
    """Output folder for summary.json and hypervolume.png."""
    orders: int = 20
    """Number of permutations of the trials, with seeds from 0."""
    workers: int = 4
    """Concurrent trials."""
    min_epochs: int = 2
    """First rung of the main comparison; other values are compared as well."""
    reduction_factor: int = 2
    """Reduction factor of the main comparison; other values are compared as well."""


def main() -> None:
    """Run the comparison that the command line requests; write summary.json and the figure."""
    benchmark = tyro.cli(Benchmark)
    curves = read_curves(benchmark.curves)
    rules = Rules(
        max_epochs=len(next(iter(curves.values())).values),
        min_epochs=benchmark.min_epochs,
        reduction_factor=benchmark.reduction_factor,
    )
    permutations = list(orders(list(curves), benchmark.orders))
    points = references(curves)

    def studies(method: Method, rules: Rules) -> list[list[Report]]:
        return [simulate(curves, order, method(rules), benchmark.workers) for order in permutations]

    same_rules = {name: studies(method, rules) for name, method in METHODS.items()}
    other_rules = {
        f"{name}, reduction factor {factor}, first rung {rung}": studies(
            METHODS[name], Rules(rules.max_epochs, rung, factor)
        )
        for factor in (2, 3, 4)
        for rung in (1, 2, 4)
        for name in ("ParetoASHA", "ASHA on accuracy")
    }
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "studies.benchmarks.early_stopping", *sys.argv[1:]]),
        "commit": git_commit(),
        "versions": package_versions("ray", "moocore", "syne-tune"),
        "trials": len(curves),
        "epochs": rules.max_epochs,
        "references": points,
        "correlation with the last epoch": foresight(curves),
    }
    main_comparisons: dict[str, dict[str, list[Comparison]]] = {}
    for point, reference in points.items():
        comparisons = {}
        for title, simulated, baseline_trials in (
            ("same trials", same_rules, len(curves)),
            ("random search on a third of the trials", same_rules, len(curves) // 3),
            ("other rungs", other_rules, len(curves)),
        ):
            comparisons[title] = {
                name: [
                    compare(curves, order, reports, reference, baseline_trials)
                    for order, reports in zip(permutations, reports_by_order, strict=True)
                ]
                for name, reports_by_order in simulated.items()
            }
        main_comparisons[point] = comparisons["same trials"]
        summary[f"above {point}"] = {
            title: {name: outcome(of_orders) for name, of_orders in by_name.items()}
            for title, by_name in comparisons.items()
        }
    summary["decisions at rungs"] = {
        f"{first} and {second}": agreements(
            [
                agreement(curves, order, rules, METHODS[first], METHODS[second])
                for order in permutations
            ]
        )
        for first, second in (
            ("ASHA on accuracy", "Ray's ASHA on accuracy"),
            ("ParetoASHA", "Syne Tune's MOASHA"),
            ("ParetoASHA", "Syne Tune's MOASHA, mended"),
        )
    }
    benchmark.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2) + "\n"
    (benchmark.out / "summary.json").write_text(text, encoding="utf-8")
    draw(main_comparisons, benchmark.out / "hypervolume.png")


def outcome(comparisons: Sequence[Comparison]) -> dict[str, list[float | None]]:
    """Return `[minimum, median, maximum]` over the orders of each quantity.

    All quantities are relative to random search. For an even number of orders the median is the
    worse of the two middle values. None means that a level was never reached.

    Returns:
        `spent`: epochs of the study. `reached`: final hypervolume. `at_a_third`: hypervolume after
        a third of random search's epochs. `to_98`, `to_99`, `to_100`: epochs until the hypervolume
        stays at or above that percentage of random search's.
    """
    quantities = {
        "spent": [len(comparison.trace) / comparison.budget for comparison in comparisons],
        "reached": [float(comparison.trace[-1]) for comparison in comparisons],
        "at_a_third": [comparison.at_a_third for comparison in comparisons],
    }
    for percent in (98, 99, 100):
        quantities[f"to_{percent}"] = [
            comparison.share_to_reach(percent / 100) for comparison in comparisons
        ]
    gains = ("reached", "at_a_third")
    return {
        name: [
            round(float(value), 4) if np.isfinite(value) else None
            for value in np.quantile(
                values, (0, 0.5, 1), method="lower" if name in gains else "higher"
            )
        ]
        for name, values in quantities.items()
    }


def agreements(decisions: Sequence[Sequence[tuple[bool, bool]]]) -> dict[str, int]:
    """Count the pairs of decisions over all orders: all, equal ones, and those that differ."""
    pairs = [pair for of_order in decisions for pair in of_order]
    return {
        "decisions": len(pairs),
        "same": sum(first == second for first, second in pairs),
        "only the first goes on": sum(first and not second for first, second in pairs),
        "only the second goes on": sum(second and not first for first, second in pairs),
    }


def draw(comparisons: Mapping[str, Mapping[str, Sequence[Comparison]]], path: Path) -> None:
    """Draw the median hypervolume over epochs spent, one panel per reference point.

    Args:
        comparisons: of each order, by reference point and method.
        path: of the PNG file.
    """
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (point, methods) in zip(
        figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons.items(), strict=True
    ):
        ends = []
        for index, (name, of_orders) in enumerate(methods.items()):
            traces = [comparison.trace for comparison in of_orders]
            lengths = [len(trace) for trace in traces]
            padded = [
                np.pad(trace, (0, max(lengths) - len(trace)), mode="edge") for trace in traces
            ]
            median = np.median(padded, axis=0)[: int(np.median(lengths))]
            spent = np.arange(1, len(median) + 1) / of_orders[0].budget
            color, width = f"C{index}", 2.5 if name == "ParetoASHA" else 1.3
            axes.plot(spent, median, color=color, linewidth=width, label=name)
            axes.plot(spent[-1], median[-1], marker="o", color=color)
            ends.append(median[-1])
        # Cut off the steep rise of the first epochs, so that differences at the end are visible.
        bottom = 1 - 3 * (1 - min(ends))
        axes.axvline(1 / 3, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(
            title=f"above {point}",
            xlabel="epochs spent, of random search's",
            xlim=(0, 1.02),
            ylim=(max(0.0, bottom), 1 + 0.03 * (1 - max(0.0, bottom))),
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("hypervolume, of random search's last")
    figure.axes[-1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
