"""Figures of a run's masks, as in the paper's Figure 2; they need matplotlib."""

from __future__ import annotations

from typing import Final

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from starfire_prune.reporting.document import Images
from starfire_prune.reporting.style import Theme, rendered
from starfire_prune.training.plots import tiled_kernels

__all__ = ["LINEAR_COLUMNS", "LINEAR_ROWS", "TILES", "kernel_matrix", "masks_picture"]


TILES: Final = 12  # output and input channels whose kernels are shown as tiles
LINEAR_ROWS: Final = 40  # output neurons of a linear layer that are shown
LINEAR_COLUMNS: Final = 120  # input features of a linear layer that are shown
_ELONGATED: Final = 2.5  # a matrix with a larger ratio of its sides is stretched to a square


def masks_picture(conv: Tensor | None, linear: Tensor | None = None) -> Images:
    """Draw the masks of a run: kernels as tiles, the K x C matrix of kernels, linear weights.

    Args:
        conv: Mask of a convolution, bool, `(K, C, *kernel)`; None for no such panels.
        linear: Mask of a linear layer, bool, `(out_features, in_features)`; None for no such panel.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        rows = [name for name, mask in (("conv", conv), ("linear", linear)) if mask is not None]
        ratios = [{"conv": 2.5, "linear": 1.0}[name] for name in rows]
        grid = figure.add_gridspec(
            len(rows), 2, height_ratios=ratios, left=0.07, right=0.97, bottom=0.09, top=0.92
        )
        grid.update(wspace=0.18, hspace=0.42)
        colours = LinearSegmentedColormap.from_list("mask", [theme.background, theme.kept])
        if conv is not None:
            tiles = figure.add_subplot(grid[0, 0])
            _show(tiles, tiled_kernels(_flat_kernels(conv)[:TILES, :TILES]), colours)
            shown = [min(TILES, size) for size in conv.shape[:2]]
            _name(tiles, f"first {shown[0]} × {shown[1]} kernels", "channel")
            matrix = figure.add_subplot(grid[0, 1])
            _show(matrix, kernel_matrix(conv), colours, framed=theme.muted)
            _name(matrix, f"all {conv.shape[0]} × {conv.shape[1]} kernels", "channel")
        if linear is not None:
            panel = figure.add_subplot(grid[-1, :])
            part = linear[:LINEAR_ROWS, :LINEAR_COLUMNS]
            _show(panel, torch.where(part, 1.0, 0.12), colours)
            _name(panel, f"linear layer: {part.shape[0]} outputs × {part.shape[1]} inputs", "")

    return rendered(draw, {True: 3.9, False: 2.8}[conv is not None and linear is not None])


def kernel_matrix(mask: Tensor) -> Tensor:
    """The share of kept weights in each kernel, float `(K, C)`, in [0, 1].

    Args:
        mask: Mask of a convolution, bool, `(K, C, *kernel)`.

    Example:
        >>> kernel_matrix(torch.tensor([[[[True, False]], [[False, False]]]])).tolist()
        [[0.5, 0.0]]
    """
    return mask.flatten(2).float().mean(2)


def _flat_kernels(mask: Tensor) -> Tensor:
    """Kernels of any number of dimensions in two, `(K, C, R, S)`."""
    return mask.reshape(*mask.shape[:2], -1, mask.shape[-1])


def _show(
    axes: Axes, image: Tensor, colours: LinearSegmentedColormap, framed: str | None = None
) -> None:
    height, width = image.shape
    elongated = max(height / width, width / height) > _ELONGATED
    axes.imshow(
        image.numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto" if elongated else "equal"
    )
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(framed is not None)
    if framed is not None:
        axes.spines[:].set_color(framed)


def _name(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=8.5)
    if unit:
        axes.set_xlabel(f"input {unit}", fontsize=8.5)
        axes.set_ylabel(f"output {unit}", fontsize=8.5)
