"""One training step: forward pass, loss terms, backward pass and optimiser."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchcam.cam import fused_weighted_sum
from batchcam.config import TrialConfig
from batchcam.devices import autocast, prefers_channels_last
from batchcam.explainers import EXPLAINERS
from batchcam.losses.base import Batch, WeightedTerm
from batchcam.models.base import ExplainableModel


class TrainingStep:
    """Model, optimiser, schedule and gradient scaler.

    On a GPU the host never waits during a step: no value is read, no shape depends on the data.

    Attributes:
        model: trained in place.
        terms: the loss terms, in the order in which they are summed. May be replaced between steps.
        explainer: makes the maps of terms that compare CAMs. May be replaced between steps.
        optimizer: over all parameters of the model.
    """

    def __init__(
        self,
        model: ExplainableModel,
        terms: Sequence[WeightedTerm],
        config: TrialConfig,
        total_steps: int,
        device: torch.device,
    ) -> None:
        """Move the model to the device, and make optimiser and schedule.

        Args:
            model: trained in place.
            terms: the loss; see :func:`batchcam.losses.build_terms`.
            config: explainer, optimiser, schedule, precision, compilation.
            total_steps: length of the schedule.
            device: where to train.

        Raises:
            ConfigError: the device does not support the precision.
        """
        self._autocast = partial(autocast, device, config.precision)
        self._autocast()  # Refuses a precision that the device does not support.
        self.model = model.to(device)
        if prefers_channels_last(device, config.precision):
            self.model.to(memory_format=torch.channels_last)
        self.terms = terms
        self.optimizer = make_optimizer(model, config)
        self.explainer = EXPLAINERS[config.cam]
        self._schedule = make_schedule(self.optimizer, config, total_steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        # Only the features: torch.compile cannot differentiate the head twice. Static shapes: the
        # short last batch is compiled by itself; by default it would make the code of all later
        # batches dynamic, which is slower.
        self._features = (
            torch.compile(model.features, dynamic=False) if config.compile else model.features
        )

    def __call__(
        self,
        images_NCRR: Tensor,
        labels_N: Tensor,
        prototype_index_N: Tensor | None = None,
        masks_NRR: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Train on a batch; return `loss` and each term before weighting, `loss_<name>`, detached.

        Args:
            images_NCRR: preprocessed images, on the device.
            labels_N: int64, the class of each image.
            prototype_index_N: int64, the prototype of each image; None: that of its class.
            masks_NRR: where images show what the model should ignore, if a term needs it.
        """
        losses = self.gradients(images_NCRR, labels_N, prototype_index_N, masks_NRR)
        self.advance()
        return losses

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the losses that a step returns, in their order."""
        return ("loss", *(f"loss_{term.spec.name}" for term in self.terms))

    def gradients(
        self,
        images_NCRR: Tensor,
        labels_N: Tensor,
        prototype_index_N: Tensor | None = None,
        masks_NRR: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Replace the gradients of the model by those of a batch; arguments as for a step."""
        if any(term.spec.input_gradients for term in self.terms):
            images_NCRR.requires_grad_()
        batch = self._forward(images_NCRR, labels_N, prototype_index_N, masks_NRR)
        values = {term.spec.name: term.compute(batch) for term in self.terms}
        loss = sum(
            (term.weight * values[term.spec.name] for term in self.terms),
            batch.logits_NC.new_zeros(()),
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self._scaler.scale(loss))
        losses = {f"loss_{name}": value.detach() for name, value in values.items()}
        return {"loss": loss.detach(), **losses}

    def advance(self) -> None:
        """Take an optimiser step down the gradients, and advance the schedule."""
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()

    def _forward(
        self,
        images_NCRR: Tensor,
        labels_N: Tensor,
        prototype_index_N: Tensor | None,
        masks_NRR: Tensor | None,
    ) -> Batch:
        """Classify a batch; where the head is linear, compute the Grad-CAMs with the logits."""
        with self._autocast():
            features = self._features(images_NCRR)
        known: dict[str, Tensor] = {}
        if self.explainer.uses_channel_weights and any(t.spec.compares_cams for t in self.terms):
            rows, columns = features.shape[2:]
            weights_CK = self.model.class_weights(rows * columns)
            if weights_CK is not None:
                weights_NK = weights_CK.index_select(0, labels_N)
                features, sums_NHW = fused_weighted_sum(weights_NK, features)
                known = {"class_weights_CK": weights_CK, "fused_sums_NHW": sums_NHW}
        with self._autocast():
            logits = self.model.head(features)
        return Batch(
            self.model,
            self._logits,
            images_NCRR,
            labels_N,
            features,
            logits,
            self.explainer,
            prototype_index_N=prototype_index_N,
            masks_NRR=masks_NRR,
            **known,
        )

    def _logits(self, images_NCRR: Tensor) -> Tensor:
        """Return the logits of other images, in the precision of the step."""
        with self._autocast():
            return self.model.head(self._features(images_NCRR))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of model, optimiser, schedule and scaler."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; other entries of `state` are ignored."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
        }


def records_steps(config: TrialConfig, device: torch.device) -> bool:
    """Return whether steps are recorded as CUDA graphs (:mod:`batchcam.training.recording`)."""
    return config.cuda_graphs and device.type == "cuda"


def make_optimizer(model: ExplainableModel, config: TrialConfig) -> torch.optim.Optimizer:
    """Return the optimiser that `config` names, over all parameters, with fused kernels."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=rate,
            weight_decay=decay,
            momentum=0.9,
            nesterov=True,
            fused=True,
        )
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrialConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the learning-rate schedule that `config` names, `total_steps` long."""
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    # One step more: the schedule advances after the last batch too.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=total_steps + 1
    )
