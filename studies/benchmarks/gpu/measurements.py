"""Measurements of the suite: what a step costs on a GPU, and what several processes gain.

Ratios are of times that are measured in turns (:mod:`studies.benchmarks.pairs`), so that the load
of the machine affects both. Rows of one part that are not in turns say so.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from batchcam.config import Precision, TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.devices import evaluation_batch
from batchcam.errors import DataError
from batchcam.training.fit import EpochReport, fit
from studies.benchmarks.batches import (
    CROSS_ENTROPY,
    EXTENSIONS,
    LOSSES,
    Bench,
    config,
    peak_bytes,
    random_data,
)
from studies.benchmarks.gpu.card import used_memory
from studies.benchmarks.gpu.checks import FULL_CARD
from studies.benchmarks.gpu.parts import Part, Row, Setup, Skipped
from studies.benchmarks.pairs import median_ratio, synchronize, time_interleaved
from studies.benchmarks.steps import summary
from studies.benchmarks.throughput import Throughput
from studies.benchmarks.throughput import measure as measure_throughput
from studies.benchmarks.time_to_target import TimeToTarget, by_trainer
from studies.planning.probe import probe

BCPL = "BCPL, L1"


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """Return a function that takes a step several times.

    A GPU then computes one step while the host prepares the next, as in training.
    """

    def run() -> None:
        for _ in range(times):
            step()

    return run


def steps(backbone: str, mode: str) -> Part:
    """Return the part that times a step with every loss, over one of cross-entropy, in bf16."""

    def run(setup: Setup) -> Iterator[Row]:
        if setup.quick and (backbone, mode) != ("simple_cnn", "eager"):
            raise Skipped("one model is enough for a quick run")
        recorded = mode.startswith("recorded")
        batch, together = (16, 1) if setup.quick else (128, 10)
        settled = config(backbone, batch, precision="bf16")
        settled = replace(
            settled, compile="compiled" in mode, cuda_graphs=recorded, seed=setup.seed
        )
        bench = Bench.build(settled, setup.device)
        losses = {name: bench.step(loss) for name, loss in {**LOSSES, **EXTENSIONS}.items()}
        seconds = time_interleaved(
            {name: repeated(step, together) for name, step in losses.items()},
            seconds=0.1 if setup.quick else 6,
            min_rounds=2 if setup.quick else 7,
            warm_up=1 if setup.quick else 2,
            seed=setup.seed,
            device=setup.device,
        )
        yield {
            "backbone": backbone,
            "mode": mode,
            "precision": "bf16",
            "batch_size": batch,
            "steps_together": together,
            **summary(seconds, CROSS_ENTROPY),
            # A recording holds its memory between steps too, so that a step's own is not seen.
            "memory_bytes": {}
            if recorded
            else {name: peak_bytes(step, setup.device) for name, step in losses.items()},
        }

    return Part(f"steps: {backbone} {mode}", run, 100)


def trainer(backbone: str) -> Part:
    """Return the part that times epochs of `fit` over bare steps, in bf16.

    Steps are recorded in both, or in neither. An epoch of `fit` includes the first steps, which are
    not recorded, and the recording.
    """

    def run(setup: Setup) -> Iterator[Row]:
        if setup.quick and backbone != "simple_cnn":
            raise Skipped("one model is enough for a quick run")
        for recorded in (False,) if setup.quick else (False, True):
            settings = Throughput(
                out=Path(),
                batch_size=16 if setup.quick else 128,
                steps=2 if setup.quick else {"simple_cnn": 400, "resnet18": 1000}[backbone],
                rounds=2 if setup.quick else 3,
                threads=torch.get_num_threads(),
                plain=False,
                cuda_graphs=recorded,
                device=str(setup.device),
                seed=setup.seed,
            )
            measured = measure_throughput(settings, backbone, "bf16")
            yield {"backbone": backbone, "recorded": recorded, **measured}

    return Part(f"trainer: {backbone}", run, 60)


def _train_for(
    setup: Setup, backbone: str, recorded: bool, seconds: float, barrier: Any, results: Any
) -> None:
    """Train for some seconds in this process, when all processes are ready; put the images."""
    torch.set_num_threads(1)
    batch = 16 if setup.quick else 128
    settled = config(backbone, batch, precision="bf16", recorded=recorded)
    bench = Bench.build(settled, setup.device)
    step = bench.step(LOSSES[BCPL])
    for _ in range(1 if setup.quick else 20):
        step()
    synchronize(setup.device)
    barrier.wait()
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(1 if setup.quick else 10):
            step()
            images += batch
        synchronize(setup.device)
    results.put(images / (time.perf_counter() - started))


def packing(setup: Setup) -> Iterator[Row]:
    """Train in 1, 2, 4 and 8 processes that share the device; sum their images per second."""
    context = multiprocessing.get_context("fork")
    cases = [("simple_cnn", False), ("simple_cnn", True), ("resnet18", False), ("resnet18", True)]
    for backbone, recorded in cases[:1] if setup.quick else cases:
        alone = 0.0
        for count in (1, 2) if setup.quick else (1, 2, 4, 8):
            barrier, results = context.Barrier(count), context.Queue()
            seconds = 0.2 if setup.quick else 1.5
            arguments = (setup, backbone, recorded, seconds, barrier, results)
            processes = [context.Process(target=_train_for, args=arguments) for _ in range(count)]
            for process in processes:
                process.start()
            speeds = [results.get(timeout=60) for _ in processes]
            for process in processes:
                process.join()
            alone = alone or sum(speeds)
            yield {
                "backbone": backbone,
                "recorded": recorded,
                "processes": count,
                "images_per_second": round(sum(speeds), 1),
                "over_one_after_the_other": round(sum(speeds) / alone, 3),
                "slowest_over_fastest": round(min(speeds) / max(speeds), 3),
            }


def _forecast(settled: TrialConfig, prepared: PreparedData, results: Any) -> None:
    found = probe(settled, prepared, torch.get_num_threads())
    results.put(found.peak_bytes)


def _train_once(settled: TrialConfig, prepared: PreparedData, results: Any) -> None:
    before = used_memory()

    def on_epoch(report: EpochReport) -> None:
        del report
        results.put((before, used_memory(), torch.cuda.max_memory_reserved()))

    fit(replace(settled, epochs=1), on_epoch, prepared=prepared)


def forecast(setup: Setup) -> Iterator[Row]:
    """Compare the memory that a trial takes of the card with the forecast of the study's probe."""
    if not setup.cuda or used_memory() is None:
        raise Skipped("the memory of a process on a card is read by nvidia-smi")
    context = multiprocessing.get_context("fork")
    prepared = random_data(1280 if setup.quick else 12_800, num_classes=10, side=28)
    validation = random_data(1024, num_classes=10, side=28, seed=1).dataset.train
    prepared = prepared.with_splits(validation=validation)
    for backbone, batch, recorded in (
        ("simple_cnn", 128, False),
        ("resnet18", 128, False),
        ("resnet18", 128, True),
        ("convnextv2_tiny", 32, False),
    ):
        settled = TrialConfig(
            backbone=backbone,
            batch_size=batch,
            cuda_graphs=recorded,
            precision="bf16",
            lambda_proto=0.1,
            lambda_exchange=0.1,
            metric="ssim",
            device="cuda",
            seed=setup.seed,
        )
        found = []
        for target in (_forecast, _train_once):
            results = context.Queue()
            process = context.Process(target=target, args=(settled, prepared, results))
            process.start()
            found.append(results.get(timeout=60))
            process.join()
        forecast_bytes, (before, after, reserved) = found
        used = after - before
        yield {
            "backbone": backbone,
            "batch_size": batch,
            "recorded": recorded,
            "forecast_bytes": forecast_bytes,
            "used_bytes": used,
            "reserved_bytes": reserved,
            "forecast_over_used": round(forecast_bytes / used, 3),
            "evaluation_batch": evaluation_batch(setup.device),
        }


