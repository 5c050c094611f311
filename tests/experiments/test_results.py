"""Results of a table: what is read from the runs' folders, and the table of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from starfire_prune.experiments.results import RunResult, format_results, read_result
from starfire_prune.experiments.settings import Column
from starfire_prune.experiments.tables import Run, Table, load_table
from starfire_prune.recipe.load import dump_recipe

RECIPE = """\
model: {name: resnet18, num_classes: 10}
data: {name: digits, batch_size: 64}
optimizer: {name: sgd, lr: 0.05}
epochs: 4
pruning: {method: ck, amount: 0.6, era: [1, 3]}
"""
TABLE = """\
title: A table
base: base.yaml
columns: [{name: top1, epoch: 4}]
runs:
- {name: dense, set: {pruning: none}, paper: {top1: 76.29}}
- {name: ck, paper: {top1: 75.4}}
- {name: random, set: {pruning.method: random}}
"""
TOP1 = (0.5, 0.75, 0.7, 0.75)
PHASES = ("dense", "era", "era", "fixed")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(RECIPE, encoding="utf-8")
    path = tmp_path / "table.yaml"
    path.write_text(TABLE, encoding="utf-8")
    return path


@pytest.fixture
def ck(file: Path) -> Run:
    return load_table(file).runs[1]


def leave(
    run: Run, output: Path, epochs: int = 4, *, top1: Any = TOP1, finished: bool = True
) -> Path:
    """Leave in the run's folder what so many epochs do."""
    folder = output / run.folder
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8")
    sparse = run.recipe.pruning != "none"
    rows = [
        {
            "epoch": epoch,
            "top1": top1[epoch],
            "top5": 0.9,
            "phase": PHASES[epoch] if sparse else "dense",
            "sparsity": 0.61,
            "sparsity_network": 0.2 * epoch if sparse else 0.0,
        }
        for epoch in range(epochs)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if finished:
        (folder / "export").mkdir()
        (folder / "export" / "model.safetensors").touch()
    return folder


def results_of(table: Table, output: Path) -> list[RunResult]:
    return [read_result(run, output) for run in table.runs]


# Reading a folder


def test_a_finished_run(ck, tmp_path):
    leave(ck, tmp_path)
    result = read_result(ck, tmp_path)
    assert (result.epochs, result.finished, result.error) == (4, True, "")
    assert result.numbers.asked == 60.0
    assert result.sparsity == pytest.approx(60.0)


def test_a_run_that_has_not_begun(ck, tmp_path):
    result = read_result(ck, tmp_path)
    assert (result.epochs, result.finished, result.error, result.sparsity) == (0, False, "", None)


def test_a_run_that_was_broken_off(ck, tmp_path):
    folder = leave(ck, tmp_path, 2, finished=False)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"epoch": 2, "top1": 0.')
    result = read_result(ck, tmp_path)
    assert (result.epochs, result.finished) == (2, False)


@pytest.mark.parametrize(("epochs", "sparsity"), [(1, None), (3, None), (4, pytest.approx(60.0))])
def test_sparsity_is_there_once_the_masks_are_fixed(epochs, sparsity, ck, tmp_path):
    leave(ck, tmp_path, epochs)
    assert read_result(ck, tmp_path).sparsity == sparsity


def test_sparsity_is_there_where_the_era_ends_with_the_run(file, tmp_path):
    run = load_table(file, ["pruning.era=[1, 4]"]).runs[1]
    folder = leave(run, tmp_path)
    rows = (folder / "metrics.jsonl").read_text().replace("fixed", "era")
    (folder / "metrics.jsonl").write_text(rows)
    assert read_result(run, tmp_path).sparsity == pytest.approx(60.0)


def test_a_dense_run_has_no_sparsity(file, tmp_path):
    dense = load_table(file).runs[0]
    leave(dense, tmp_path)
    result = read_result(dense, tmp_path)
    assert (result.numbers.asked, result.sparsity) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, 75),
        ({"epoch": "last"}, 75),
        ({"epoch": 1}, 50),
        ({"epoch": "best"}, 75),
        ({"epoch": 5}, None),
        ({"metric": "top5"}, 90),
        ({"metric": "sparsity"}, 60),
        ({"metric": "sparsity", "epoch": 2}, 20),
        ({"metric": "sparsity", "epoch": "best"}, 20),
        ({"metric": "best_epoch"}, 2),
        ({"epoch": 4, "since": 3}, 5),
        ({"epoch": 4, "since": 1}, 25),
        ({"since": 9}, None),
    ],
)
def test_value_of_a_column(settings, value, ck, tmp_path):
    leave(ck, tmp_path)
    read = read_result(ck, tmp_path).value(Column(name="x", **settings))
    assert read == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize("metric", ["top1", "best_epoch"])
