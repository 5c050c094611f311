"""Tables of runs: what they resolve to, and the errors that they raise."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from starfire_prune.engine.settings import Pruning
from starfire_prune.experiments.settings import TableSettings
from starfire_prune.experiments.tables import (
    Run,
    TableError,
    load_table,
    table_schema,
    write_table_schema,
)
from starfire_prune.recipe.load import load_recipe
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


@pytest.fixture
def no_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR10", raising=False)
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


def pruning_of(run: Run) -> Pruning:
    assert isinstance(run.recipe.pruning, Pruning)
    return run.recipe.pruning


def errors_of(path: Path, *overrides: str, **options: Any) -> list[str]:
    """The lines of the TableError, which must not drag another exception along."""
    with pytest.raises(TableError) as caught:
        load_table(path, overrides, **options)
    error = caught.value
    assert error.__context__ is None or error.__suppress_context__
    return str(error).splitlines()


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


def test_a_seed_for_all_runs_replaces_those_of_the_table(file):
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


def test_overrides_within_pruning_do_not_apply_to_dense_runs(file):
    dense, ck = load_table(file, ["pruning.amount=0.3"]).runs
    assert dense.recipe.pruning == "none"
    assert dense.overrides == ("pruning=none",)
    assert pruning_of(ck).amount == 0.3


def test_overrides_within_pruning_do_not_apply_to_runs_of_a_dense_base(file):
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


def test_runs_that_end_in_int8_fork_one_of_the_same_pruning(file):
    head = FORKING.partition("runs:\n")[0].replace("fork: dense", "fork: ck")
    pruning = "pruning.era: [0, 3]"
    file.write_text(
        f"{head}runs:\n"
        f"- {{name: ck, set: {{{pruning}, training.keep_checkpoints: [3]}}}}\n"
        f"- {{name: int8, set: {{{pruning}, quantization: {{epochs: 2}}}}}}\n"
    )
    ck, int8 = load_table(file).runs
    assert (ck.fork, int8.fork) == ("", ck.folder)
    assert int8.recipe.total_epochs == ck.recipe.total_epochs + 2


def test_a_run_before_the_one_that_it_forks_raises(file):
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
            "fork: is not a run of the table (got 'dens'); did you mean dense?",
        ),
        (
            "- {name: ck}",
            "- {name: ck, set: {optimizer.lr: 0.1}}",
            "runs.ck: can't fork dense: they differ in optimizer.lr, and may only differ in "
            "pruning and quantization",
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
def test_a_fork_that_is_impossible_raises(old, new, line, file):
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
def test_an_unset_variable_is_reported_once():
    (line,) = errors_of(TABLES / "table7.yaml")
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


# Errors

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
                "runs.a.paper.top: is not a column of the table; did you mean top1?",
                "runs.a.paper.tpo1: is not a column of the table; did you mean top1?",
            ],
        ),
        (
            TABLE + "runs: [{name: a, paper: {gain: 1}}]",
            ["runs.a.paper.gain: is not a column of the table; the columns are top1"],
        ),
        (
            TABLE.replace("base: base.yaml\n", "") + "runs: [{name: a}]",
            ["runs.a.base: is required without a base of the table (path of the recipe's file, "
             "relative to the table's)"],
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
            ["epohcs: unknown key (got 3); did you mean epochs?"],
        ),
        (
            TABLE + "runs: [{name: a}, {name: b, set: {pruning.amuont: 0.7, pruning.amount: 60}}]",
            [
                "runs.b: pruning.amount: must be a float above 0 and at most 1 (got 60, an "
                "int); 60 % is 0.6",
                "runs.b: pruning.amuont: unknown key (got 0.7); did you mean amount?",
            ],
        ),
        (
            TABLE + "runs: [{name: a, set: {seed: x}}]",
            ["seed: must be a whole number (got 'x', a str)"],
        ),
    ],
)  # fmt: skip
def test_a_wrong_table_raises_all_its_errors(file, text, lines):
    file.write_text(text, encoding="utf-8")
    assert errors_of(file) == [f"{file}: {line}" for line in lines]


AMUONT = "set: {pruning.amuont: 1}"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("runs: [{name: a, set: 3}, {name: b, %s}]", "runs.a.set: must be a mapping (got 3, an "),
        ("runs: [{set: {}}, {name: b, %s}]", "runs.0.name: is required"),
        ("runs: [3, {name: b, %s}]", "runs.0: must be a mapping (got 3, an int)"),
        ("runs: [{name: b, sedes: [1], %s}]", "runs.b.sedes: unknown key (got [1]); did you mean"),
        ("runs: [{name: b, seeds: [-1], %s}]", "runs.b.seeds.0: must be at least 0 (got -1)"),
        ("runs: [{name: b, paper: {tpo1: x}, %s}]", "runs.b.paper.tpo1: must be a number (got "),
        ("runs: [{name: b, %s}, {name: b}]", "runs.b.name: is also the name of runs.0 (got 'b')"),
        ("titel: x\nruns: [{name: b, %s}]", "titel: unknown key (got 'x'); did you mean title?"),
        ("seeds: []\nruns: [{name: b, %s}]", "seeds: must be a list of at least one (got [])"),
        ("set: 3\nruns: [{name: b, %s}]", "set: must be a mapping (got 3, an int)"),
    ],
)  # fmt: skip
def test_errors_of_a_table_are_reported_before_those_of_its_recipes(text, error, file):
    file.write_text(TABLE + text.replace("%s", AMUONT))
    first, *others = errors_of(file)
    assert first.startswith(f"{file}: {error}")
    assert not [line for line in others if "amuont" in line]


def test_errors_of_all_recipes_are_reported_together(file):
    file.write_text(TABLE + f"runs: [{{name: a, set: {{epochs: 0}}}}, {{name: b, {AMUONT}}}]")
    assert errors_of(file) == [
        f"{file}: runs.a: epochs: must be at least 1 (got 0)",
        f"{file}: runs.b: pruning.amuont: unknown key (got 1); did you mean amount?",
    ]


def test_an_error_that_several_runs_share_is_reported_once_with_their_names(file):
    runs = ", ".join(f"{{name: {name}, {AMUONT}}}" for name in "bcdef")
    file.write_text(TABLE + f"runs: [{{name: a}}, {runs}]")
    assert errors_of(file) == [
        f"{file}: runs.b, c, d and 2 more: pruning.amuont: unknown key (got 1); did you mean "
        f"amount?"
    ]


def test_an_error_between_the_keys_of_a_column_is_reported_beside_one_of_its_name(file):
    file.write_text(TABLE.replace("name: top1, epoch: 10", "epoch: 5, since: 5") + DENSE_AND_CK)
    assert errors_of(file) == [
        f"{file}: columns.0.name: is required (heading of the column, and key in `paper` of the "
        "runs)",
        f"{file}: columns.0.since: must be below epoch = 5 (got 5)",
    ]


def test_errors_of_the_table_whose_runs_are_read_are_reported_as_its_own(file):
    file.write_text(TABLE + f"runs: [{{name: b, {AMUONT}}}]")
    other = file.parent / "other.yaml"
    other.write_text("title: T\nruns_of: table.yaml\ncolumns: [{name: x}]\nruns: [{name: b}]\n")
    assert errors_of(other) == [
        f"{file}: pruning.amuont: unknown key (got 1); did you mean amount?"
    ]


def test_an_error_of_the_recipe_itself_is_reported_once(file):
    base = file.parent / "base.yaml"
    base.write_text(RECIPE + "sead: 1\n")
    assert errors_of(file) == [f"{base}: sead: unknown key (got 1); did you mean seed?"]


def test_an_error_of_the_recipe_that_some_runs_have_names_them(file):
    file.write_text(TABLE + "runs: [{name: a}, {name: b, set: {epochs: 5}}, {name: c}]\n")
    assert errors_of(file) == [
        f"{file}: runs.b: {file.parent}/base.yaml: pruning.era: ends after the run (got [3, 6]); "
        "its end is at most epochs = 5"
    ]


def test_a_missing_recipe_raises_and_the_ones_that_exist_are_named(file):
    file.write_text(TABLE.replace("base.yaml", "bas.yaml") + "runs: [{name: a}]")
    assert errors_of(file) == [
        f"{file.parent}/bas.yaml: no such file; in that folder: base.yaml, table.yaml"
    ]


def test_a_missing_table_raises_and_the_ones_that_exist_are_named(file):
    missing = file.with_name("tabel.yaml")
    assert errors_of(missing) == [f"{missing}: no such file; in that folder: table.yaml, base.yaml"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("epohcs=3", "--set: epohcs: unknown key (got 3); did you mean epochs?"),
        ("epochs", "--set: must be KEY=VALUE (got 'epochs'), such as pruning.amount=0.7"),
        ("epochs=0", "--set: epochs: must be at least 1 (got 0)"),
    ],
)
def test_an_error_of_an_override_is_reported_once(override, line, file):
    assert errors_of(file, override) == [line]


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
        ("runs: [{name: dnse}]", ["runs.dnse: is not a run of table.yaml; did you mean dense?"]),
        ("runs: [{name: x9}]", ["runs.x9: is not a run of table.yaml; its runs are dense, ck"]),
    ],
)
def test_a_wrong_table_of_anothers_runs_raises_all_its_errors(text, lines, file):
    other = file.parent / "other.yaml"
    other.write_text(f"title: T\nruns_of: table.yaml\ncolumns: [{{name: top1}}]\n{text}\n")
    assert errors_of(other) == [f"{other}: {line}" for line in lines]


def test_a_table_of_the_runs_of_such_a_table_raises(file):
    file.write_text("title: T\nruns_of: table.yaml\ncolumns: [{name: x}]\nruns: [{name: a}]\n")
    assert errors_of(file) == [
        f"{file}: runs_of: table.yaml itself reads the runs of table.yaml; name that table"
    ]


def test_settings_are_frozen():
    table = TableSettings.model_validate(yaml.safe_load(TABLE + DENSE_AND_CK))
    with pytest.raises(ValidationError, match="frozen"):
        table.title = "x"  # type: ignore[misc]


# The schema


def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(table_schema())
    return jsonschema.Draft202012Validator(table_schema())


def test_committed_schema_is_in_step(tmp_path):
    refresh = (
        'python -c "from starfire_prune.experiments.tables import write_table_schema; '
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
def test_schema_rejects(change):
    assert not validator().is_valid({**yaml.safe_load(TABLE + DENSE_AND_CK), **change})


def test_schema_describes_every_field():
    schema = table_schema()
    sections = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    assert len(sections) == 3
    assert all(field["description"] for part in sections for field in part["properties"].values())
