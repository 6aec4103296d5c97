"""A wrapper that lets forward hooks read the feature maps of an `ExplainableModel`."""

from torch import Tensor, nn

from batchcam.models import ExplainableModel


class HookableModel(nn.Module):
    """An `ExplainableModel` with a submodule, `hook_point`, whose output is the feature maps."""

    def __init__(self, model: ExplainableModel) -> None:
        super().__init__()
        self.model = model
        self.hook_point = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map the model's input `(N, channels, R, R)` to logits `(N, C)`."""
        logits: Tensor = self.model.head(self.hook_point(self.model.features(images)))
        return logits