@pytest.mark.parametrize("epoch", ["best", "last"])
def test_the_best_and_the_last_epoch_are_only_known_at_the_end(metric, epoch, ck, tmp_path):
    leave(ck, tmp_path, 3)
    settings = {"metric": metric, **({"epoch": epoch} if metric == "top1" else {})}
    assert read_result(ck, tmp_path).value(Column(name="x", **settings)) is None


def test_a_metric_that_was_not_finite_is_not_there(ck, tmp_path):
    leave(ck, tmp_path, top1=(0.5, None, 0.7, None))
    result = read_result(ck, tmp_path)
    assert result.value(Column(name="x")) is None
    assert result.value(Column(name="x", metric="best_epoch")) == 3


# Folders that are not the run's


def test_the_run_of_another_recipe_gives_no_numbers(file, ck, tmp_path):
    folder = leave(load_table(file, ["pruning.amount=0.5"]).runs[1], tmp_path)
    result = read_result(ck, tmp_path)
    assert (result.metrics, result.finished) == ({}, False)
    assert result.error == (
        f"{folder} holds the run of another recipe (pruning.amount: 0.5 there, 0.6 here)"
    )


def test_the_number_of_workers_makes_no_other_run(file, ck, tmp_path):
    leave(load_table(file, ["data.workers=7"]).runs[1], tmp_path)
    assert not read_result(ck, tmp_path).error


def test_data_behind_a_variable_that_is_not_set_are_taken_to_be_the_same(
    file, tmp_path, monkeypatch
):
    settings = ["data={name: folder, batch_size: 64, root: '${PHOTOGRAPHS}'}"]
    monkeypatch.setenv("PHOTOGRAPHS", "/photographs")
    leave(load_table(file, settings).runs[1], tmp_path)
    monkeypatch.delenv("PHOTOGRAPHS")
    run = load_table(file, settings, keep_unset=True).runs[1]
    assert read_result(run, tmp_path).finished


def test_trackers_and_kept_checkpoints_make_no_other_run(file, tmp_path):
    kept = ["training={keep_checkpoints: [1], trackers: tensorboard}"]
    leave(load_table(file, kept).runs[1], tmp_path)
    assert read_result(load_table(file).runs[1], tmp_path).error == ""


def test_other_data_are_another_run(file, tmp_path, monkeypatch):
    settings = ["data={name: folder, batch_size: 64, root: '${PHOTOGRAPHS}'}"]
    monkeypatch.setenv("PHOTOGRAPHS", "/photographs")
    leave(load_table(file, settings).runs[1], tmp_path)
    monkeypatch.setenv("PHOTOGRAPHS", "/others")
    result = read_result(load_table(file, settings, keep_unset=True).runs[1], tmp_path)
    assert "(data.root: '/photographs' there, '/others' here)" in result.error


@pytest.mark.parametrize("line", ["{", "[]", '{"top1": 1}', '{"epoch": "x"}'])
def test_damaged_metrics_are_an_error_with_their_path(line, ck, tmp_path):
    folder = leave(ck, tmp_path)
    (folder / "metrics.jsonl").write_text(line + "\n")
    result = read_result(ck, tmp_path)
    assert result.error.startswith(f"{folder}/metrics.jsonl is damaged (")
    assert not result.finished


def test_a_damaged_recipe_is_an_error_with_its_path(ck, tmp_path):
    folder = leave(ck, tmp_path)
    (folder / "recipe.yaml").write_text("sead: 1\n")
    assert read_result(ck, tmp_path).error.startswith(f"{folder}/recipe.yaml: ")


