"""Figures of several runs: what they show, on light and dark pages."""

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from starfire_prune.engine.sparsity import LayerSparsity
from starfire_prune.reporting.figures import (
    Points,
    Series,
    bars,
    curves,
    points,
    shortened,
)
from starfire_prune.reporting.style import DARK, DENSE_LINE, LIGHT, Line, lines_of

BLUE = Line("#0072b2")
SERIES = [
    Series("dense", DENSE_LINE, (((1.0, 2.0), (50.0, 60.0)), ((1.0, 2.0), (52.0, 64.0)))),
    Series("ck", BLUE, (((1.0, 2.0), (40.0, 61.0)),)),
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on, the light one first; small, as nobody looks."""
    saved: list[Any] = []
    save = Figure.savefig

    def note(figure: Figure, file: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, file, **{**options, "dpi": 20})

    monkeypatch.setattr(Figure, "savefig", note)
    return saved


def layer(name: str, zeros: int, shape: tuple[int, ...] = (4, 4, 3, 3)) -> LayerSparsity:
    kind = "linear" if len(shape) == 2 else "conv"
    return LayerSparsity(name, kind, shape, zeros, 100, 0, 0, True)


def lines_labelled(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines}


def legend_names(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


# Curves


def test_a_variant_has_the_mean_curve_of_its_runs(figures):
    curves(SERIES, ("epoch", "top-1 [%]"))
    lines = lines_labelled(figures[0].axes[0])
    assert list(lines["dense"].get_ydata()) == [51.0, 62.0]
    assert list(lines["ck"].get_ydata()) == [40.0, 61.0]


def test_a_band_goes_from_the_lowest_to_the_highest_run(figures):
    curves(SERIES, ("epoch", "top-1 [%]"))
    (band,) = figures[0].axes[0].collections  # of the variant that has several runs
    box = band.get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (50.0, 64.0)


def test_the_legend_names_curves_in_the_order_of_their_last_values(figures):
    empty, low = Series("empty", BLUE, ()), Series("low", BLUE, (((1.0,), (0.0,)),))
    curves([empty, low, *reversed(SERIES)], ("epoch", "top-1 [%]"))
    assert legend_names(figures[0]) == ["dense", "ck", "low", "empty"]


def test_the_legend_shows_the_lines_of_the_curves(figures):
    dashed = Line("#0072b2", (5, 2))
    curves([Series("ck", dashed, SERIES[0].curves)], ("epoch", "top-1 [%]"))
    (line,) = figures[0].axes[0].get_legend().get_lines()
    assert (line.get_color(), line._dash_pattern[1] is not None) == ("#0072b2", True)


def test_pictures_have_the_colours_of_their_page(figures):
    images = curves(SERIES, ("epoch", "top-1 [%]"))
    for png, theme in ((images.light, LIGHT), (images.dark, DARK)):
        with Image.open(io.BytesIO(png)) as image:
            assert f"#{image.convert('RGB').tobytes()[:3].hex()}" == theme.background
    light, dark = (lines_labelled(figure.axes[0]) for figure in figures)
    assert (light["dense"].get_color(), dark["dense"].get_color()) == (LIGHT.ink, DARK.ink)


def test_a_name_of_any_characters_is_written_verbatim(figures):
    name = "_$x_{ _界\\"
    curves([Series(name, BLUE, SERIES[0].curves)], ("epoch", "top-1 [%]"))
    assert legend_names(figures[0]) == [name]


def test_a_closer_picture_shows_what_its_epochs_reach(figures):
    curves(SERIES, ("epoch", "top-1 [%]"), x_from=2.0)
    low, high = figures[0].axes[0].get_ylim()
    assert 59.0 < low < 60.0
    assert 64.0 < high < 65.0


def test_a_curve_that_ends_before_the_others_is_not_drawn_on(figures):
    curves([*SERIES, Series("half", BLUE, (((1.0,), (45.0,)),))], ("epoch", "top-1 [%]"))
    axes = figures[0].axes[0]
    assert list(lines_labelled(axes)["half"].get_xdata()) == [1.0]


@pytest.mark.parametrize("own", [(), (((), ()),), (((1.0,), (50.0,)),)])
def test_runs_of_no_or_one_epoch_have_a_picture(own, figures):
    curves([Series("ck", BLUE, own)], ("epoch", "top-1 [%]"))
    assert len(figures) == 2


@given(st.text(max_size=60), st.integers(3, 30))
def test_labels_are_no_longer_than_asked(label, longest):
    short = shortened(label, longest)
    assert len(short) <= longest
    assert short == label or "…" in short


# Colours


def test_dense_lines_have_the_inks_colour_and_others_differ():
    lines = lines_of(["dense", *["ck"] * 6, *["window"] * 5])
    assert lines[0] == DENSE_LINE
    assert len({(line.colour, line.dashes) for line in lines}) == len(lines)


def test_many_variants_have_their_turns_within_their_method():
    lines = lines_of([*["ck"] * 12, *["window"] * 12])
    assert lines[:12] == lines[12:]
    assert len(set(lines[:12])) == 12


# Points and bars


def test_points_show_each_run_of_a_variant(figures):
    points([Points("ck", BLUE, (60.0, 61.0), (62.0,))], "top-1 [%]", ("last", "best"))
    hollow, filled = figures[0].axes[0].lines[:2]
    assert (list(filled.get_xdata()), list(hollow.get_xdata())) == ([60.0, 61.0], [62.0])
    assert hollow.get_markerfacecolor() == "none"


def test_bars_are_the_sparsities_of_layers_with_what_was_asked_for(figures):
    layers = [layer("conv1", 50), layer("layer1.0", 70), layer("layer1.1", 61), layer("fc", 60)]
    bars(layers, 60.0)
    axes = figures[0].axes[0]
    assert [bar.get_height() for bar in axes.patches] == [50.0, 70.0, 61.0, 60.0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["conv1", "layer1", "fc"]
    assert {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"} == {60.0}


def test_bars_of_another_kind_of_layer_have_another_colour(figures):
    layers = [layer("a", 1), layer("b", 1, (4, 4, 1, 1)), layer("c", 1, (4, 4))]
    bars(layers, 1.0)
    assert len({bar.get_facecolor() for bar in figures[0].axes[0].patches}) == 3
