"""A model whose feature maps can be hooked, as the methods here expect."""

from torch import Tensor, nn

from batchcam.models import ExplainableModel


class Tapped(nn.Module):
    """An `ExplainableModel` with a module, `tap`, whose output are its features."""

    def __init__(self, model: ExplainableModel) -> None:
        super().__init__()
        self.model = model
        self.tap = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.model.head(self.tap(self.model.features(images)))
        return logits
