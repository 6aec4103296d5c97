"""Checks of the suite: the trainer computes on a GPU what it computes on a CPU.

A row of a check has `passed`, the value `found`, and the `tolerance` it is compared with.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchcam.config import METRICS, Cam, Precision, TrialConfig
from batchcam.data.dataset import load_data
from batchcam.data.decoys import paint_decoys
from batchcam.data.prepared import PreparedData, with_prototypes
from batchcam.data.preprocessing import batches
from batchcam.devices import is_out_of_memory
from batchcam.errors import first_line
from batchcam.export.bundle import load, save_bundle
from batchcam.losses import TERMS
from batchcam.losses.cross_entropy import CROSS_ENTROPY
from batchcam.training.evaluate import Evaluator
from batchcam.training.fit import Trainer, fit
from studies.benchmarks.gpu.parts import Part, Row, Setup, Skipped

STEPS = 20
"""Steps of a comparison with the CPU."""


KINDS = ("fp32", "fp32, TF32", "bf16", "fp16")
"""Precisions. TF32 and fp16 round to 11 bits, bf16 to 8, fp32 to 24."""

EXACT = {"gradient": 1e-2, "losses": 0.02}
"""Tolerances of fp32, set before the first run on a GPU: the difference of the first gradient, by
its norm, and the largest relative difference of a loss in twenty steps. Two implementations of
convolution on one CPU differ by up to 3e-3 and 2e-3: values near the threshold of a ReLU dominate
the gradient's difference, and training amplifies that of the losses."""

ROUNDED = 2.0
"""Tolerance of the other precisions, in units of what bf16 on the CPU differs from fp32 there."""


def losses_of_terms() -> dict[str, dict[str, Any]]:
    """Return the loss of each check by its name, as fields of TrialConfig: every term by itself.

    A term that compares CAMs is checked by each metric, and by HiResCAM.
    """
    losses: dict[str, dict[str, Any]] = {CROSS_ENTROPY.title: {}}
    for name, spec in TERMS.items():
        if spec is CROSS_ENTROPY:
            continue
        weight = {f"lambda_{name}": 0.5}
        if not spec.compares_cams:
            losses[spec.title] = weight
            continue
        for metric in METRICS:
            losses[f"{spec.title}, {metric.upper()}"] = {**weight, "metric": metric}
        losses[f"{spec.title}, HiResCAM"] = {**weight, "cam": "hires_cam"}
    return losses


def exact_float32() -> None:
    """Compute products of float32 in float32, for this process: without TF32."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def digits(images: int) -> PreparedData:
    """Return the digits with a decoy in each training image, which RRR needs."""
    data = load_data(TrialConfig(dataset="digits"))
    generator = np.random.default_rng(0)
    few = data.train.take(np.arange(min(images, len(data.train))))
    train = paint_decoys(few, few.labels, generator)
    return with_prototypes(replace(data, train=train), TrialConfig(dataset="digits"))


@dataclass(frozen=True)
class Trajectory:
    """What training steps gave: losses `(steps, losses)`, and the first gradient, on the CPU."""

    losses: Tensor
    gradient: Tensor


def train(
    config: TrialConfig, prepared: PreparedData, device: torch.device, steps: int
) -> Trajectory:
    """Take seeded steps on a device. Weights and batches do not depend on the device."""
    torch.manual_seed(config.seed)
    trainer = Trainer(config, prepared, device)
    trainer.model.train()
    generator = torch.Generator().manual_seed(config.seed)
    count = len(trainer.train)
    order = [torch.randperm(count, generator=generator)[: config.batch_size] for _ in range(steps)]
    if config.precision == "fp16":
        _settle_scale(trainer, order[0].to(device))
    losses, gradient = list[Tensor](), torch.empty(0)
    for step, chosen_N in enumerate(order):
        losses.append(trainer.gradients(chosen_N.to(device)).clone())
        trainer.step.advance()
        if step == 0:
            gradient = _gradient(trainer)
    return Trajectory(torch.stack(losses).cpu(), gradient)


def _settle_scale(trainer: Trainer, chosen_N: Tensor) -> None:
    """Lower the scale of fp16's gradients until a step does not overflow; undo the steps.

    PyTorch starts with a scale of 65,536, and leaves out the steps in which a gradient overflows.
    """
    before = _copied(trainer.step.state_dict())
    for _ in range(20):
        trainer.gradients(chosen_N)
        trainer.step.advance()
    trainer.step.load_state_dict({**before, "scaler": trainer.step.state_dict()["scaler"]})


def _gradient(trainer: Trainer) -> Tensor:
    """Return the gradient as one vector of unit length, for fp16 scales it."""
    parts = [
        parameter.grad.detach().flatten().double().cpu()
        for parameter in trainer.model.parameters()
        if parameter.grad is not None
    ]
    together = torch.cat(parts)
    return torch.nn.functional.normalize(together, dim=0)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the largest `|found - wanted| / |wanted|`; values below 1e-6 count as 1e-6."""
    return float(((found - wanted).abs() / wanted.abs().clamp(min=1e-6)).max())


