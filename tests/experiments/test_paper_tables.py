"""The shipped tables of the paper: their runs, their recipes and their numbers."""

import functools
import re

import pytest

from starfire_prune.engine.settings import Pruning
from starfire_prune.experiments.tables import Run, Table, load_table
from starfire_prune.recipe.compare import differing_keys
from starfire_prune.recipe.load import dump_recipe, load_recipe
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
TABLES = RECIPES / "tables"
SHIPPED = sorted(TABLES.glob("*.yaml"))
AS_IN_THE_PAPER = [path for path in SHIPPED if not path.stem.startswith("cifar10_")]

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
    monkeypatch.setenv("CIFAR10", "/data/cifar-10")
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    monkeypatch.setenv("TINY_IMAGENET", "/data/tiny-imagenet-200")
    monkeypatch.setenv("TINY_IMAGENET20", "/data/tiny-imagenet-20")


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
    assert [path.stem for path in SHIPPED] == [
        "cifar10_blocks",
        "cifar10_widths",
        "quickstart",
        *papers,
        "tiny_imagenet20",
    ]


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


@pytest.mark.parametrize("path", AS_IN_THE_PAPER, ids=lambda path: path.stem)
def test_window_spreads_and_linear_layers_are_pruned_too(path):
    for run in load_table(path, keep_unset=True).runs:
        if isinstance(pruning := run.recipe.pruning, Pruning):
            assert pruning.options.get("exact_layer_sparsity", False) == (
                pruning.method == "window"
            )
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
