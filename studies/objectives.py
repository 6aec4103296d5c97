"""What a study of image classifiers can maximise, in the order in which it is offered."""

from collections.abc import Iterable

from studies.engine.protocol import Objective

ACCURACY = Objective("val_accuracy", "accuracy", short="accuracy")
SIMILARITY = Objective("cam_ssim", "SSIM", format=".3f", short="ssim")
SPEED = Objective("images_per_second", "images/s", format=",.0f", short="speed")

OBJECTIVES = {each.name: each for each in (ACCURACY, SIMILARITY, SPEED)}
"""By the name of the metric, as `--objectives` and study.json name it."""


def objectives_of(names: Iterable[str]) -> tuple[Objective, ...]:
    """Return the objectives of these names, in their order.

    Raises:
        KeyError: a name is unknown.
    """
    return tuple(OBJECTIVES[name] for name in names)
