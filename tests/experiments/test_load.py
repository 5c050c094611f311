"""Tables: what is read, what their runs resolve to, and what is refused in which words."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from starfire_prune.engine.settings import Pruning
from starfire_prune.experiments.load import (
    Run,
    Table,
    TableError,
    load_table,
    table_schema,
    write_table_schema,
)
from starfire_prune.experiments.settings import TableSettings
from starfire_prune.recipe.compare import differing_keys
from starfire_prune.recipe.load import dump_recipe, load_recipe
from starfire_prune.utils.settings import RecipeError
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
TABLES = RECIPES / "tables"
SCHEMA = TABLES / "table.schema.json"
SHIPPED = sorted(TABLES.glob("*.yaml"))

RECIPE = """\
model: {name: resnet18, num_classes: 10}
data: {name: digits, batch_size: 64}
optimizer: {name: sgd, lr: 0.05}
epochs: 10
pruning: {method: ck, amount: 0.6, era: [3, 6], schedule: cubic}
"""
TABLE = """\
title: Two runs
base: base.yaml
columns: [{name: top1, epoch: 10}]
"""
DENSE_AND_CK = "runs: [{name: dense, set: {pruning: none}}, {name: ck}]\n"

# By row of the paper's table and sparsity: how far below dense training it says a run ends
BELOW_DENSE_100 = {
    "ck-start40": {40: 0.46, 60: 0.95, 70: 1.36, 80: 2.12},
    "ck-start30": {40: 0.45, 60: 1.17, 70: 1.56, 80: 2.63},
    "ck-start20": {40: 0.74, 60: 1.58, 70: 1.96, 80: 3.50},
    "intra-start40": {40: 0.39, 60: 0.90, 70: 1.21, 80: 2.27},
    "intra-start30": {40: 0.45, 60: 1.12, 70: 1.80, 80: 2.63},
    "intra-start20": {40: 0.57, 60: 1.53, 70: 2.02, 80: 3.32},
    "window-start0": {60: 2.65, 70: 3.50, 80: 6.04},
    "window-start30": {60: 0.84, 70: 1.63, 80: 2.98},
    "ck-start40-era30": {60: 0.77, 70: 1.13},
    "intra-start40-era30": {60: 0.73, 70: 1.15},
}
BELOW_DENSE_90 = {
    "ck-start40": {40: 0.32, 60: 0.65, 70: 1.04, 80: 1.91},
    "ck-start30": {40: 0.29, 60: 1.00, 70: 1.42},
    "ck-start20": {40: 0.51, 60: 1.41, 70: 1.88, 80: 2.76},
    "intra-start40": {40: 0.34, 60: 0.50, 70: 0.89, 80: 2.03},
    "intra-start30": {40: 0.31, 60: 0.84, 70: 1.38},
    "intra-start20": {40: 0.52, 60: 1.60, 80: 3.03},
    "window-start0": {60: 2.62, 70: 3.46, 80: 5.77},
    "window-start30": {60: 0.97, 70: 1.37, 80: 2.62},
    "ck-start40-era30": {60: 0.58, 70: 0.91},
    "intra-start40-era30": {60: 0.48, 70: 0.87},
}
# By how much a run of Table 8 ends above the one of Table 1
ABOVE_TABLE_1 = {
    "ck-start40-60": 0.05,
    "ck-start30-60": -0.06,
    "ck-start20-60": 0.09,
    "intra-start40-60": 0.08,
    "intra-start30-60": 0.03,
    "intra-start20-60": 0.13,
    "window-start0-60": 0.26,
}
ROUNDING = 0.0151  # of two numbers, and of the binary fractions


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    monkeypatch.setenv("TINY_IMAGENET", "/data/tiny-imagenet-200")
    monkeypatch.setenv("TINY_IMAGENET20", "/data/tiny-imagenet-20")


@pytest.fixture
def no_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.delenv("TINY_IMAGENET", raising=False)
    monkeypatch.delenv("TINY_IMAGENET20", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A table of two runs, beside its recipe."""
    (tmp_path / "base.yaml").write_text(RECIPE, encoding="utf-8")
    path = tmp_path / "table.yaml"
    path.write_text(TABLE + DENSE_AND_CK, encoding="utf-8")
    return path


@functools.cache
def shipped(name: str) -> Table:
    return load_table(TABLES / f"{name}.yaml", keep_unset=True)


def run_of(table: Table, name: str) -> Run:
    (run,) = (run for run in table.runs if run.name == name)
    return run


