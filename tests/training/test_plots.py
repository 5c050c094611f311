"""Pictures: that they are drawn, and that what they show is what they were given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from starfire_prune.training.plots import plot_masks, plot_training

PNG = b"\x89PNG\r\n\x1a\n"

METRICS: list[dict[str, Any]] = [
    {"epoch": 0, "top1": 0.2, "phase": "dense", "target_sparsity": 0.0, "sparsity": 0.0},
    {"epoch": 1, "top1": 0.5, "phase": "era", "target_sparsity": 0.3, "sparsity": 0.25},
    {"epoch": 2, "top1": 0.4, "phase": "era", "target_sparsity": 0.6, "sparsity": 0.5},
    {"epoch": 3, "top1": 0.6, "phase": "fixed", "target_sparsity": 0.6, "sparsity": 0.625},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    saved: list[Any] = []
    save = Figure.savefig

    def note(figure: Figure, *args: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    return saved


# A run


def test_the_picture_of_a_run_is_a_png(tmp_path):
    plot_training(METRICS, tmp_path / "new" / "training.png", title="quickstart")
    assert (tmp_path / "new" / "training.png").read_bytes().startswith(PNG)
    with Image.open(tmp_path / "new" / "training.png") as image:
        assert image.size == (960, 540)


def test_the_picture_of_a_run_shows_accuracy_threshold_and_sparsity_in_percent(figures, tmp_path):
    plot_training(METRICS, tmp_path / "training.png", title="quickstart")
    accuracy, sparsity = figures[0].axes
    lines = {line.get_label(): line for axes in (accuracy, sparsity) for line in axes.lines}
    for label, key in (
        ("top-1", "top1"),
        ("target_sparsity", "target_sparsity"),
        ("reached", "sparsity"),
    ):
        assert list(lines[label].get_xdata()) == [1, 2, 3, 4]  # epochs that are done
        assert list(lines[label].get_ydata()) == [100 * row[key] for row in METRICS]
    assert accuracy.get_title() == "quickstart"


def test_the_picture_of_a_run_shades_the_era_from_its_start_to_its_end(figures, tmp_path):
    plot_training(METRICS, tmp_path / "training.png")
    (era,) = figures[0].axes[0].patches
    assert (era.get_x(), era.get_x() + era.get_width()) == (1, 3)


def test_the_picture_of_a_run_shades_the_epochs_in_int8(figures, tmp_path):
    rows = [*METRICS, {**METRICS[-1], "epoch": 4, "phase": "quantization"}]
    plot_training(rows, tmp_path / "training.png")
    span = figures[0].axes[0].patches[1]
    assert span.get_label() == "in int8"
    assert (span.get_x(), span.get_x() + span.get_width()) == (4, 5)


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_that_never_pruned_has_a_picture_without_an_era(count, figures, tmp_path):
    plot_training(METRICS[:count], tmp_path / "training.png")
    assert not figures[0].axes[0].patches
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(figure: Figure, path: Path, **options: Any) -> None:
        path.write_bytes(PNG)
        raise OSError(28, "No space left on device")

    path = tmp_path / "training.png"
    path.write_text("old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        plot_training(METRICS, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["training.png"]


# Masks


def test_the_picture_of_masks_is_a_png_with_a_panel_each(figures, tmp_path):
    masks = {"window": torch.ones(4, 4, 3, 3) > 0, "FC": torch.ones(5, 7) > 0}
    plot_masks(masks, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(PNG)
    assert [axes.get_title().splitlines()[0] for axes in figures[0].axes] == ["window", "FC"]


def image_of(figure: Any) -> list[list[float]]:
    values = np.asarray(figure.axes[0].images[0].get_array())
    return [[round(float(value), 2) for value in row] for row in values]


def test_kernels_are_tiles_with_gaps(figures, tmp_path):
    # two output channels of one kernel each, the second one gone
    mask = torch.tensor([[[[1, 0], [0, 1]]], [[[0, 0], [0, 0]]]]).bool()
    plot_masks({"ck": mask}, tmp_path / "masks.png")
    assert image_of(figures[0]) == [
        [1.0, 0.12, 0.0],
        [0.12, 1.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.12, 0.12, 0.0],
        [0.12, 0.12, 0.0],
        [0.0, 0.0, 0.0],
    ]
    assert figures[0].axes[0].get_title() == "ck\n75% zero"


def test_weights_of_a_linear_layer_are_pixels(figures, tmp_path):
    plot_masks({"FC": torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()}, tmp_path / "masks.png")
    assert image_of(figures[0]) == [[1.0, 0.12, 1.0], [0.12, 1.0, 1.0]]


def test_a_kept_weight_has_the_same_colour_in_every_mask(figures, tmp_path):
    masks = {"dense": torch.ones(2, 2) > 0, "gone": torch.zeros(2, 2) > 0}
    plot_masks(masks, tmp_path / "masks.png")
    assert {axes.images[0].get_clim() for axes in figures[0].axes} == {(0, 1)}


def test_only_the_first_channels_are_shown(figures, tmp_path):
    masks = {"ck": torch.ones(6, 5, 3, 3) > 0, "FC": torch.ones(20, 20) > 0}
    plot_masks(masks, tmp_path / "masks.png", n_out=2, n_in=3)
    shapes = [axes.images[0].get_array().shape for axes in figures[0].axes]
    assert shapes == [(2 * 4, 3 * 4), (3 * 2, 3 * 3)]
