"""Check how the cost of a step is measured, stored and shown; speed itself is not tested."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from batchcam.errors import ConfigError
from studies.benchmarks import steps as steps_module
from studies.benchmarks.batches import (
    CROSS_ENTROPY,
    EXTENSIONS,
    LOSSES,
    Bench,
    config,
    peak_bytes,
    random_data,
)
from studies.benchmarks.pairs import Seconds, median_ratio, time_interleaved
from studies.benchmarks.steps import BCPL, Condition, Steps, conditions, draw, main, table, target

CPU = torch.device("cpu")


def test_rivals_take_turns() -> None:
    ran: list[str] = []

    def rival(name: str) -> Callable[[], None]:
        return lambda: ran.append(name)

    seconds = time_interleaved(
        {name: rival(name) for name in "abc"}, seconds=0, min_rounds=20, warm_up=2, seed=1
    )
    assert len(ran) == 3 * 22
    rounds = [tuple(ran[start : start + 3]) for start in range(0, len(ran), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3
    for times in seconds.values():
        assert {name: len(t) for name, t in times.items()} == {"a": 20, "b": 20, "c": 20}


def test_a_race_lasts_as_long_as_it_may_and_measures_what_it_should() -> None:
    seconds = time_interleaved(
        {"sleep": lambda: time.sleep(0.01), "nothing": lambda: None}, seconds=0.2, min_rounds=2
    )
    assert 2 < len(seconds["wall"]["sleep"]) <= 20
    assert np.median(seconds["wall"]["sleep"]) >= 0.01
    assert np.median(seconds["cpu"]["sleep"]) < 0.005
    with pytest.raises(ValueError, match="min_rounds=0 must be 1 or more"):
        time_interleaved({"nothing": lambda: None}, seconds=1, min_rounds=0)


def test_a_ratio_is_the_median_of_pairs() -> None:
    base = np.array([1.0, 10.0, 2.0, 4.0, 1.0])
    found = median_ratio(base * np.array([1.1, 1.3, 1.2, 1.2, 9.0]), base)
    assert found.median == pytest.approx(1.2)
    assert 1.1 <= found.low <= found.median <= found.high <= 9.0
    same = median_ratio(base, base)
    assert same.as_list() == [1, 1, 1]
    with pytest.raises(ValueError, match="expected two 1-D arrays of the same length"):
        median_ratio(base[:2], base)


def test_a_bench_trains_on_the_loss_that_it_is_given() -> None:
    bench = Bench.build(config("simple_cnn", 8), CPU)
    weights = next(bench.trainer.model.parameters())
    for loss in (*LOSSES.values(), *EXTENSIONS.values()):
        before = weights.detach().clone()
        bench.step(loss)()
        used = {f"lambda_{t.spec.name}": t.weight for t in bench.trainer.step.terms}
        wanted = {n: value for n, value in loss.items() if n.startswith("lambda_")}
        assert used == {"lambda_class": 1.0} | wanted
        assert bench.trainer.step.explainer.name == loss.get("cam", "grad_cam")
        assert (weights != before).any()
    assert len(LOSSES) == 7


def test_noise_has_every_class() -> None:
    prepared = random_data(64, 16, 28)
    assert np.bincount(prepared.dataset.train.labels).tolist() == [4] * 16
    assert prepared.train_prototypes.shape == (16, 28, 28)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> None:
        first = torch.zeros(2**18)
        second = first + 1
        del first
        torch.zeros(2**17).add_(second[: 2**17])

    assert peak_bytes(run, CPU) == pytest.approx(2 * 2**20, rel=1e-3)


def test_cheap_conditions_are_what_is_asked_for(tmp_path: Path) -> None:
    found = list(conditions(Steps(out=tmp_path)))
    assert len(found) == len(set(found)) == 3 * 4 + 2
    large = [one for one in found if one.backbone == "convnextv2_tiny"]
    assert {one.batch_size for one in large} == {32}
    assert all(one.rivals == "losses" for one in large)
    assert {one.batch_size for one in found if one not in large} == {128}
    assert {target(name) for name in LOSSES if name != CROSS_ENTROPY} == {1.02, 1.03, 1.05}


@pytest.mark.parametrize("rivals", ["losses", "extensions", "baselines", "predecessor_model"])
def test_what_is_measured_is_kept(
    tmp_path: Path,
    rivals: steps_module.Rivals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if rivals == "baselines":
        pytest.importorskip("pytorch_grad_cam", reason="the extra `benchmarks` is not installed")
    commit = "a" * 40
    monkeypatch.setattr(steps_module, "git_commit", lambda: commit)
    settings = Steps(
        out=tmp_path,
        backbones=("simple_cnn",),
        modes=("eager",),
        precisions=("fp32",),
        rivals=(rivals,),
        batch_size=4,
        seconds=0,
        min_rounds=2,
        threads=torch.get_num_threads(),
    )
    main(settings)
    text = (tmp_path / "steps.json").read_text()
    (entry,) = json.loads(text)
    base = CROSS_ENTROPY if rivals in ("losses", "extensions") else BCPL
    assert base in entry["milliseconds"]["wall"]
    assert base not in entry["ratios"]["cpu"]
    assert entry["seed"] == 0
    assert entry["git_commit"] == commit
    assert "torch" in entry["versions"]
    lines = (tmp_path / "steps.md").read_text().splitlines()
    assert len(lines) == 2 + len(entry["milliseconds"]["wall"])
    assert len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "steps.png").stat().st_size > 5_000
    capsys.readouterr()

    main(settings)  # The result exists already.
    assert (tmp_path / "steps.json").read_text() == text
    assert not capsys.readouterr().out

    commit = "b" * 40
    monkeypatch.setattr(steps_module, "measure", lambda *_: json.loads(text)[0])
    main(settings)
    (entry,) = json.loads((tmp_path / "steps.json").read_text())
    assert entry["git_commit"] == commit


def test_targets_are_judged_by_the_median() -> None:
    ratios = {name: [1.0, 0.9, 1.1] for name in LOSSES if name != CROSS_ENTROPY}
    ratios["BCPL, L2"] = [1.021, 1.0, 1.1]
    entry = {
        "rivals": "losses",
        "backbone": "simple_cnn",
        "mode": "eager",
        "precision": "fp32",
        "batch_size": 4,
        "threads": 1,
        "milliseconds": {"wall": dict.fromkeys(LOSSES, 5.0)},
        "ratios": {"wall": ratios},
        "memory_bytes": dict.fromkeys(LOSSES, 10),
    }
    lines = table([entry], "wall")
    assert [line.split(" | ")[-2] for line in lines[3:]] == ["yes", "no", *["yes"] * 4]
    assert len(draw([entry], "wall").axes[0].containers) == 6


def test_what_the_machine_lacks_is_refused() -> None:
    wrong = Condition("losses", "simple_cnn", "eager", "fp32", 4, 1, "cuda:99")
    with pytest.raises(ConfigError, match="cuda:99"):
        steps_module.measure(wrong, Steps(out=Path()))


def test_seconds_are_by_clock_and_rival() -> None:
    times = {"cross-entropy": np.array([1.0, 2.0]), "BCPL, L1": np.array([1.5, 2.0])}
    seconds: Seconds = {"wall": times, "cpu": times}
    found = steps_module.summary(seconds, CROSS_ENTROPY)
    assert found["rounds"] == 2
    assert found["milliseconds"]["wall"] == {"cross-entropy": 1500.0, "BCPL, L1": 1750.0}
    assert found["ratios"]["cpu"]["BCPL, L1"][0] == pytest.approx(1.25)