def pruning_of(run: Run) -> Pruning:
    assert isinstance(run.recipe.pruning, Pruning)
    return run.recipe.pruning


def paper_of(name: str, column: str) -> dict[str, float]:
    return {run.name: run.paper[column] for run in shipped(name).runs}


def refusal_of(path: Path, *overrides: str, **options: Any) -> list[str]:
    """The lines of the TableError, which must not drag another exception along."""
    with pytest.raises(TableError) as caught:
        load_table(path, overrides, **options)
    error = caught.value
    assert error.__context__ is None or error.__suppress_context__
    return str(error).splitlines()


# The tables of the paper


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.usefixtures("data_sets")
def test_shipped_table_loads_and_its_runs_have_folders_of_their_own(path):
    runs = load_table(path).runs
    assert len({(run.name, run.seed) for run in runs}) == len(runs)
    pairs = {(run.folder, dump_recipe(run.recipe)) for run in runs}
    assert len(pairs) == len({folder for folder, _ in pairs}) == len({text for _, text in pairs})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.usefixtures("data_sets")
def test_shipped_table_gives_the_overrides_that_resolve_to_its_recipes(path):
    for run in load_table(path).runs:
        assert load_recipe(run.recipe_path, run.overrides) == run.recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_table_names_its_schema_for_editors(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=table.schema.json"


def test_all_tables_of_trained_networks_are_there():
    papers = ["table1", "table2", "table5", "table6", "table7", "table8"]
    assert [path.stem for path in SHIPPED] == ["quickstart", *papers, "tiny_imagenet20"]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("quickstart", {4: 0}),
        ("table1", {35: 35}),
        ("table2", {5: 7}),
        ("table5", {10: 30}),
        ("table6", {32: 32}),
        ("table7", {32: 32}),
        ("table8", {7: 7}),
    ],
)
def test_table_has_as_many_runs_and_numbers_as_the_papers(name, numbers):
    runs = shipped(name).runs
    assert {len(runs): sum(len(run.paper) for run in runs)} == numbers


@pytest.mark.parametrize(
    ("name", "run", "recipe"),
    [
        ("table1", "ck-start40-60", "resnet50_v15"),
        ("table2", "ck-start40-60", "resnet50_v1"),
        ("table5", "ck-60", "tiny_imagenet_resnet50"),
        ("quickstart", "ck", "quickstart"),
    ],
)
def test_base_recipe_is_the_run_that_its_comment_speaks_of(name, run, recipe):
    base = load_recipe(RECIPES / f"{recipe}.yaml", keep_unset=True)
    assert differing_keys(run_of(shipped(name), run).recipe, base) == {}


@pytest.mark.parametrize(
    ("name", "run", "method", "amount", "era"),
    [
        ("table1", "ck-start20-80", "ck", 0.8, (20, 40)),
        ("table1", "ck-start30-40", "ck", 0.4, (30, 50)),
        ("table1", "intra-start40-70", "intra", 0.7, (40, 60)),
        ("table1", "intra-start40-era30-60", "intra", 0.6, (40, 70)),
        ("table1", "window-start0-70", "window", 0.7, (0, 30)),
        ("table1", "window-start30-60", "window", 0.6, (30, 50)),
        ("table2", "window-start0-60", "window", 0.6, (0, 30)),
        ("table2", "ck-start30-80", "ck", 0.8, (30, 50)),
        ("table5", "window-80", "window", 0.8, (0, 10)),
        ("table5", "ck-20", "ck", 0.2, (0, 10)),
        ("table7", "ck-start40-era30-70", "ck", 0.7, (40, 70)),
        ("table8", "intra-start20-60", "intra", 0.6, (20, 40)),
    ],
)
def test_run_prunes_as_in_the_paper(name, run, method, amount, era):
    pruning = pruning_of(run_of(shipped(name), run))
    assert (pruning.method, pruning.amount, pruning.era) == (method, amount, era)


@pytest.mark.parametrize("name", ["table1", "table6", "table7", "table8"])
def test_names_tell_method_start_era_and_sparsity(name):
    for run in shipped(name).runs:
        if run.name == "dense":
            assert run.recipe.pruning == "none"
            continue
        match = re.fullmatch(r"(\w+)-start(\d+)(?:-era(\d+))?-(\d+)", run.name)
        assert match is not None
        start, length = int(match[2]), int(match[3] or (20 if int(match[2]) else 30))
        pruning = pruning_of(run)
        assert (str(pruning.method), pruning.era) == (match[1], (start, start + length))
        assert pruning.amount == pytest.approx(int(match[4]) / 100)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_window_spreads_and_linear_layers_are_pruned_too(path):
    for run in load_table(path, keep_unset=True).runs:
        if isinstance(pruning := run.recipe.pruning, Pruning):
            assert pruning.exact_layer_sparsity == (pruning.method == "window")
            assert pruning.fc != "none"