def differences(found: Trajectory, wanted: Trajectory) -> dict[str, float]:
    """Return how far apart two trajectories are: their first gradients, and their losses."""
    values = {
        "gradient": float((found.gradient - wanted.gradient).norm()),
        "losses": relative(found.losses, wanted.losses),
    }
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def against_cpu(
    setup: Setup, backbone: str, losses: Mapping[str, Mapping[str, Any]], kinds: tuple[str, ...]
) -> Iterator[Row]:
    """Compare seeded steps with the same steps on the CPU in fp32.

    fp32 has tolerances of its own. For the other precisions, steps in bf16 on the CPU tell how far
    rounding alone takes them from fp32.
    """
    steps = 3 if setup.quick else STEPS
    prepared = digits(256)
    if setup.quick:
        losses = dict(list(losses.items())[:2])
    for name, fields in losses.items():
        config = TrialConfig(
            **{"lambda_batch": 0.0, **fields},
            backbone=backbone,
            batch_size=32,
            learning_rate=1e-4,  # Low, for training amplifies rounding.
            schedule="constant",
            device="cpu",
            seed=setup.seed,
        )
        cpu = torch.device("cpu")
        wanted = train(config, prepared, cpu, steps)
        rounded = differences(
            train(replace(config, precision="bf16"), prepared, cpu, steps), wanted
        )
        tolerances = {name: float(f"{ROUNDED * rounded[name]:.3g}") for name in rounded}
        for kind in kinds:
            precision, _, tf32 = kind.partition(", ")
            if precision == "fp16" and not setup.cuda:
                continue
            exact_float32()
            if tf32:
                torch.backends.cuda.matmul.fp32_precision = "tf32"
                torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
            chosen: Precision = precision  # type: ignore[assignment]
            trajectory = train(replace(config, precision=chosen), prepared, setup.device, steps)
            found = differences(trajectory, wanted)
            limits = EXACT if kind == "fp32" else tolerances
            yield {
                "check": name,
                "backbone": backbone,
                "precision": kind,
                "steps": steps,
                "passed": all(found[each] <= limits[each] for each in found),
                "found": found,
                "tolerance": limits,
            }


def simple_cnn(setup: Setup) -> Iterator[Row]:
    """Compare every term in every precision."""
    yield from against_cpu(setup, "simple_cnn", losses_of_terms(), KINDS)


_SOME = ("BCPL, L1", "Prototype Loss, SSIM", "prototype exchange")


def large(backbone: str) -> Part:
    """Return the part that compares three losses on a large backbone in bf16."""

    def run(setup: Setup) -> Iterator[Row]:
        if setup.quick:
            raise Skipped("large backbones take too long for a quick run")
        terms = losses_of_terms()
        yield from against_cpu(setup, backbone, {name: terms[name] for name in _SOME}, ("bf16",))

    return Part(f"against the CPU: {backbone}", run, 150)


def compiled(backbone: str, precision: Precision) -> Part:
    """Return the part that compares compiled steps, on a GPU recorded too, with eager ones."""

    def run(setup: Setup) -> Iterator[Row]:
        if setup.quick and backbone != "simple_cnn":
            raise Skipped("one model is enough for a quick run")
        exact_float32()
        epochs, prepared = (2, digits(100)) if setup.quick else (10, digits(300))
        config = TrialConfig(
            backbone=backbone,
            precision=precision,
            batch_size=64,  # The last batch is shorter: 44 images of 300.
            lambda_proto=0.5,
            lambda_batch=0.2,
            lambda_exchange=0.3,
            optimizer="sgd",  # Weights change in proportion to gradients, not by their signs.
            learning_rate=1e-4,  # Low, for training amplifies rounding.
            schedule="constant",
            epochs=epochs,
            seed=setup.seed,
        )
        yield from _compiled_against_eager(config, prepared, setup.device)

    return Part(f"compiled: {backbone} {precision}", run, 150)


