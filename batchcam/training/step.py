"""One training step: both passes, the objective and the optimiser, without waiting for anything."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchcam.cam import fused_weighted_sum
from batchcam.config import TrialConfig
from batchcam.devices import autocast, compile_mode, prefers_channels_last
from batchcam.losses.exchange import exchange
from batchcam.losses.objective import Objective
from batchcam.models import ExplainableModel


class TrainingStep:
    """A model, and all that moves its weights.

    On a GPU nothing in a step makes the host wait: no value is read, no shape depends on the data.
    """

    def __init__(
        self,
        model: ExplainableModel,
        prototypes_PRR: Tensor,
        config: TrialConfig,
        total_steps: int,
        device: torch.device,
        off_support_CHW: Tensor | None = None,
        off_support_CRR: Tensor | None = None,
    ) -> None:
        """Move the model to the device, and make optimiser and schedule for `total_steps`.

        Args:
            model: trained in place.
            prototypes_PRR: what CAMs are compared with, on the device.
            config: weights of the losses, optimiser, schedule, precision.
            total_steps: length of the schedule.
            device: where to train.
            off_support_CHW: of the CAM grid's cells, on the device; see
                :meth:`batchcam.data.prepared.PreparedData.off_support_mask`. Needed where
                `config.lambda_energy` is not 0.
            off_support_CRR: the same of the input's pixels. Needed where
                `config.lambda_exchange` is not 0.

        Raises:
            ConfigError: the device does not have the precision asked for.
        """
        self._autocast = partial(autocast, device, config.precision)
        self._autocast()  # Refuses a precision that the device does not have.
        self.model = model.to(device)
        if prefers_channels_last(device, config.precision):
            self.model.to(memory_format=torch.channels_last)
        self.objective = Objective(
            config.metric,
            config.lambda_class,
            config.lambda_proto,
            config.lambda_batch,
            config.lambda_energy,
            config.lambda_exchange,
            config.cam,
        )
        self.optimizer = make_optimizer(model, config)
        self._prototypes_PRR = prototypes_PRR
        self._outside_CHW = off_support_CHW
        self._outside_CRR = off_support_CRR
        self._schedule = make_schedule(self.optimizer, config, total_steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        # Only the features: torch.compile cannot differentiate the head twice.
        mode = compile_mode(device)
        self._features = (
            torch.compile(model.features, mode=mode) if config.compile else model.features
        )
        self._has_graphs = config.compile and mode == "reduce-overhead"

    def __call__(
        self, x_NCHW: Tensor, labels_N: Tensor, prototype_index_N: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Train on a batch; return `loss` and its terms, `loss_class` and so on, detached.

        Args:
            x_NCHW: preprocessed images on the device.
            labels_N: int64, on the device.
            prototype_index_N: the prototype of each image, if not that of its class.
        """
        if self._has_graphs:  # Features live in memory that the next step uses again.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self._autocast():
            features = self._features(x_NCHW)
        rows, columns = features.shape[2:]
        weights = sums = gradients = None
        if self.objective.wants_weights:
            weights = self.model.class_weights(rows * columns)
        if weights is not None:
            features, sums = fused_weighted_sum(weights.index_select(0, labels_N), features)
        with self._autocast():
            logits = self.model.head(features)
        if self.objective.wants_gradients:
            gradients = self.model.class_gradients(rows, columns)
        exchanged = self._exchanged(x_NCHW, labels_N) if self.objective.lambda_exchange else None
        loss, terms = self.objective(
            logits,
            features,
            labels_N,
            self._prototypes_PRR,
            sums,
            prototype_index_N,
            self._outside_CHW,
            gradients,
            exchanged,
        )
        self.update(loss)
        return {"loss": loss.detach(), **{f"loss_{name}": term for name, term in terms.items()}}

    def _exchanged(self, x_NCRR: Tensor, labels_N: Tensor) -> Tensor:
        """Return the scores of the images after an exchange."""
        assert self._outside_CRR is not None
        with self._autocast():
            return self.model.head(self._features(exchange(x_NCRR, labels_N, self._outside_CRR)))

    def update(self, loss: Tensor) -> None:
        """Move the weights down the gradient of a loss, and the schedule on by a step."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self._scaler.scale(loss))
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of model, optimiser, schedule and scaler."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; other entries are not looked at."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
        }


def make_optimizer(model: ExplainableModel, config: TrialConfig) -> torch.optim.Optimizer:
    """Return the optimiser that `config` names, over all parameters, fused."""
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
    """Return the schedule that `config` names, over so many steps."""
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    # One spare step: the schedule steps after the last batch too.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=total_steps + 1
    )