def test_table_1_trains_100_epochs_with_the_last_drop_at_90():
    for run in shipped("table1").runs:
        assert (run.recipe.epochs, run.recipe.lr_schedule.milestones) == (100, (30, 60, 90))
        assert (run.recipe.data.batch_size, run.recipe.optimizer.lr) == (64, 0.05)


def test_table_2_trains_resnet50_v1_at_batch_size_64_and_dense_as_in_its_section():
    for run in shipped("table2").runs:
        recipe = run.recipe
        assert recipe.model.name == "resnet50_v1"
        numbers = (recipe.data.batch_size, recipe.optimizer.lr, recipe.epochs)
        milestones = recipe.lr_schedule.milestones
        if run.name == "dense":
            assert (numbers, milestones) == ((128, 0.1, 90), (30, 60))
        elif run.name == "window-start0-60":
            assert (numbers, milestones) == ((64, 0.05, 90), (30, 60))
        else:
            assert (numbers, milestones) == ((64, 0.05, 100), (30, 60, 90))


@pytest.mark.parametrize("name", ["table6", "table7"])
def test_tables_6_and_7_read_runs_of_table_1(name):
    table, first = shipped(name), shipped("table1")
    assert table.trained_in == "table1"
    for run in table.runs:
        trained = run_of(first, run.name)
        assert (run.folder, run.recipe) == (trained.folder, trained.recipe)


def test_table_8_moves_the_last_drop_of_table_1s_runs_and_nothing_else():
    for run in shipped("table8").runs:
        first = run_of(shipped("table1"), run.name).recipe
        moved = {"lr_schedule.milestones": ((30, 60, 90), (30, 60, 80))}
        assert differing_keys(first, run.recipe) == moved


def test_both_dense_baselines_of_table_5_are_one_training():
    table = shipped("table5")
    folders = {run.folder for run in table.runs if run.recipe.pruning == "none"}
    assert folders == {"dense-window-seed0"}
    assert len({run.folder for run in table.runs}) == 9


@pytest.mark.parametrize(
    ("name", "below"), [("table1", BELOW_DENSE_100), ("table6", BELOW_DENSE_90)]
)
def test_accuracies_are_the_papers_dense_one_less_its_differences(name, below):
    top1 = paper_of(name, "top1")
    dense = top1.pop("dense")
    expected = {
        f"{row}-{sparsity}": dense - points
        for row, by_sparsity in below.items()
        for sparsity, points in by_sparsity.items()
    }
    assert top1 == {run: pytest.approx(value, abs=ROUNDING) for run, value in expected.items()}


def test_gains_of_table_7_are_table_1_less_table_6():
    after, before = paper_of("table1", "top1"), paper_of("table6", "top1")
    gains = paper_of("table7", "gain")
    assert list(gains) == list(before)
    off = {run for run, gain in gains.items() if abs(after[run] - before[run] - gain) > ROUNDING}
    assert off == {"ck-start40-era30-60"}  # as the file says


