"""The tables of a report, from runs whose metrics are made by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from starfire_prune.engine.settings import parse_pruning
from starfire_prune.experiments.tables import Table, load_table
from starfire_prune.recipe.load import load_recipe
from starfire_prune.reporting.document import Grid
from starfire_prune.reporting.grids import (
    above_dense,
    compared,
    era_text,
    paper_grid,
    robustness_grid,
    runs_grid,
    variants_grid,
)
from starfire_prune.reporting.runs import ReportedRun, ReportError, Variant, read_run, variants_of
from starfire_prune.reporting.style import lines_of
from tests.reporting.test_attacks import CLEAN, evaluation, fgsm
from tests.support.reported import leave_dense, leave_run
from tests.support.runs import RECIPE

TABLE = """\
title: A table
base: small.yaml
seeds: [0, 1]
columns: [{name: top1}, {name: convergence, metric: best_epoch}]
runs:
- {name: dense, set: {pruning: none}, paper: {top1: 76.5, convergence: 4}}
- {name: ck, paper: {top1: 70.0}}
- {name: window, set: {pruning.method: window}}
"""

Make = Callable[..., ReportedRun]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def made(recipe_file: Path) -> Make:
    """Makes a run of the small recipe, from its top-1 after each epoch."""

    def make(
        name: str, top1: tuple[float, ...], *overrides: str, reached: float = 0.61
    ) -> ReportedRun:
        recipe = load_recipe(recipe_file, overrides)
        rows = [
            {"epoch": e, "top1": value, "top5": 0.9, "sparsity": 0.6, "sparsity_network": reached}
            for e, value in enumerate(top1)
        ]
        return ReportedRun(Path(name), recipe, rows)

    return make


@pytest.fixture
def variants(made: Make) -> tuple[Variant, ...]:
    return variants_of(
        [
            made("dense-seed0", (0.25, 0.5, 0.75, 0.75), "pruning=none", "seed=0", reached=0.0),
            made("ck-seed0", (0.25, 0.75, 0.5, 0.5), "seed=0"),
            made("ck-seed1", (0.25, 0.5, 0.5, 0.625), "seed=1"),
        ]
    )


def columns(grid: Grid, row: int) -> dict[str, str]:
    return dict(zip(grid.header, grid.rows[row], strict=True))


def table_of_variants(variants: tuple[Variant, ...]) -> Grid:
    lines = lines_of([own.method for own in variants])
    return variants_grid(variants, dict(zip((own.name for own in variants), lines, strict=True)))


def test_a_variant_has_the_means_of_its_seeds(variants):
    assert columns(table_of_variants(variants), 1) == {
        "variant": "ck",
        "top-1, last epoch [%]": "56.25 ± 8.84",
        "to dense": "-18.75",
        "top-1, best epoch [%]": "68.75 ± 8.84",
        "best epoch": "3 ± 1",
        "gain, last 10 epochs": "-",
        "sparsity asked [%]": "60.0",
        "reached [%]": "61.0 ± 0.0",
        "method": "ck",
        "era": "2–3",
        "epochs": "4",
        "runs": "2",
    }


@pytest.mark.parametrize(
    ("pruning", "expected"),
    [
        ({"era": [1, 3]}, "2–3"),
        ({"era_updates": [1000, 2500]}, "updates 1,001–2,500"),
        (None, "-"),
    ],
)
def test_an_era_is_given_in_epochs_or_updates_from_1(pruning, expected):
    settings = pruning and parse_pruning({"method": "ck", "amount": 0.6, **pruning})
    assert era_text(settings or "none") == expected


def test_dense_training_is_not_compared_with_itself(variants):
    dense = columns(table_of_variants(variants), 0)
    assert (dense["to dense"], dense["era"], dense["method"]) == ("-", "-", "dense")


def test_dense_training_with_other_settings_is_not_compared(made):
    variants = variants_of(
        [made("dense", (0.75,), "pruning=none", "optimizer.lr=0.1"), made("ck", (0.5,))]
    )
    assert above_dense(variants[1], variants) is None


def test_a_variant_shows_the_epochs_of_unfinished_runs(made):
    variants = variants_of(
        [made("ck-seed0", (0.5,) * 4, "seed=0"), made("ck-seed1", (0.9,), "seed=1")]
    )
    row = columns(table_of_variants(variants), 0)
    assert (row["epochs"], row["top-1, last epoch [%]"]) == ("4 (1 done)", "50.00 (1 of 2)")


def test_each_run_has_a_line_with_its_own_numbers(variants):
    grid = runs_grid(variants)
    row = columns(grid, 2)
    assert len(grid.rows) == 3
    assert (row["run"], row["seed"], row["top-1, last epoch [%]"]) == ("ck-seed1", "1", "62.50")
    assert (row["best epoch"], row["epochs done"], row["data"]) == ("4", "4", "digits")


# Beside the paper


@pytest.fixture
def table(recipe_file: Path, tmp_path: Path) -> Table:
    path = tmp_path / "table.yaml"
    path.write_text(TABLE, encoding="utf-8")
    return load_table(path)


@pytest.fixture
def left(tmp_path: Path) -> list[ReportedRun]:
    """Two seeds of the table's dense run, and one of CK with another amount."""
    return [
        read_run(leave_dense(tmp_path / "runs" / "dense-seed0", "seed=0")),
        read_run(leave_dense(tmp_path / "runs" / "dense-seed1", "seed=1", top1=(0.5,) * 4)),
        read_run(leave_run(tmp_path / "runs" / "ck-seed0", "seed=0", "pruning.amount=0.5")),
    ]


