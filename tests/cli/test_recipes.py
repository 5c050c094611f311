"""`starfire recipes` and recipes by name: what is listed, printed, copied and found."""

import re

import pytest

from starfire_prune.cli.shipped import find_recipe, find_table
from starfire_prune.experiments.tables import load_table
from tests.support.paths import ROOT

COMMAND = "recipes"
RECIPES = ROOT / "recipes"
NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
TABLES = [path.stem for path in sorted((RECIPES / "tables").glob("*.yaml"))]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_list_names_all_recipes_and_tables_in_a_line_each(tool):
    ended = tool()
    assert (ended.status, ended.stderr) == (0, "")
    lines = re.findall(r"^  (\w+) +(\S.*)$", ended.stdout, flags=re.MULTILINE)
    assert [name for name, _ in lines] == NAMES + TABLES
    assert all(len(summary) <= 100 for _, summary in lines)


@pytest.mark.parametrize("name", ["resnet50_v15", "resnet50_v15.yaml"])
def test_a_recipe_is_printed(name, tool):
    assert tool(name).stdout == (RECIPES / "resnet50_v15.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("table1", "tables/table1.yaml"),
        ("quickstart", "quickstart.yaml"),
        ("tables/quickstart", "tables/quickstart.yaml"),
    ],
)
def test_a_table_is_printed_and_a_recipe_of_its_name_comes_first(name, file, tool):
    assert tool(name).stdout == (RECIPES / file).read_text(encoding="utf-8")


def test_a_copied_table_can_be_loaded(tool, tmp_path):
    ended = tool("table6", "--copy", "mine")
    copies = [
        "mine/tables/table6.yaml",
        "mine/tables/table.schema.json",
        "mine/tables/table1.yaml",
        "mine/resnet50_v15.yaml",
        "mine/recipe.schema.json",
    ]
    assert ended.stdout.splitlines() == copies
    assert load_table(tmp_path / copies[0], keep_unset=True).title.startswith("Table 6: ")


def test_a_copy_is_in_this_folder_unless_another_is_named(tool, tmp_path):
    assert tool("quickstart", "--copy").stdout == "quickstart.yaml\nrecipe.schema.json\n"
    assert (tmp_path / "quickstart.yaml").read_bytes() == (RECIPES / "quickstart.yaml").read_bytes()


def test_a_copy_replaces_nothing(tool, tmp_path):
    (tmp_path / "quickstart.yaml").write_text("mine")
    ended = tool("quickstart", "--copy")
    assert (ended.status, ended.stderr) == (
        2,
        "starfire recipes: quickstart.yaml exists already: choose another folder\n",
    )
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstrat"], "no shipped recipe is named quickstrat; did you mean quickstart?"),
        (["xyz"], "no shipped recipe is named xyz; `starfire recipes` lists them"),
        (["--copy"], "--copy has no effect without the NAME of a recipe before it"),
    ],
)
def test_a_wrong_name_is_refused(words, message, tool):
    ended = tool(*words)
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr == f"starfire recipes: {message}\n"


# Recipes by name


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_name_stands_for_the_shipped_file(name):
    assert find_recipe(name) == RECIPES / "quickstart.yaml"
    assert find_table(name) == RECIPES / "tables" / "quickstart.yaml"


def test_a_file_that_exists_wins(tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    assert str(find_recipe("quickstart.yaml")) == "quickstart.yaml"
    assert find_recipe("quickstart") == RECIPES / "quickstart.yaml"


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (
            find_recipe,
            "quickstrat",
            "no shipped recipe has this name; did you mean quickstart or quickstart_int8?",
        ),
        (find_recipe, "small.yml", "no shipped recipe has this name; did you mean small.yaml?"),
        (find_recipe, "table1", "table1 is a table of runs: starfire sweep table1"),
        (find_table, "resnet50_v15", "resnet50_v15 is a recipe: starfire train resnet50_v15"),
        (find_table, "xyz", "no shipped table has this name; shipped are cifar10_blocks, "),
        (find_recipe, "recipes/quickstart.yaml", "a recipe of this name is shipped: quickstart"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused(find, name, message, tmp_path):
    (tmp_path / "small.yaml").touch()
    with pytest.raises(ValueError, match=f"^{name}: no such file(,|;) .*{re.escape(message)}"):
        find(name)


def test_a_path_to_no_file_is_left_to_its_reader(tmp_path):
    assert find_recipe(str(tmp_path / "smal.yaml")) == tmp_path / "smal.yaml"