def test_accuracies_of_table_8_are_those_of_table_1_and_its_improvements():
    first = paper_of("table1", "top1")
    expected = {run: first[run] + points for run, points in ABOVE_TABLE_1.items()}
    assert paper_of("table8", "top1") == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize(
    ("name", "run", "paper"),
    [
        ("table1", "dense", {"top1": 76.29}),
        ("table1", "ck-start40-40", {"top1": 75.82}),
        ("table1", "ck-start40-60", {"top1": 75.33}),
        ("table1", "window-start0-80", {"top1": 70.25}),
        ("table1", "intra-start40-era30-70", {"top1": 75.14}),
        ("table2", "dense", {"epoch 90": 74.94}),
        ("table2", "ck-start40-60", {"epoch 90": 74.60, "epoch 100": 75.36}),
        ("table2", "intra-start40-60", {"epoch 90": 74.68, "epoch 100": 75.37}),
        ("table2", "window-start0-60", {"epoch 90": 74.78}),
        ("table2", "ck-start30-80", {"epoch 100": 73.66}),
        ("table5", "dense-window", {"top1": 52.03, "convergence": 40, "true sparsity": 1.0}),
        ("table5", "window-60", {"top1": 52.09, "convergence": 40, "true sparsity": 69.0}),
        ("table5", "window-80", {"top1": 51.16, "convergence": 36, "true sparsity": 84.0}),
        ("table5", "dense-ck", {"top1": 51.84, "convergence": 31, "true sparsity": 2.1}),
        ("table5", "ck-60", {"top1": 52.56, "convergence": 31, "true sparsity": 60.2}),
        ("table6", "dense", {"top1": 75.25}),
        ("table6", "intra-start20-80", {"top1": 72.22}),
        ("table6", "window-start0-70", {"top1": 71.79}),
        ("table7", "dense", {"gain": 1.04}),
        ("table7", "ck-start20-80", {"gain": 0.30}),
        ("table7", "window-start30-60", {"gain": 1.17}),
        ("table8", "ck-start40-60", {"top1": 75.39}),
        ("table8", "window-start0-60", {"top1": 73.89}),
    ],
)
def test_paper_numbers_of_a_run(name, run, paper):
    assert run_of(shipped(name), run).paper == paper


# What a table resolves to


def test_runs_have_the_tables_settings_then_their_own(file):
    file.write_text(
        TABLE + "set: {epochs: 12, optimizer.lr: 0.1}\n"
        "runs: [{name: a}, {name: b, set: {optimizer.lr: 0.2, pruning.amount: 0.5}}]\n"
    )
    a, b = load_table(file).runs
    assert (a.recipe.epochs, a.recipe.optimizer.lr) == (12, 0.1)
    assert (b.recipe.epochs, b.recipe.optimizer.lr, pruning_of(b).amount) == (12, 0.2, 0.5)
    assert b.overrides == (
        "epochs=12",
        "optimizer.lr=0.1",
        "optimizer.lr=0.2",
        "pruning.amount=0.5",
    )


def test_a_run_may_have_a_base_of_its_own(file):
    other = file.parent / "below" / "other.yaml"
    other.parent.mkdir()
    other.write_text(RECIPE.replace("epochs: 10", "epochs: 20"))
    file.write_text(TABLE + "runs: [{name: a}, {name: b, base: below/other.yaml}]\n")
    a, b = load_table(file).runs
    assert (a.recipe.epochs, b.recipe.epochs) == (10, 20)
    assert (a.recipe_path, b.recipe_path) == (file.parent / "base.yaml", other)


def test_folders_are_named_after_run_and_seed(file):
    assert [run.folder for run in load_table(file).runs] == ["dense-seed0", "ck-seed0"]


def test_each_run_is_trained_with_each_seed(file):
    file.write_text(TABLE + "seeds: [0, 2]\nruns: [{name: a}, {name: b, seeds: [5]}]\n")
    runs = load_table(file).runs
    assert [(run.name, run.seed, run.recipe.seed) for run in runs] == [
        ("a", 0, 0),
        ("a", 2, 2),
        ("b", 5, 5),
    ]
    assert [run.folder for run in runs] == ["a-seed0", "a-seed2", "b-seed5"]


def test_a_seed_for_all_runs_takes_the_place_of_the_tables(file):
    file.write_text(TABLE + "seeds: [0, 2]\nruns: [{name: a}, {name: b, set: {epochs: 11}}]\n")
    runs = load_table(file, ["seed=7"]).runs
    assert [(run.name, run.seed, run.folder) for run in runs] == [
        ("a", 7, "a-seed7"),
        ("b", 7, "b-seed7"),
    ]


def test_runs_of_the_same_recipe_share_the_first_ones_folder(file):
    file.write_text(TABLE + "runs: [{name: a}, {name: b}, {name: c, set: {epochs: 11}}]\n")
    assert [run.folder for run in load_table(file).runs] == ["a-seed0", "a-seed0", "c-seed0"]


def test_overrides_come_last_in_all_runs(file):
    runs = load_table(file, ["epochs=20", "training.threads=1"]).runs
    assert [(run.recipe.epochs, run.recipe.training.threads) for run in runs] == [(20, 1)] * 2


def test_overrides_within_pruning_leave_dense_runs_alone(file):
    dense, ck = load_table(file, ["pruning.amount=0.3"]).runs
    assert dense.recipe.pruning == "none"
    assert dense.overrides == ("pruning=none",)
    assert pruning_of(ck).amount == 0.3