def batch_sizes(setup: Setup) -> Iterator[Row]:
    """Time steps of SimpleCNN with batches from 128 to 8,192 images, in bf16.

    Sizes are not measured in turns; BCPL and cross-entropy are.
    """
    for batch in (16, 32) if setup.quick else (128, 256, 512, 1024, 2048, 4096, 8192):
        for mode in ("eager",) if setup.quick else ("eager", "recorded"):
            settled = config("simple_cnn", batch, recorded=mode == "recorded", precision="bf16")
            bench = Bench.build(replace(settled, seed=setup.seed), setup.device)
            names = (CROSS_ENTROPY, BCPL)
            seconds = time_interleaved(
                {name: repeated(bench.step(LOSSES[name]), 10) for name in names},
                seconds=0.1 if setup.quick else 1,
                min_rounds=3,
                seed=setup.seed,
                device=setup.device,
            )["wall"]
            ratio = median_ratio(seconds[BCPL], seconds[CROSS_ENTROPY])
            median = sorted(seconds[BCPL])[len(seconds[BCPL]) // 2]
            yield {
                "batch_size": batch,
                "mode": mode,
                "images_per_second": round(10 * batch / median, 1),
                "bcpl_over_cross_entropy": ratio.as_list(),
            }


def kernels(setup: Setup) -> Iterator[Row]:
    """Time recorded steps of BCPL with TF32 and with cuDNN's search for kernels, over without.

    Steps are recorded, so that the host's time does not hide that of the kernels.
    """
    if not setup.cuda:
        raise Skipped("TF32 and cuDNN need CUDA")
    float32 = {
        "no TF32": ("ieee", "ieee", False),
        "TF32 in convolutions (PyTorch's default)": ("ieee", "tf32", False),
        "TF32": ("tf32", "tf32", False),
        "TF32 and search": ("tf32", "tf32", True),
    }
    half = {"no search": ("ieee", "tf32", False), "search": ("ieee", "tf32", True)}
    chosen: tuple[tuple[str, Precision], ...] = (
        ("simple_cnn", "fp32"),
        ("resnet18", "fp32"),
        ("simple_cnn", "bf16"),
        ("resnet18", "bf16"),
    )
    for backbone, precision in chosen:
        bench = Bench.build(config(backbone, 128, precision=precision, recorded=True), setup.device)
        variants = {}
        for name, (matrix, convolution, search) in (
            float32 if precision == "fp32" else half
        ).items():
            torch.backends.cuda.matmul.fp32_precision = matrix
            torch.backends.cudnn.conv.fp32_precision = convolution  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark = search
            variants[name] = repeated(bench.step(LOSSES[BCPL]), 10)
            variants[name]()  # Records the step, with these settings.
        seconds = time_interleaved(
            variants,
            seconds=1 if setup.quick else 3,
            min_rounds=5,
            seed=setup.seed,
            device=setup.device,
        )
        yield {
            "backbone": backbone,
            "precision": precision,
            "batch_size": 128,
            **summary(seconds, next(iter(variants))),
        }


def time_to_target(setup: Setup) -> Iterator[Row]:
    """Train SimpleCNN until 99.3 % accuracy and SSIM 0.95 on MNIST, or as far as digits go.

    The digits are used where the files of MNIST are not found, and have no target.
    """
    settings = TimeToTarget(
        out=Path(),
        epochs=1 if setup.quick else 6,
        device=str(setup.device),
        precision="bf16",
    )
    try:
        if setup.quick:
            raise DataError("a quick run uses the digits")
        prepared = prepare(settings.config())
    except DataError:
        settings = replace(settings, dataset="digits")
        prepared = prepare(settings.config())
    cases = [(False, 0), (True, 0), (True, 1), (True, 2)]
    for recorded, seed in cases[:1] if setup.quick else cases:
        seeded = replace(settings, seed=seed, cuda_graphs=recorded)
        yield {
            "dataset": settings.dataset,
            "recorded": recorded,
            "seed": seed,
            "precision": settings.precision,
            "batch_size": settings.batch_size,
            "most_epochs": settings.epochs,
            **by_trainer(seeded, prepared),
        }


MEASUREMENTS = (
    *(
        steps(backbone, mode)
        for backbone in ("simple_cnn", "resnet18")
        for mode in ("eager", "recorded", "recorded and compiled")
    ),
    Part("packing", packing, 100),
    Part("memory forecast", forecast, 100),
    trainer("simple_cnn"),
    trainer("resnet18"),
    Part("kernels", kernels, 60),
    Part("time to target", time_to_target, 60),
    Part("batch sizes", batch_sizes, 90),
    FULL_CARD,
)
"""Run one after the other."""
