"""The report of runs: its texts, and which pictures it has."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starfire_prune.experiments.tables import load_table
from starfire_prune.recipe.load import load_recipe
from starfire_prune.reporting import figures as pictures
from starfire_prune.reporting import mask_figures as mask_pictures
from starfire_prune.reporting.document import Images, Report
from starfire_prune.reporting.labels import file_name, numbered
from starfire_prune.reporting.layer_section import chosen_layer
from starfire_prune.reporting.report import PICTURES, build_report, write_report
from starfire_prune.reporting.runs import ReportedRun, ReportError, read_run
from tests.support.reported import TOP1, leave_dense, leave_evaluation, leave_run

Left = Callable[..., ReportedRun]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have their own tests, and take a while."""
    for module in (pictures, mask_pictures):
        monkeypatch.setattr(module, "rendered", lambda *_: Images(b"light", b"dark", 960, 720))


@pytest.fixture
def left(tmp_path: Path) -> Left:
    """Leaves and reads a run."""

    def leave(name: str, *overrides: str, **options: Any) -> ReportedRun:
        own = leave_dense if name.startswith("dense") else leave_run
        return read_run(own(tmp_path / name, *overrides, **options), unfinished=True)

    return leave


def names(report: Report) -> list[str]:
    return [picture.name for picture in report.pictures]


def headings(report: Report) -> list[str]:
    return [section.heading for section in report.sections]


def test_a_report_of_several_variants(left):
    report = build_report([left("ck", "seed=0"), left("dense", "seed=0", top1=(0.5,) * 4)])
    assert report.title == "2 ways of training resnet18 on digits"
    assert report.summary == (
        "2 runs of 2 variants: resnet18 on digits (10 classes, 16 px), 4 epochs, seed 0.",
        "Dense training ends at 50.00 % top-1.",
        "Pruned training ends at 75.00 % top-1 (+25.00 points to dense).",
        "ck is furthest from the sparsity asked for: 60.0 % asked, 61.3 % reached.",
    )
    assert report.caveats == ()
    assert headings(report) == ["Results", "Accuracy", "Sparsity", "Layers and masks", "Each run"]
    assert names(report) == [
        *("accuracy", "top5", "last-and-best", "sparsity", "asked-and-reached"),
        *("layers-ck", "masks-ck"),
    ]
    assert [row[0] for row in report.sections[0].grids[0].rows] == ["dense", "ck"]


def test_a_report_of_a_dense_run_has_no_masks(left):
    report = build_report([left("dense-seed3")])
    assert report.title == ("dense: resnet18 on digits (10 classes, 16 px), 4 epochs, seed 3")
    assert headings(report) == ["Results", "Accuracy", "Sparsity", "Each run"]


def test_the_summary_names_the_highest_and_the_lowest_pruned_variant(left):
    runs = [left("ck"), left("window", "pruning.method=window", top1=(0.1, 0.1, 0.1, 0.25))]
    summary = build_report(runs).summary
    assert "The highest of the pruned variants is ck, at 75.00 % top-1." in summary
    assert "The lowest is window, at 25.00 %." in summary


def test_the_summary_says_if_all_runs_reached_their_targets(left):
    run = left("magnitude", "pruning.method=magnitude")
    assert build_report([run]).summary[-1] == (
        "All sparse runs have reached the sparsity asked for within 1 point."
    )


def test_different_data_are_a_caveat_and_runs_are_not_ranked(left, tmp_path):
    other = left(
        "folder-ck", "data.name=folder", f"data.root={tmp_path}/birds", "pruning.amount=0.5"
    )
    report = build_report([left("ck"), other])
    assert report.caveats[0] == (
        "The runs have different data sets: their accuracies can't be compared (digits (10 "
        "classes, 16 px): ck; birds (10 classes, 16 px): folder-ck)."
    )
    assert not [line for line in report.summary if "highest" in line]