def test_overrides_within_pruning_leave_runs_of_a_dense_base_alone(file):
    (file.parent / "base.yaml").write_text(RECIPE.split("pruning")[0] + "pruning: none\n")
    file.write_text(
        TABLE
        + "runs: [{name: a}, {name: b, set: {pruning: {method: ck, amount: 0.5, era: [0, 1]}}}]"
    )
    a, b = load_table(file, ["pruning.amount=0.3"]).runs
    assert a.recipe.pruning == "none"
    assert pruning_of(b).amount == 0.3


FORKING = TABLE.replace("base: base.yaml\n", "base: base.yaml\nfork: dense\n") + (
    "runs:\n"
    "- {name: dense, set: {pruning: none, training.keep_checkpoints: [3]}}\n"
    "- {name: ck}\n"
    "- {name: ck-from0, set: {pruning.era: [0, 3]}}\n"
)


def test_runs_fork_the_one_of_their_seed_but_for_those_that_prune_from_the_start(file):
    file.write_text(FORKING.replace("fork: dense", "fork: dense\nseeds: [1, 2]"))
    forks = {run.folder: run.fork for run in load_table(file).runs if run.fork}
    assert forks == {"ck-seed1": "dense-seed1", "ck-seed2": "dense-seed2"}


def test_a_run_before_the_one_that_it_forks_is_refused(file):
    head, _, listed = FORKING.partition("runs:\n")
    dense, *others = listed.splitlines(keepends=True)
    file.write_text(f"{head}runs:\n{''.join([*others, dense])}")
    with pytest.raises(TableError, match=r"runs\.ck: comes before dense, which it forks: put it"):
        load_table(file)


def test_without_fork_every_run_trains_all_its_epochs(file):
    assert not any(run.fork for run in load_table(file).runs)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "fork: dense",
            "fork: dens",
            "fork: is no run of the table (got 'dens'); did you mean dense?",
        ),
        (
            "- {name: ck}",
            "- {name: ck, set: {optimizer.lr: 0.1}}",
            "runs.ck: can't fork dense: they differ in optimizer.lr, and may in pruning alone",
        ),
        (
            "[3]",
            "[4]",
            "runs.ck: can't fork dense, which keeps no checkpoint of their dense epochs: set its "
            "training.keep_checkpoints to [3]",
        ),
        (
            "- {name: ck}",
            "- {name: ck, seeds: [0, 5]}",
            "runs.ck: has the seed 5, which dense lacks: a run forks the one of its seed",
        ),
    ],
)
def test_a_fork_that_cannot_be_is_refused(old, new, line, file):
    file.write_text(FORKING.replace(old, new))
    with pytest.raises(TableError) as caught:
        load_table(file)
    assert str(caught.value).splitlines() == [f"{file}: {line}"]