# The table


def test_format_sets_the_papers_numbers_beside_those_that_are_there(file, tmp_path):
    table = load_table(file)
    leave(table.runs[0], tmp_path, top1=(0.1, 0.2, 0.3, 0.7631))
    leave(table.runs[1], tmp_path, 3, finished=False)
    assert format_results(table, results_of(table, tmp_path)).splitlines() == [
        "A table",
        "",
        "run     epochs  sparsity asked [%]  reached [%]  top1 [%]  paper  difference",
        "------  ------  ------------------  -----------  --------  -----  ----------",
        "dense      4/4                 0.0          0.0     76.31  76.29       +0.02",
        "ck         3/4                60.0            -         -  75.40           -",
        "random     0/4                60.0            -         -      -           -",
    ]


def test_format_leaves_the_paper_out_where_it_has_no_numbers(file, tmp_path):
    file.write_text(TABLE.split("- {name: dense")[0] + "- {name: ck}\n")
    table = load_table(file)
    leave(table.runs[0], tmp_path)
    heading, _, row = format_results(table, results_of(table, tmp_path)).splitlines()[2:]
    assert " ".join(heading.split()) == "run epochs sparsity asked [%] reached [%] top1 [%]"
    assert row.split() == ["ck", "4/4", "60.0", "60.0", "75.00"]


def test_format_gives_mean_and_deviation_over_the_seeds(file, tmp_path):
    file.write_text(TABLE.replace("runs:", "seeds: [0, 1, 2]\nruns:"))
    table = load_table(file)
    for run, top1 in zip(table.runs[3:6], (0.74, 0.75, 0.79), strict=True):
        leave(run, tmp_path, top1=(*TOP1[:3], top1))
    for run, top1 in zip(table.runs[6:8], (0.5, 0.6), strict=True):
        leave(run, tmp_path, top1=(*TOP1[:3], top1))
    dense, ck, random = format_results(table, results_of(table, tmp_path)).splitlines()[4:]
    assert dense.split() == ["dense", "0/12", "0.0", "-", "-", "76.29", "-"]
    assert " ".join(ck.split()) == "ck 12/12 60.0 60.0 76.00 ± 2.65 75.40 +0.60"
    assert " ".join(random.split()) == "random 8/12 60.0 60.0 55.00 ± 7.07 (2 of 3) - -"


def test_format_writes_epochs_as_integers(file, tmp_path):
    columns = "[{name: convergence, metric: best_epoch}]"
    file.write_text(
        f"title: T\nbase: base.yaml\ncolumns: {columns}\nruns: [{{name: ck, paper: "
        "{convergence: 31}}]\n"
    )
    table = load_table(file)
    leave(table.runs[0], tmp_path)
    heading, _, row = format_results(table, results_of(table, tmp_path)).splitlines()[2:]
    assert heading.endswith("convergence  paper  difference")
    assert row.split()[-3:] == ["2", "31", "-29"]


def test_format_lists_the_errors_of_folders_at_the_end(file, tmp_path):
    other = load_table(file, ["optimizer.lr=0.1"])
    leave(other.runs[1], tmp_path)
    table = load_table(file)
    *_, row, _, problem = format_results(table, results_of(table, tmp_path)).splitlines()
    assert row.split() == ["ck", "0/4", "60.0", "-", "-", "75.40", "-"]
    assert problem == (
        f"ck-seed0: {tmp_path}/ck-seed0 holds the run of another recipe "
        "(optimizer.lr: 0.1 there, 0.05 here)"
    )


def test_a_folder_that_two_runs_share_is_read_by_both(file, tmp_path):
    file.write_text(
        TABLE.split("- {name: dense")[0]
        + "- {name: a, paper: {top1: 70}}\n- {name: b, paper: {top1: 80}}\n"
    )
    table = load_table(file)
    leave(table.runs[0], tmp_path)
    a, b = format_results(table, results_of(table, tmp_path)).splitlines()[4:]
    assert a.split()[-3:] == ["75.00", "70.00", "+5.00"]
    assert b.split()[-3:] == ["75.00", "80.00", "-5.00"]