def test_shards_in_different_folders_are_different_data(left):
    runs = [left("ck"), left("window", "pruning.method=window")]
    told = []
    for run, folder in zip(runs, ("birds", "cars"), strict=True):
        data = run.recipe.data.model_copy(update={"name": "wds/x", "root": f"/data/{folder}"})
        recipe = run.recipe.model_copy(update={"data": data})
        told.append(dataclasses.replace(run, recipe=recipe))
    assert (
        "(wds/x in birds (10 classes, 16 px): ck; wds/x in cars (10 classes, 16 px): window)"
        in (build_report(told).caveats[0])
    )


def test_several_runs_of_a_seed_are_a_caveat(left, tmp_path):
    runs = [left("ck-seed0", "seed=0"), left("ck-seed1", "seed=1"), left("copied", "seed=0")]
    assert build_report(runs).caveats == (
        f"The same settings and the same seed 0 have {tmp_path}/ck-seed0, {tmp_path}/copied. If "
        f"they are copies, means count one run several times, and deviations are too small.",
    )


def test_runs_of_a_table_come_in_its_order_and_others_of_their_names_after(left, tmp_path):
    ck, dense = left("table/ck-seed3"), left("table/dense-seed3", "pruning=none")
    other = left("else/ck-seed3", "pruning.amount=0.5")
    file = tmp_path / "table" / "table.yaml"
    runs = "[{name: ck}, {name: dense, set: {pruning: none}}]"
    file.write_text(
        f"{{title: T, base: small.yaml, columns: [{{name: top1}}], runs: {runs}}}", encoding="utf-8"
    )
    report = build_report([other, dense, ck], load_table(file))
    rows = report.sections[0].grids[0].rows
    assert [row[0] for row in rows] == ["table/ck-seed3", "dense", "else/ck-seed3"]


def test_different_numbers_of_epochs_are_a_caveat(left):
    runs = [left("ck"), left("long", "epochs=5", top1=(0.5,) * 5)]
    assert "The runs have different numbers of epochs (4: ck; 5: long)." in (
        build_report(runs).caveats
    )


def test_runs_whose_pruning_is_unfinished_are_a_caveat(left):
    report = build_report([left("ck", finishes=False), left("other", "seed=1")])
    assert report.caveats[0] == (
        "The pruning is not finished: ck. Their weights have not reached the sparsity asked for."
    )


def test_unfinished_runs_are_a_caveat_and_have_no_masks(left):
    report = build_report([left("ck", top1=TOP1[:2], exports=False)])
    assert report.caveats[0].startswith("Not finished: ck (2 of 4 epochs). They count in means")
    assert "Layers and masks" not in headings(report)


def test_a_run_without_an_epoch_is_reported(left):
    report = build_report([left("ck", top1=(), exports=False)])
    assert "Not finished: ck (0 of 4 epochs)" in report.caveats[0]
    assert report.runs.rows[0][report.runs.header.index("top-1, last epoch [%]")] == "-"


def test_an_average_of_weights_is_a_caveat_with_its_own_column(left):
    run = left("dense")
    rows = [{**row, "ema_top1": 0.8125} for row in run.metrics]
    report = build_report([ReportedRun(run.folder, run.recipe, rows)])
    assert "Exported with a moving average of the weights: dense. Its top-1" in report.caveats[0]
    column = report.runs.header.index("top-1 of the average [%]")
    assert report.runs.rows[0][column] == "81.25"


def test_epochs_in_int8_are_a_caveat_with_the_accuracy_before(left):
    run = left("dense")
    rows = [*run.metrics[:-1], {**run.metrics[-1], "phase": "quantization"}]
    report = build_report([ReportedRun(run.folder, run.recipe, rows)])
    assert report.caveats[0] == (
        "The last epochs are measured in int8, after training with its rounding: dense. Their "
        "top-1 before is in the table of runs."
    )
    column = report.runs.header.index("top-1 before int8 [%]")
    assert report.runs.rows[0][column] == "70.00"


def test_long_runs_have_a_picture_of_their_last_half(left):
    report = build_report([left("ck", "epochs=8", top1=(0.5,) * 8)])
    assert names(report)[:2] == ["accuracy", "accuracy-closer"]