def test_a_table_of_anothers_runs_chooses_them_by_name(file):
    other = file.parent / "other.yaml"
    other.write_text(
        "title: T\nruns_of: table.yaml\ncolumns: [{name: top5, metric: top5}]\n"
        "runs: [{name: ck, paper: {top5: 92.3}}]\n"
    )
    table = load_table(other, ["seed=3"])
    (run,) = table.runs
    assert (table.name, table.trained_in) == ("other", "table")
    assert (run.name, run.folder, run.paper) == ("ck", "ck-seed3", {"top5": 92.3})


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["C", "Zl", "Zp"])),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"])), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=30)
@given(values)
def test_every_value_reaches_the_recipe_as_it_is(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("values")
    (folder / "base.yaml").write_text(RECIPE, encoding="utf-8")
    run = {"name": "a", "set": {"model.options.x": value}}
    text = TABLE + json.dumps({"runs": [run]}, ensure_ascii=False)[1:-1]
    (folder / "table.yaml").write_text(text, encoding="utf-8")
    (loaded,) = load_table(folder / "table.yaml").runs
    assert loaded.recipe.model.options == {"x": value}
    assert "\n" not in loaded.overrides[0]


# Variables


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.usefixtures("no_data_sets")
def test_a_table_that_is_not_to_run_needs_no_variables(path):
    assert load_table(path, keep_unset=True).runs


@pytest.mark.usefixtures("no_data_sets")
def test_an_unset_variable_is_told_once():
    (line,) = refusal_of(TABLES / "table7.yaml")
    assert line.startswith(
        f"{RECIPES}/resnet50_v15.yaml: data.root: the environment variable IMAGENET is not set"
    )


@pytest.mark.usefixtures("no_data_sets")
def test_an_unset_variable_is_kept_as_it_is_and_a_set_one_expanded(monkeypatch):
    path = RECIPES / "resnet50_v15.yaml"
    assert load_recipe(path, keep_unset=True).data.root == "${IMAGENET}"
    monkeypatch.setenv("IMAGENET", "/data")
    assert load_recipe(path, keep_unset=True).data.root == "/data"
    with pytest.raises(RecipeError, match=r"has a \$\{ without a name and \}"):
        load_recipe(path, ["data.root=${IMAGENET}/${x"], keep_unset=True)


# Refusals

DOUBLED = "runs: [{name: a}, {name: b}, {name: a}]"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [f"is empty; a table has the keys {', '.join(TableSettings.model_fields)}"]),
        (TABLE + "runs: []", ["runs: must be a list of at least one (got [])"]),
        (TABLE + "runs: {a: 1}", ["runs: must be a list (got {'a': 1}, a mapping)"]),
        (TABLE + "rnus: []\nruns: [{name: a}]", ["rnus: unknown key (got []); did you mean runs?"]),
        (
            TABLE + "runs: [{nmae: a, set: 3}, 7]",
            [
                "runs.0.name: is required (name of the run, and of its folder)",
                "runs.0.set: must be a mapping (got 3, an int)",
                "runs.0.nmae: unknown key (got 'a'); did you mean name?",
                "runs.1: must be a mapping (got 7, an int)",
            ],
        ),
        (
            TABLE + "runs: [{name: ../a}]",
            ["runs.../a.name: must be letters, digits, dots, _ and - (got '../a'); it names a "
             "folder"],
        ),
        (TABLE + DOUBLED, ["runs.a.name: is also the name of runs.0 (got 'a')"]),
        (
            TABLE + "runs: [{name: a, set: {pruning.amount=0.7: 1}}]",
            ["runs.a.set: must have dotted keys such as pruning.amount (got 'pruning.amount=0.7')"],
        ),
        (
            TABLE + "runs: [{name: a, set: {model.options: [1, .nan]}}]",
            ["runs.a.set.model.options: must be a finite number (got nan)"],
        ),
        (TABLE + "runs: [{name: a, seeds: []}]", ["runs.a.seeds: must be a list of at least one "
                                                  "(got [])"]),
        (
            TABLE + "seeds: [4294967296]\nruns: [{name: a}]",
            ["seeds.0: must be at most 4294967295 (got 4294967296)"],
        ),
        (
            TABLE + "seeds: [1, 1]\nruns: [{name: a}]",
            ["seeds: must differ from each other (got [1, 1])"],
        ),
        (
            TABLE + "runs: [{name: a, paper: {top: 75.3, tpo1: x}}]",
            [
                "runs.a.paper.tpo1: must be a number (got 'x', a str)",
                "runs.a.paper.top: is no column of the table (got 75.3); did you mean top1?",
                "runs.a.paper.tpo1: is no column of the table (got 'x'); did you mean top1?",
            ],
        ),
        (
            TABLE + "runs: [{name: a, paper: {gain: 1}}]",
            ["runs.a.paper.gain: is no column of the table (got 1); the columns are top1"],
        ),
        (
            TABLE.replace("base: base.yaml\n", "") + "runs: [{name: a}]",
            ["runs.a.base: is required without a base of the table (file of the recipe, relative "
             "to the table's)"],
        ),
        (
            TABLE.replace("epoch: 10", "epoch: frist") + "runs: [{name: a}]",
            ["columns.0.epoch: must be a number of epochs from 1, best or last (got 'frist')"],
        ),
        (
            TABLE.replace("epoch: 10", "epoch: 5, since: 5") + "runs: [{name: a}]",
            ["columns.0.since: must be below epoch = 5 (got 5)"],
        ),
        (
            TABLE.replace("epoch: 10", "metric: best_epoch, epoch: 5") + "runs: [{name: a}]",
            ["columns.0.epoch: has no effect with metric best_epoch (got 5); remove it"],
        ),
        (
            TABLE.replace("}]", "}, {name: top1}]") + "runs: [{name: a}]",
            ["columns.1.name: is also the name of columns.0 (got 'top1')"],
        ),
        (
            TABLE.replace("epoch: 10", "epoch: 11") + "runs: [{name: a, paper: {top1: 3}}]",
            ["runs.a.paper.top1: is read after 11 epochs, and the run ends after 10"],
        ),
        (
            TABLE + "set: {epohcs: 3}\nruns: [{name: a}, {name: b}]",
            ["set: epohcs: unknown key (got 3); did you mean epochs?"],
        ),
        (
            TABLE + "runs: [{name: a}, {name: b, set: {pruning.amuont: 0.7, pruning.amount: 60}}]",
            [
                "runs.b.set: pruning.amount: must be a float above 0 and at most 1 (got 60, an "
                "int); 60 % is 0.6",
                "runs.b.set: pruning.amuont: unknown key (got 0.7); did you mean amount?",
            ],
        ),
        (
            TABLE + "runs: [{name: a, set: {seed: x}}]",
            ["runs.a.set: seed: must be a whole number (got 'x', a str)"],
        ),
    ],
)  # fmt: skip
def test_refused_table(file, text, lines):
    file.write_text(text, encoding="utf-8")
    assert refusal_of(file) == [f"{file}: {line}" for line in lines]


