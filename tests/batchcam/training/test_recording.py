"""Tests of recorded training steps; those that record need a GPU.

`python -m studies.benchmarks.gpu` compares recorded with other steps on every backbone and
precision.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.errors import ConfigError
from batchcam.losses import TermContext, TermSpec
from batchcam.losses.base import Batch, Compute
from batchcam.training.fit import Trainer, fit
from batchcam.training.step import records_steps

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("device", "wanted", "recorded"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_only_cuda_has_graphs(device: str, wanted: bool, recorded: bool) -> None:
    assert records_steps(TrialConfig(cuda_graphs=wanted), torch.device(device)) == recorded


def test_the_losses_of_a_batch_are_those_of_a_step(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    config = replace(tiny_config, lambda_proto=0.1, lambda_batch=0.1, device="cpu")
    chosen = torch.arange(16)
    losses = []
    for trainer in (
        Trainer(config, tiny_prepared, torch.device("cpu")),
        Trainer(config, tiny_prepared, torch.device("cpu")),
    ):
        trainer.model.load_state_dict(
            {name: torch.full_like(each, 0.01) for name, each in trainer.model.state_dict().items()}
        )
        trainer.model.train()
        losses.append(trainer)
    by_index, by_step = losses
    split = by_step.train
    wanted = by_step.step(
        by_step.preprocess(split.images_NCHW[chosen]),
        split.labels_N[chosen],
        split.prototype_index_N[chosen],
    )
    found = by_index.gradients(chosen)
    by_index.step.advance()
    assert found.tolist() == [wanted[name].item() for name in by_index.step.loss_names]
    for one, other in zip(by_index.model.parameters(), by_step.model.parameters(), strict=True):
        assert torch.equal(one, other)


@cuda
def test_a_recorded_run_is_equal_to_one_without(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    config = replace(tiny_config, device="cuda", epochs=6, lambda_exchange=0.1)
    models = [
        fit(replace(config, cuda_graphs=recorded), prepared=tiny_prepared).model
        for recorded in (False, True)
    ]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def _reading(context: TermContext) -> Compute:
    del context

    def compute(batch: Batch) -> torch.Tensor:
        return batch.logits_NC.square().mean() * float(batch.logits_NC.sum() > 0)

    return compute


@cuda
def test_a_term_that_reads_a_value_cannot_be_recorded(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    spec = TermSpec(
        name="reading", title="reading", source="", search_range=(0.1, 1.0), build=_reading
    )
    config = replace(tiny_config, device="cuda", epochs=6)
    with pytest.raises(ConfigError, match=r"cannot be recorded as a CUDA graph .* cuda_graphs"):
        fit(config, prepared=tiny_prepared, terms=[(spec, 1.0)])


def test_a_short_last_batch_leaves_the_shapes_static(
    tiny_prepared: PreparedData, tiny_config: TrialConfig
) -> None:
    """A dynamic shape would make all later batches slower."""
    shapes: list[list[Any]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        shapes.extend(list(each.shape) for each in inputs if each.dim() == 4)
        return module.forward

    count = len(tiny_prepared.dataset.train)
    size = count // 2 + 1
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend(backend)
    torch.compiler.reset()
    try:
        config = replace(tiny_config, compile=True, batch_size=size, epochs=2, device="cpu")
        fit(config, prepared=tiny_prepared)
    finally:
        torch.compiler.set_default_backend(before)
        torch.compiler.reset()
    assert all(type(side) is int for shape in shapes for side in shape)
    side = tiny_config.resolution
    images = [shape[0] for shape in shapes if shape[2:] == [side, side]]
    assert sorted(images) == [count - size, size]