_COMPILED: Mapping[str, tuple[float, float]] = {"fp32": (1e-3, 0.05), "bf16": (0.05, 0.5)}
"""By precision, the largest relative difference of losses, and of an epoch's change of weights. A
gradient that is lost or added twice changes the weights by its whole share. Two implementations of
convolution on one CPU differ in fp32 by up to 2e-5 and 0.013."""


def _compiled_against_eager(
    config: TrialConfig, prepared: PreparedData, device: torch.device
) -> Iterator[Row]:
    """Train an eager and a compiled model by epochs, each from the eager model's state.

    Differences of rounding therefore do not grow from epoch to epoch, and the tolerance is tight.
    With the exchange the compiled features run twice in a step, and their two backward passes add
    to the same gradients.
    """
    trainers = []
    for compile_ in (False, True):
        torch.manual_seed(config.seed)
        chosen = replace(config, compile=compile_, cuda_graphs=compile_)
        trainers.append(Trainer(chosen, prepared, device))
    eager, other = trainers
    loss_tolerance, weight_tolerance = _COMPILED[config.precision]
    worst_loss = worst_weight = 0.0
    for _ in range(config.epochs):
        before = _copied(eager.step.state_dict())
        start = _weights(eager.model)
        other.step.load_state_dict(_copied(before))
        for trainer in trainers:
            trainer.run_epoch(None)
        for name, wanted in eager.history[-1].items():
            if name.startswith("loss"):
                difference = abs(other.history[-1][name] - wanted) / max(abs(wanted), 1e-6)
                worst_loss = max(worst_loss, difference)
        end = _weights(eager.model)
        change = float((end - start).norm())
        worst_weight = max(worst_weight, float((_weights(other.model) - end).norm()) / change)
    yield {
        "check": "losses",
        "steps": config.epochs * -(-len(eager.train) // config.batch_size),
        "passed": worst_loss <= loss_tolerance,
        "found": float(f"{worst_loss:.3g}"),
        "tolerance": loss_tolerance,
    }
    yield {
        "check": "change of the weights in an epoch",
        "passed": worst_weight <= weight_tolerance,
        "found": float(f"{worst_weight:.3g}"),
        "tolerance": weight_tolerance,
    }


def recorded(backbone: str, precisions: tuple[Precision, ...]) -> Part:
    """Return the part that compares recorded with eager epochs, to the last bit."""

    def run(setup: Setup) -> Iterator[Row]:
        if not setup.cuda:
            raise Skipped("only CUDA has graphs")
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # Read when cuBLAS starts.
        torch.use_deterministic_algorithms(True, warn_only=True)
        prepared = digits(100 if setup.quick else 300)
        for precision in precisions:
            config = TrialConfig(
                **{f"lambda_{name}": 0.3 for name in TERMS},  # type: ignore[arg-type]
                backbone=backbone,
                precision=precision,
                batch_size=64,  # The last batch is shorter: 44 images of 300.
                epochs=6 if setup.quick else 10,
                device="cuda",
                seed=setup.seed,
            )
            eager, again, replayed = (
                fit(replace(config, cuda_graphs=graphs), prepared=prepared)
                for graphs in (False, False, True)
            )
            repeated, difference = (
                float((_weights(other.model) - _weights(eager.model)).abs().max())
                for other in (again, replayed)
            )
            losses = max(
                abs(replayed.metrics[name] - value)
                for name, value in eager.metrics.items()
                if name.startswith("loss")
            )
            yield {
                "check": "weights and losses of all terms",
                "backbone": backbone,
                "precision": precision,
                "passed": difference == 0 and losses == 0,
                "found": {"weights": difference, "losses": losses, "two eager runs": repeated},
                "tolerance": 0,
            }

    return Part(f"recorded: {backbone}", run, 120)


def _copied(state: Any) -> Any:
    """Return a state with copies of its tensors, which training changes in place."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


def _weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def no_waiting(setup: Setup) -> Iterator[Row]:
    """Check that the host never waits for the GPU in a step; a shorter batch included."""
    if not setup.cuda:
        raise Skipped("the debug mode that finds a waiting host needs CUDA")
    all_terms = {f"lambda_{name}": 0.1 for name in TERMS}
    cases: tuple[tuple[str, Precision, int, Cam], ...] = (
        ("simple_cnn", "fp32", 28, "grad_cam"),
        ("simple_cnn", "bf16", 28, "grad_cam"),
        ("simple_cnn", "fp16", 28, "grad_cam"),
        ("simple_cnn", "fp32", 32, "hires_cam"),
        ("resnet18", "bf16", 28, "grad_cam"),
        ("convnextv2_atto", "bf16", 28, "grad_cam"),
        ("convnextv2_atto", "fp32", 32, "hires_cam"),
    )
    prepared = digits(100)
    for kind in ("eager", "recorded", "compiled"):
        for backbone, precision, resolution, cam in cases[:1] if kind == "compiled" else cases:
            terms = dict(all_terms, lambda_mask_gradient=0.0) if kind == "compiled" else all_terms
            config = TrialConfig(
                **terms,  # type: ignore[arg-type]
                backbone=backbone,
                precision=precision,
                resolution=resolution,
                cam=cam,
                metric="ssim",
                compile=kind == "compiled",
                cuda_graphs=kind == "recorded",
                batch_size=64,
                epochs=10,
                seed=setup.seed,
            )
            try:
                _steps_without_waiting(config, prepared, setup.device)
                found = ""
            except RuntimeError as error:
                found = f"{_project_line(error)}: {first_line(error)}"
            yield {
                "check": f"{backbone}, {precision}, {resolution} px, {cam}, {kind}",
                "passed": not found,
                "found": found or "no waiting",
            }


def _steps_without_waiting(
    config: TrialConfig, prepared: PreparedData, device: torch.device
) -> None:
    torch.manual_seed(config.seed)
    trainer = Trainer(config, prepared, device)
    for _ in range(5):  # Compiles, records, and fills caches.
        trainer.run_epoch(None)
    order = torch.arange(len(trainer.train), device=device)
    trainer.model.train()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        for (chosen_N,) in (*batches((order,), config.batch_size), (order[: config.batch_size],)):
            trainer.gradients(chosen_N)
            trainer.step.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _project_line(error: BaseException) -> str:
    """Return the innermost line of this project in an error's traceback."""
    root, found = str(Path(__file__).parents[3]), "unknown line"
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if path.startswith(root):
            found = f"{Path(path).relative_to(root)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def resume(setup: Setup) -> Iterator[Row]:
    """Check that a resumed run ends as one without interruption.

    To the last bit with PyTorch's deterministic algorithms. Without them a GPU adds in an order
    that varies, so that two runs differ; how much is reported, and is no check.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # Read when cuBLAS starts.
    prepared = digits(256)
    config = TrialConfig(
        lambda_proto=0.5,
        lambda_batch=0.2,
        lambda_exchange=0.3,
        batch_size=64,
        epochs=3,
        device=str(setup.device),
        precision="bf16",
        seed=setup.seed,
    )
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            whole = fit(config, prepared=prepared)
            again = fit(config, prepared=prepared)
            with tempfile.TemporaryDirectory() as folder:
                state = Path(folder) / "state"

                def stop(report: Any, state: Path = state) -> bool:
                    report.save_state(state)
                    return bool(report.epoch == 1)

                fit(config, stop, prepared=prepared)
                resumed = fit(config, prepared=prepared, state=state)
        torch.use_deterministic_algorithms(False)
        without = sorted({str(each.message).splitlines()[0][:90] for each in warned})
        kind = "deterministic algorithms" if deterministic else "default algorithms"
        repeated, difference = (
            float((_weights(other.model) - _weights(whole.model)).abs().max())
            for other in (again, resumed)
        )
        row = {"check": f"resumed, {kind}", "found": difference, "two runs differ by": repeated}
        row |= {"warnings": without} if without else {}
        yield row | ({"passed": difference == 0, "tolerance": 0} if deterministic else {})


def bundle(setup: Setup) -> Iterator[Row]:
    """Check that a bundle made on the device gives the same answers on a CPU."""
    prepared = digits(512)
    config = TrialConfig(
        batch_size=64,
        epochs=1 if setup.quick else 5,
        device=str(setup.device),
        precision="bf16",
        seed=setup.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = fit(config, prepared=prepared)
    with tempfile.TemporaryDirectory() as folder:
        save_bundle(Path(folder) / "bundle", result)
        loaded = load(Path(folder) / "bundle")
    images = torch.from_numpy(prepared.dataset.test.images)
    exact_float32()
    on_cpu, cams_cpu = Evaluator(loaded.model, loaded.preprocess).explain(images)
    evaluator = replace(result.evaluator, precision="fp32")
    on_device, cams_device = evaluator.explain(images.to(setup.device))
    yield {
        "check": "all tensors are on the CPU",
        "passed": all(p.device.type == "cpu" for p in loaded.model.parameters()),
        "found": str(next(loaded.model.parameters()).device),
    }
    for name, found, wanted in (
        ("probabilities", on_device, on_cpu),
        ("CAMs", cams_device, cams_cpu),
    ):
        worst = float((found - wanted).abs().max())
        yield {
            "check": f"{name} in fp32, largest difference",
            "passed": worst <= 1e-3,
            "found": float(f"{worst:.3g}"),
            "tolerance": 1e-3,
        }
    split = prepared.split("test", config.resolution)
    evaluations = [
        Evaluator(model, result.preprocess).evaluate(
            prepared.split("test", config.resolution, device)
        )
        for model, device in (
            (result.model, setup.device),
            (loaded.model, torch.device("cpu")),
        )
    ]
    worst = max(
        abs(getattr(evaluations[0], name) - getattr(evaluations[1], name))
        for name in ("accuracy", "cam_ssim", "cam_ssim_sample")
    )
    yield {
        "check": f"accuracy and SSIM of {len(split)} test images, largest difference",
        "passed": worst <= 2e-3,
        "found": float(f"{worst:.3g}"),
        "tolerance": 2e-3,
    }


def memory(setup: Setup) -> Iterator[Row]:
    """Check that failed allocations are recognised, and that a run fits afterwards."""
    if not setup.cuda:
        yield _recognised("the CPU's allocator", lambda: torch.empty(2**50))
        return
    prepared = digits(256)
    small = TrialConfig(batch_size=64, epochs=1, device="cuda")

    def too_large() -> object:
        return torch.empty(2**45, dtype=torch.uint8, device="cuda")

    def in_training() -> object:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.002)
        try:
            return fit(replace(small, backbone="resnet50", resolution=224), prepared=prepared)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    yield _recognised("a tensor", too_large)
    yield _recognised("in training", in_training)
    torch.cuda.empty_cache()
    accuracy = fit(small, prepared=prepared).metrics["val_accuracy"]
    yield {"check": "a run fits afterwards", "passed": accuracy > 0, "found": accuracy}


def memory_of_libraries(setup: Setup) -> Iterator[Row]:
    """Check that cuBLAS, cuDNN and CUDA itself are recognised where the card is full."""
    if not setup.cuda:
        raise Skipped("a full card needs CUDA")
    weight = torch.randn(64, 64, device="cuda")
    product = torch.empty_like(weight)
    images = torch.randn(8, 64, 32, 32, device="cuda")
    kernel = torch.randn(64, 64, 3, 3, device="cuda")
    spare = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    kept = []
    size = 2**34
    while size >= 2**20:
        try:
            kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    del spare  # PyTorch keeps it, so that its own tensors still fit, and only those.
    yield _recognised("cuBLAS on a full card", lambda: torch.mm(weight, weight, out=product))
    yield _recognised("cuDNN on a full card", lambda: torch.conv2d(images, kernel).sum().item())
    yield {"check": "blocks that filled the card", "found": len(kept)}


def _recognised(name: str, run: Any) -> Row:
    try:
        run()
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)[:160]}"
        return {"check": name, "passed": is_out_of_memory(error), "found": text}
    return {"check": name, "found": "raised nothing"}


CHECKS = (
    Part("against the CPU: simple_cnn", simple_cnn, 150),
    large("convnextv2_tiny"),
    large("resnet18"),
    compiled("simple_cnn", "fp32"),
    compiled("resnet18", "fp32"),
    compiled("simple_cnn", "bf16"),
    recorded("simple_cnn", ("fp32", "bf16", "fp16")),
    recorded("resnet18", ("fp32", "bf16")),
    recorded("convnextv2_atto", ("bf16",)),
    Part("no waiting", no_waiting, 150),
    Part("resume", resume, 90),
    Part("bundle", bundle, 90),
    Part("memory", memory, 60),
)
"""Run several at a time."""

FULL_CARD = Part("memory of libraries", memory_of_libraries, 60)
"""Takes the whole card, so nothing may run beside it."""