# Of each table: a fault of its structure, and one of the recipe of run b
AMUONT = "set: {pruning.amuont: 1}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("runs: [{name: a, set: 3}, {name: b, %s}]", "runs.a.set: must be a mapping (got 3, an "),
        ("runs: [{nmae: a}, {name: b, %s}]", "runs.0.name: is required"),
        ("runs: [3, {name: b, %s}]", "runs.0: must be a mapping (got 3, an int)"),
        ("runs: [{name: b, sedes: [1], %s}]", "runs.b.sedes: unknown key (got [1]); did you mean"),
        ("runs: [{name: b, seeds: [-1], %s}]", "runs.b.seeds.0: must be at least 0 (got -1)"),
        ("runs: [{name: b, paper: {tpo1: x}, %s}]", "runs.b.paper.tpo1: must be a number (got "),
        ("runs: [{name: b, %s}, {name: b}]", "runs.b.name: is also the name of runs.0 (got 'b')"),
        ("titel: x\nruns: [{name: b, %s}]", "titel: unknown key (got 'x'); did you mean title?"),
        ("seeds: []\nruns: [{name: b, %s}]", "seeds: must be a list of at least one (got [])"),
    ],
)  # fmt: skip
def test_faults_of_a_table_and_of_its_runs_recipes_are_told_together(text, fault, file):
    file.write_text(TABLE + text.replace("%s", AMUONT))
    lines = refusal_of(file)
    assert lines[0].startswith(f"{file}: {fault}")
    assert lines[-1] == (
        f"{file}: runs.b.set: pruning.amuont: unknown key (got 1); did you mean amount?"
    )


def test_a_run_without_a_recipe_does_not_hide_the_faults_of_others(file):
    file.write_text(
        TABLE.replace("base: base.yaml\n", "")
        + f"runs: [{{name: a}}, {{name: b, base: base.yaml, {AMUONT}}}]"
    )
    missing, wrong = refusal_of(file)
    assert missing.startswith(f"{file}: runs.a.base: is required without a base of the table")
    assert wrong.startswith(f"{file}: runs.b.set: pruning.amuont: unknown key")


def test_a_table_whose_own_settings_are_at_fault_has_that_fault_alone(file):
    file.write_text(TABLE + f"set: 3\nruns: [{{name: b, {AMUONT}}}]")
    assert refusal_of(file) == [f"{file}: set: must be a mapping (got 3, an int)"]


def test_numbers_that_no_run_reaches_are_told_beside_other_faults(file):
    file.write_text(
        TABLE.replace("epoch: 10}", "epoch: 11}, {name: 3}")
        + f"runs: [{{name: a, paper: {{top1: 3}}}}, {{name: b, {AMUONT}}}]"
    )
    assert refusal_of(file) == [
        f"{file}: columns.1.name: must be text (got 3, an int)",
        f"{file}: runs.b.set: pruning.amuont: unknown key (got 1); did you mean amount?",
        f"{file}: runs.a.paper.top1: is read after 11 epochs, and the run ends after 10",
    ]


def test_faults_of_a_table_and_of_the_one_whose_runs_it_has_are_told_together(file):
    file.write_text(TABLE + f"runs: [{{name: b, {AMUONT}}}]")
    other = file.parent / "other.yaml"
    other.write_text("title: 3\nruns_of: table.yaml\ncolumns: [{name: x}]\nruns: [{name: b}]\n")
    assert refusal_of(other) == [
        f"{other}: title: must be text (got 3, an int)",
        f"{file}: runs.b.set: pruning.amuont: unknown key (got 1); did you mean amount?",
    ]


