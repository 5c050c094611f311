"""Pictures of masks: that pixels are what the masks keep."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from starfire_prune.reporting.mask_figures import kernel_matrix, masks_picture


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on; small, as nobody looks."""
    saved: list[Any] = []
    save = Figure.savefig

    def note(figure: Figure, file: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, file, **{**options, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", note)
    return saved


def shown(figure: Any) -> list[Any]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def test_a_kernel_is_the_share_of_its_weights_that_is_kept():
    mask = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    mask[0, 1] = True
    mask[1, 2, 0, 0] = True
    assert kernel_matrix(mask).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.25]]


@pytest.mark.parametrize("kernel", [(), (1,), (3,), (3, 3), (2, 3, 3)])
def test_kernels_of_any_number_of_dimensions_have_a_picture(kernel, figures):
    mask = torch.ones(3, 2, *(kernel or (1, 1)), dtype=torch.bool)
    masks_picture(mask)
    assert shown(figures[0])[1].shape == (3, 2)


def test_a_convolution_and_a_linear_layer_are_three_panels(figures):
    conv = torch.zeros(20, 30, 3, 3, dtype=torch.bool)
    linear = torch.tensor([[True, False]])
    masks_picture(conv, linear)
    tiles, matrix, weights = shown(figures[0])
    assert (tiles.shape, matrix.shape) == ((12 * 4, 12 * 4), (20, 30))
    assert weights.tolist() == [[1.0, pytest.approx(0.12)]]


def test_a_single_linear_layer_has_a_picture(figures):
    masks_picture(None, torch.ones(300, 700, dtype=torch.bool))
    assert [image.shape for image in shown(figures[0])] == [(40, 120)]


def test_pictures_are_pngs_of_the_size_they_tell():
    images = masks_picture(torch.ones(2, 2, 1, 1, dtype=torch.bool))
    for png in (images.light, images.dark):
        with Image.open(io.BytesIO(png)) as image:
            assert image.size == (images.width, images.height)
