"""Pictures of runs and of masks. They need matplotlib: `pip install 'starfire-prune[plots]'`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from starfire_prune.runs.folder import QUANTIZATION_PHASE
from starfire_prune.utils.files import replaced_file

__all__ = ["plot_masks", "plot_training", "tiled_kernels"]


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw accuracy, target and reached sparsity per epoch, as in the paper's Figures 4 and 7 to 9.

    Args:
        metrics: The objects of a run's `metrics.jsonl`, one per epoch.
        path: Path of the PNG file.
        title: Title of the picture.
    """
    epochs = [row["epoch"] + 1 for row in metrics]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    accuracy = figure.subplots()
    accuracy.plot(epochs, [100 * row["top1"] for row in metrics], "o-", ms=3, label="top-1")
    accuracy.set_xlabel("epoch")
    accuracy.set_ylabel("top-1 on held-out images [%]", color="C0")
    sparsity = accuracy.twinx()
    for key, style, label in (
        ("target_sparsity", "--", "target_sparsity"),
        ("sparsity", "-", "reached"),
    ):
        values = [100 * row[key] for row in metrics]
        sparsity.plot(epochs, values, style, color="C1", lw=3 if style == "--" else 1, label=label)
    sparsity.set_ylim(-2, 102)
    sparsity.set_ylabel("zero weights [%]", color="C1")
    era = [row["epoch"] for row in metrics if row["phase"] == "era"]
    if era:
        accuracy.axvspan(era[0], era[-1] + 1, color="0.9", label="pruning era")
    int8 = [row["epoch"] for row in metrics if row["phase"] == QUANTIZATION_PHASE]
    if int8:
        accuracy.axvspan(int8[0], int8[-1] + 1, color="C2", alpha=0.15, label="in int8")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    accuracy.set_title(title)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_masks(masks: Mapping[str, Tensor], path: Path, n_out: int = 12, n_in: int = 12) -> None:
    """Draw masks side by side, kernels as tiles, as in the paper's Figure 2.

    Args:
        masks: Bool masks, `(K, C, R, S)` or `(out_features, in_features)`, by panel title.
        path: Path of the PNG file.
        n_out: Number of output channels to show; three times as many for a linear layer.
        n_in: Number of input channels to show; three times as many for a linear layer.
    """
    figure = Figure(figsize=(3.2 * len(masks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(masks), squeeze=False)[0]
    for panel, (title, mask) in zip(panels, masks.items(), strict=True):
        kernels = mask.bool().cpu()
        if kernels.ndim == 2:
            kernels = kernels[: 3 * n_out, : 3 * n_in, None, None]
        image = tiled_kernels(kernels[:n_out, :n_in] if mask.ndim > 2 else kernels).numpy()
        panel.imshow(image, cmap="Blues", vmin=0, vmax=1)  # the same blue on every panel
        panel.set_title(f"{title}\n{1 - mask.float().mean():.0%} zero", fontsize=10)
        panel.set_xlabel("input channel" if mask.ndim > 2 else "input feature")
        panel.set_ylabel("output channel" if mask.ndim > 2 else "output neuron")
        panel.set_xticks([])
        panel.set_yticks([])
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def tiled_kernels(kernels: Tensor) -> Tensor:
    """A mask as one image with kernels as tiles: kept is 1, pruned is 0.12, gaps are 0.

    Args:
        kernels: Bool mask, `(K, C, R, S)`.

    Returns:
        Float image, `(K (R + 1), C (S + 1))`, or `(K, C)` if kernels are single weights.

    Example:
        >>> tiled_kernels(torch.tensor([[[[True, False]]]])).tolist()
        [[1.0, 0.11999999731779099, 0.0], [0.0, 0.0, 0.0]]
    """
    n_out, n_in, height, width = kernels.shape
    gap = int(height * width > 1)
    image = torch.zeros(n_out, height + gap, n_in, width + gap)
    image[:, :height, :, :width] = torch.where(kernels, 1.0, 0.12).permute(0, 2, 1, 3)
    return image.reshape(n_out * (height + gap), n_in * (width + gap))
