"""The interface of a model that can be explained: feature maps, and a head on them.

Shapes: N images, C classes, K channels, H and W cells of the feature grid, R pixels.
"""

from torch import Tensor, nn


class ExplainableModel(nn.Module):
    """An image classifier in two parts: features, and the head that turns them into logits."""

    def features(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, R, R)` to feature maps `(N, K, H, W)`."""
        raise NotImplementedError

    def head(self, features_NKHW: Tensor) -> Tensor:
        """Map feature maps to logits `(N, C)`, each image independently of the others."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        return self.head(self.features(images))

    def class_weights(self, cells: int) -> Tensor | None:
        """Return the channel weights (Eq. 6) of each class, `(C, K)`, if the head is linear.

        The gradient of a class score with respect to the features is then equal for all images, and
        known from the parameters of the head, with no backward pass. It stays differentiable with
        respect to them. None if the head is not linear.

        Args:
            cells: the number of cells of the feature grid, H W.
        """
        del cells
        return None

    def class_gradients(self, rows: int, columns: int) -> Tensor | None:
        """Return the gradient of each class score by the features, if the head is linear.

        Args:
            rows: H of the feature grid.
            columns: W of the feature grid.

        Returns:
            `(C, K, H, W)`, or `(C, K, 1, 1)` if it is equal in all cells, or None.
        """
        weights_CK = self.class_weights(rows * columns)
        return None if weights_CK is None else weights_CK[:, :, None, None]