def test_the_papers_numbers_are_beside_the_means(table, left):
    grid = paper_grid(compared(table, left))
    assert grid is not None
    assert grid.header == (
        *("run", "top1 [%]", "paper", "difference"),
        *("convergence", "paper", "difference"),
    )
    assert grid.rows == (("dense", "62.50 ± 17.68", "76.50", "-14.00", "2 ± 1", "4", "-2"),)


def test_a_run_of_another_recipe_is_not_compared_with_the_paper(table, left):
    comparison = compared(table, left)
    assert [result.run.folder for result in comparison.results] == ["dense-seed0", "dense-seed1"]
    (error,) = comparison.errors
    assert "holds the run of another recipe (pruning.amount: 0.5 there, 0.6 here)" in error


def test_missing_runs_of_the_table_are_listed(table, left):
    assert compared(table, left).missing == ("ck-seed1", "window-seed0", "window-seed1")


def test_each_run_of_a_table_has_the_papers_numbers_too(table, left):
    grid = runs_grid(variants_of(left), compared(table, left))
    row = columns(grid, 1)
    assert (row["top1, table"], row["top1, paper"]) == ("50.00", "76.50")
    assert columns(grid, 2)["top1, paper"] == "-"


def test_a_run_of_the_table_that_is_given_twice_raises(table, left, tmp_path):
    again = read_run(leave_dense(tmp_path / "copy" / "dense-seed0", "seed=0"))
    with pytest.raises(ReportError) as caught:
        compared(table, [*left, again])
    assert str(caught.value) == (
        f"{tmp_path}/runs/dense-seed0 and {tmp_path}/copy/dense-seed0 are the same run of table, "
        f"dense-seed0: leave out all but one"
    )


@pytest.mark.parametrize("is_first", [True, False])
def test_a_run_of_the_same_name_from_elsewhere_has_none_of_the_tables_numbers(
    is_first, table, left, tmp_path
):
    other = read_run(leave_dense(tmp_path / "else" / "dense-seed0", "seed=0", "optimizer.lr=0.5"))
    runs = [other, *left] if is_first else [*left, other]
    comparison = compared(table, runs)
    assert [result.run.folder for result in comparison.results] == ["dense-seed0", "dense-seed1"]
    assert [error for error in comparison.errors if "/else/dense-seed0 holds" in error]
    grid = runs_grid(variants_of(runs), comparison)
    rows = [columns(grid, row) for row in range(len(runs))]
    numbers = {row["run"]: (row["top1, table"], row["top1, paper"]) for row in rows}
    assert numbers[str(other.folder)] == ("-", "-")
    assert numbers[str(left[0].folder)] == ("75.00", "76.50")


def test_a_table_without_numbers_of_the_paper_has_no_comparison(table, made):
    assert paper_grid(compared(table, [made("else", (0.5,))])) is None


# Robustness


def test_accuracies_under_attack_are_means_of_the_evaluated_seeds(made):
    runs = [made(f"ck-seed{seed}", (0.5,) * 4, f"seed={seed}") for seed in (0, 1, 2)]
    results = [evaluation(CLEAN, fgsm(0.1, top1)) for top1 in (0.25, 0.5)]
    evaluated = [
        ReportedRun(run.folder, run.recipe, run.metrics, None, own)
        for run, own in zip(runs, [*results, None], strict=True)
    ]
    grid = robustness_grid(variants_of(evaluated), {"ck": lines_of(["ck"])[0]})
    assert grid.header == ("variant", "clean [%]", "FGSM, ε 0.1 [%]")
    assert grid.rows == (("ck", "75.00 ± 0.00 (2 of 3)", "37.50 ± 17.68 (2 of 3)"),)
