"""Loss terms that make explanations part of the training, and the registry of all terms.

The functions serve any training loop: they take logits, features, labels and prototypes, and return
a scalar. The trainer uses the same functions through :data:`TERMS`.

To add a term: write its file, name its spec in :data:`TERMS`, and give
:class:`batchcam.config.TrialConfig` its weight.
"""

from collections.abc import Iterable, Mapping, Sequence

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData
from batchcam.errors import ConfigError, DataError
from batchcam.losses.base import Batch, Compute, TermContext, TermSpec, WeightedTerm
from batchcam.losses.cross_entropy import CROSS_ENTROPY
from batchcam.losses.energy import ENERGY, prototype_energy_loss
from batchcam.losses.exchange import EXCHANGE, exchange_images, exchange_loss
from batchcam.losses.mask_gradient import MASK_GRADIENT, mask_gradient_loss
from batchcam.losses.prototype import BATCH, PROTOTYPE, batch_cam_loss, prototype_loss

__all__ = [
    "TERMS",
    "Batch",
    "Compute",
    "ExtraTerms",
    "TermContext",
    "TermSpec",
    "WeightedTerm",
    "batch_cam_loss",
    "build_terms",
    "check_masks",
    "compares_cams",
    "exchange_images",
    "exchange_loss",
    "mask_gradient_loss",
    "prototype_energy_loss",
    "prototype_loss",
    "used_terms",
]

TERMS: Mapping[str, TermSpec] = {
    spec.name: spec for spec in (CROSS_ENTROPY, PROTOTYPE, BATCH, ENERGY, EXCHANGE, MASK_GRADIENT)
}
"""Every term by its name, in the order in which they are summed and listed."""

ExtraTerms = Sequence[tuple[TermSpec, float]]
"""A user's own terms, each with its weight."""


def used_terms(config: TrialConfig, extra: ExtraTerms = ()) -> list[tuple[TermSpec, float]]:
    """Return the terms of a run's loss with their weights, those of weight 0 left out.

    Args:
        config: the run; its `lambda_<name>` are the weights of :data:`TERMS`.
        extra: a user's own terms, listed last.

    Raises:
        ConfigError: an extra term has the name of another term, or a weight that is not > 0; or a
            term cannot be compiled.
    """
    used = [(spec, float(getattr(config, f"lambda_{spec.name}"))) for spec in TERMS.values()]
    names = list(TERMS)
    for spec, weight in extra:
        if spec.name in names or not spec.name.isidentifier():
            raise ConfigError(
                f"the name of the extra term {spec.name!r} must be an identifier that no other "
                f"term has; taken are {', '.join(names)}."
            )
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"the weight {weight:g} of the extra term {spec.name} must be a finite number > 0; "
                "leave the term out to turn it off."
            )
        names.append(spec.name)
        used.append((spec, float(weight)))
    used = [(spec, weight) for spec, weight in used if weight]
    for spec, weight in used:
        if spec.input_gradients and config.compile:
            raise ConfigError(
                f"{spec.title} (weight {weight:g}) differentiates the features twice, which "
                "torch.compile cannot; leave compile out, or set the weight to 0."
            )
    return used


def check_masks(specs: Iterable[TermSpec], dataset: ImageData) -> None:
    """Refuse a data set without masks for terms that need them.

    Raises:
        DataError: with the term and the remedy.
    """
    for spec in specs:
        if spec.uses_masks and dataset.train.masks is None:
            raise DataError(
                f"{spec.title} (lambda_{spec.name}) needs a mask for every training image, and "
                f"dataset {dataset.name} has none; leave the term out, or use decoy_mnist or "
                "decoy_fashion_mnist."
            )


def build_terms(context: TermContext, extra: ExtraTerms = ()) -> list[WeightedTerm]:
    """Build the terms of a run's loss, once per run.

    Raises:
        ConfigError: see :func:`used_terms`.
    """
    return [
        WeightedTerm(spec, weight, spec.build(context))
        for spec, weight in used_terms(context.config, extra)
    ]


def compares_cams(config: TrialConfig) -> bool:
    """Return whether a run's loss compares saliency maps with prototypes, by `config.metric`."""
    return any(spec.compares_cams for spec, _ in used_terms(config))
