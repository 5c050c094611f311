"""timm's mixup and cutmix, for batches of any size."""

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

__all__ = ["mix_batch"]


def mix_batch(mixup: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the images of a batch in pairs; of an odd number the last one stays as it is.

    The draws are NumPy's default generator's, as timm makes them.

    Args:
        mixup: of timm, with its `num_classes` and `label_smoothing`.
        images: a float tensor `(N, C, height, width)`; it is changed in place.
        labels: an int64 tensor `(N,)`.

    Returns:
        The images, and the share of each class as a float tensor `(N, num_classes)`.

    Example:
        >>> mixup = Mixup(mixup_alpha=0.2, num_classes=10)
        >>> images, shares = mix_batch(mixup, torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]))
        >>> tuple(shares.shape)
        (3, 10)
    """
    paired = len(labels) - len(labels) % 2
    if paired == len(labels):
        _, targets = mixup(images, labels)
        return images, targets
    rest = mixup_target(labels[paired:], mixup.num_classes, 1.0, mixup.label_smoothing)
    if paired == 0:
        return images, rest
    _, targets = mixup(images[:paired], labels[:paired])
    return images, torch.cat([targets, rest])