def test_many_variants_have_a_picture_per_method_with_dense(left, tmp_path):
    run = left("dense")
    small = tmp_path / "small.yaml"
    amounts = [load_recipe(small, [f"pruning.amount=0.{n}"]) for n in range(20, 34)]
    pruned = [ReportedRun(Path(f"ck-{n}"), own, run.metrics) for n, own in enumerate(amounts)]
    runs = [run, *pruned]
    shown = [name for name in names(build_report(runs)) if name.startswith("accuracy")]
    assert shown == ["accuracy-ck-1", "accuracy-ck-2"]


def test_attacks_on_the_model_itself_have_pictures_and_all_are_in_the_table(tmp_path):
    folder = leave_run(tmp_path / "ck")
    attack = {"attack": "fgsm", "epsilon": 0.1, "top1": 0.25}
    leave_evaluation(folder, attack, {**attack, "source": "dense", "top1": 0.5})
    report = build_report([read_run(folder)])
    (section,) = [own for own in report.sections if own.heading == "Robustness"]
    assert [picture.name for picture in section.pictures] == ["robustness-fgsm"]
    assert section.grids[0].rows == (("ck", "25.00", "50.00"),)
    caption = section.pictures[0].caption
    assert "ε is the most by which pixels in [0, 1] change. 24 images." in caption


def test_a_caption_says_that_a_curve_begins_at_the_clean_images(tmp_path):
    folder = leave_run(tmp_path / "ck")
    clean = {"attack": "none", "epsilon": 0.0, "top1": 0.75}
    leave_evaluation(folder, clean, {"attack": "fgsm", "epsilon": 0.1, "top1": 0.25})
    report = build_report([read_run(folder)])
    (picture,) = (own for own in report.pictures if own.name == "robustness-fgsm")
    assert "change; at 0 are the clean images. 24 images." in picture.caption


def test_captions_contain_the_settings(left):
    for picture in build_report([left("ck")]).pictures:
        assert "resnet18 on digits (10 classes, 16 px), 4 epochs, seed 3" in picture.caption
        assert picture.alt


def test_masks_are_of_the_middle_layer_or_the_one_that_is_named(left):
    run = left("ck")
    middle, named = (build_report([run], layer=layer) for layer in (None, "conv1"))
    assert "layer2.0.conv2, of shape 8×8×3×3" in middle.pictures[-1].caption
    assert "conv1, of shape " in named.pictures[-1].caption


def test_a_layer_that_is_not_pruned_raises(left):
    run = left("ck")
    with pytest.raises(
        ReportError, match=r"--layer \(=fc\) is not a convolution that .* prunes; it prunes"
    ):
        build_report([left("dense"), run], layer="fc")


def test_a_model_with_only_pointwise_convolutions_shows_one_of_them(left):
    run = left("ck", "pruning.include=[layer2.0.downsample.0]")
    layer = chosen_layer(run)
    assert layer is not None
    assert layer.name == "layer2.0.downsample.0"


def test_pictures_of_the_same_name_have_distinct_files(left):
    picture = build_report([left("dense")]).pictures[0]
    assert [own.name for own in numbered([picture] * 3)] == ["accuracy", "accuracy-2", "accuracy-3"]
    assert file_name("../a b") == "a-b"
    assert file_name("…") == "run"


def test_the_pictures_replace_those_of_an_earlier_report(left, tmp_path):
    output = tmp_path / "out"
    write_report(build_report([left("ck")]), output)
    assert (output / PICTURES / "masks-ck.png").exists()
    report = build_report([left("dense")])
    write_report(report, output)
    assert {path.stem for path in (output / PICTURES).iterdir()} == set(names(report))


def test_other_files_in_the_folder_are_kept(left, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "masks-ck.png").write_bytes(b"mine")
    write_report(build_report([left("ck")]), output)
    write_report(build_report([left("dense")]), output)
    assert (output / "masks-ck.png").read_bytes() == b"mine"


def test_a_report_is_written_as_a_page_its_tables_and_pictures(left, tmp_path):
    report = build_report([left("ck")])
    page = write_report(report, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    written = {path.relative_to(page.parent).as_posix() for path in page.parent.rglob("*.*")}
    assert written == {
        *("report.html", "report.md", "report.csv"),
        *(f"{PICTURES}/{name}.png" for name in names(report)),
    }