def test_a_fault_of_the_recipe_itself_is_told_once(file):
    base = file.parent / "base.yaml"
    base.write_text(RECIPE + "sead: 1\n")
    assert refusal_of(file) == [f"{base}: sead: unknown key (got 1); did you mean seed?"]


def test_a_fault_that_some_runs_have_with_the_recipe_names_them(file):
    file.write_text(TABLE + "runs: [{name: a}, {name: b, set: {epochs: 5}}, {name: c}]\n")
    assert refusal_of(file) == [
        f"{file}: runs.b: {file.parent}/base.yaml: pruning.era: ends after the run (got [3, 6]); "
        "its end is at most epochs = 5"
    ]


def test_a_missing_recipe_is_refused_with_those_that_are_there(file):
    file.write_text(TABLE.replace("base.yaml", "bas.yaml") + "runs: [{name: a}]")
    assert refusal_of(file) == [
        f"{file.parent}/bas.yaml: no such file; in that folder: base.yaml, table.yaml"
    ]


def test_a_missing_table_is_refused_with_those_that_are_there(file):
    missing = file.with_name("tabel.yaml")
    assert refusal_of(missing) == [
        f"{missing}: no such file; in that folder: table.yaml, base.yaml"
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("epohcs=3", "--set: epohcs: unknown key (got 3); did you mean epochs?"),
        ("epochs", "--set: must be KEY=VALUE (got 'epochs'), such as pruning.amount=0.7"),
        ("epochs=0", "--set: epochs: must be at least 1 (got 0)"),
    ],
)
def test_a_fault_of_an_override_is_told_once(override, line, file):
    assert refusal_of(file, override) == [line]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "base: b.yaml\nset: {a: 1}\nruns: [{name: ck, seeds: [1]}]",
            [
                "base: has no effect with runs_of (got 'b.yaml'); set it in table.yaml",
                "set: has no effect with runs_of (got {'a': 1}); set it in table.yaml",
                "runs.ck.seeds: has no effect with runs_of (got [1]); set it in table.yaml",
            ],
        ),
        ("runs: [{name: dnse}]", ["runs.dnse: is no run of table.yaml; did you mean dense?"]),
        ("runs: [{name: x9}]", ["runs.x9: is no run of table.yaml; its runs are dense, ck"]),
    ],
)
def test_refused_table_of_anothers_runs(text, lines, file):
    other = file.parent / "other.yaml"
    other.write_text(f"title: T\nruns_of: table.yaml\ncolumns: [{{name: top1}}]\n{text}\n")
    assert refusal_of(other) == [f"{other}: {line}" for line in lines]


def test_a_table_of_the_runs_of_such_a_table_is_refused(file):
    file.write_text("title: T\nruns_of: table.yaml\ncolumns: [{name: x}]\nruns: [{name: a}]\n")
    assert refusal_of(file) == [
        f"{file}: runs_of: table.yaml has the runs of table.yaml itself; name that table"
    ]


def test_settings_are_frozen():
    table = TableSettings.model_validate(yaml.safe_load(TABLE + DENSE_AND_CK))
    with pytest.raises(ValidationError, match="frozen"):
        table.title = "x"  # type: ignore[misc]


def test_importing_tables_loads_no_training_library():
    code = "import sys, starfire_prune.experiments.load; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"timm", "accelerate", "matplotlib"} & set(run.stdout.split())


# The schema


def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(table_schema())
    return jsonschema.Draft202012Validator(table_schema())


def test_committed_schema_is_in_step(tmp_path):
    refresh = (
        'python -c "from starfire_prune.tables import write_table_schema; '
        "write_table_schema('recipes/tables/table.schema.json')\""
    )
    write_table_schema(tmp_path / "schema.json")
    text = (tmp_path / "schema.json").read_text(encoding="utf-8")
    assert SCHEMA.read_text(encoding="utf-8") == text, f"out of date; refresh it with: {refresh}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_schema_accepts_the_shipped_tables(path):
    validator().validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        {"runs": []},
        {"seeds": [-1]},
        {"rnus": 1},
        {"runs": [{"name": "../a"}]},
        {"columns": [{"name": "x", "epoch": "frist"}]},
        {"columns": [{"name": "x", "metric": "loss"}]},
    ],
)
def test_schema_refuses(change):
    assert not validator().is_valid({**yaml.safe_load(TABLE + DENSE_AND_CK), **change})


def test_schema_describes_every_field():
    schema = table_schema()
    sections = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    assert len(sections) == 3
    assert all(field["description"] for part in sections for field in part["properties"].values())
