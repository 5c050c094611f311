"""Counting correct predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tally"]


@dataclass
class Tally:
    """Sums over images.

    Attributes:
        top1: Number of images whose label has the highest logit.
        top5: Number of images whose label is among the five highest logits.
        loss: Sum of the images' losses.
        images: Number of images.

    Example:
        >>> tally = Tally()
        >>> tally.add(torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.0, 3.0]]), torch.tensor([1, 0]), 1.5)
        >>> tally.means()
        (0.5, 1.0, 0.75)
    """

    top1: int = 0
    top5: int = 0
    loss: float = 0.0
    images: int = 0

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor | float) -> None:
        """Count a batch.

        Args:
            logits: Logits, `(N, classes)`.
            labels: Classes of the images, int64 `(N,)`.
            loss: Sum of the images' losses.
        """
        best = torch.topk(logits, min(5, logits.shape[1]), 1).indices == labels[:, None]
        self.top1 += int(best[:, 0].sum())
        self.top5 += int(best.sum())
        self.loss += float(loss)
        self.images += len(labels)

    def means(self) -> tuple[float, float, float]:
        """Top-1 and top-5 as shares in [0, 1], and the mean loss."""
        return self.top1 / self.images, self.top5 / self.images, self.loss / self.images
