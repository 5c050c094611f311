"""Tables: the runs of a published table as strict data, each a recipe with some keys set.

A table is a YAML file that names a recipe, what its runs set in it, the columns in which their
results are read, and the numbers that the paper gives there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from starfire_prune.experiments.settings import (
    Column,
    RunSettings,
    TableSettings,
    sound_part,
    table_problems,
)
from starfire_prune.recipe.compare import beyond_pruning, dense_epochs, training_differences
from starfire_prune.recipe.load import dump_recipe, load_recipe, read_mapping
from starfire_prune.recipe.sections import Recipe
from starfire_prune.recipe.yaml import parse_yaml
from starfire_prune.utils.files import write_text
from starfire_prune.utils.settings import KeyPath, RecipeError, nearest, problem_line, validated

__all__ = ["Run", "Table", "TableError", "load_table", "table_schema", "write_table_schema"]


_WORD: Final = re.compile(r"[A-Za-z][\w./-]*")  # what may stand in YAML without quotes


class TableError(RecipeError):
    """All that is wrong with a table, a line each: `source: key: what (value); the way out`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of a table.

    Attributes:
        name: of the run; runs that differ in the seed alone share it.
        seed: of the run.
        recipe: that it trains.
        recipe_path: of the file in which `overrides` give that recipe.
        overrides: `KEY=VALUE` each, as `load_recipe` and `--set` take them.
        folder: name of its folder. Runs of the same recipe share one: it is trained once.
        paper: the paper's numbers by the names of the columns.
        fork: name of the folder of the run whose dense epochs it takes over; empty if of none.
    """

    name: str
    seed: int
    recipe: Recipe
    recipe_path: Path
    overrides: tuple[str, ...]
    folder: str
    paper: Mapping[str, float]
    fork: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with its recipes resolved.

    Attributes:
        name: of its file, without the ending.
        title: what it shows.
        columns: what is read from the runs.
        runs: in the file's order, those of a name by seed.
        trained_in: name of the table that these are the runs of: its own, or `runs_of`'s.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    runs: tuple[Run, ...]
    trained_in: str


def load_table(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, keep_unset: bool = False
) -> Table:
    """Reads a table and resolves the recipes of its runs.

    Args:
        path: the YAML file.
        overrides: settings for all runs, `"KEY=VALUE"` each; they come after the table's own. Those
            of keys in `pruning` leave dense runs alone.
        keep_unset: leave `${NAME}` in recipes where that variable is not set: for a table whose
            runs are listed or read, and not trained.

    Raises:
        TableError: all that is wrong, a line each: the file, the key (runs by their names), what
            is wrong with which value, and the way out. What is wrong with a recipe too.

    Example:
        >>> table = load_table("recipes/tables/quickstart.yaml")
        >>> [run.name for run in table.runs]
        ['dense', 'ck', 'window', 'intra']
    """
    path = Path(path)
    settings, lines = _read(path)
    if settings.runs_of is None:
        runs, faults = _own_runs(path, settings, overrides, keep_unset)
        trained_in = path.stem
    else:
        source = _beside(path, settings.runs_of)
        runs, faults = _others_runs(path, settings, source, overrides, keep_unset)
        trained_in = source.stem
    lines += faults
    if not overrides:
        lines += _numbers_without_epoch(path, settings, runs)
    if lines:
        raise TableError("\n".join(dict.fromkeys(lines)))
    return Table(path.stem, settings.title, settings.columns, tuple(runs), trained_in)


def table_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a table: keys, types and ranges, not the cross checks.

    Example:
        >>> sorted(table_schema()["required"])
        ['columns', 'runs', 'title']
    """
    schema = TableSettings.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_table_schema(path: str | os.PathLike[str]) -> None:
    """Writes `table_schema()` to the file `path`.

    Example:
        >>> write_table_schema("recipes/tables/table.schema.json")
    """
    write_text(Path(path), json.dumps(table_schema(), indent=2, ensure_ascii=False) + "\n")


# The file and its checks.


def _read(path: Path) -> tuple[TableSettings, list[str]]:
    """A table, or what can be resolved of one with faults, and a line for each of these."""
    try:
        tree = read_mapping(path, "table", TableSettings)
    except RecipeError as error:
        raise TableError(str(error)) from None
    settings, problems = validated(TableSettings, tree)
    problems = [*problems, *table_problems(tree)]
    lines = [problem_line(os.fspath(path), _named(at, tree), text) for at, text in problems]
    return sound_part(tree) if settings is None or lines else settings, lines


def _beside(path: Path, file: str) -> Path:
    """The file that a table names."""
    return Path(os.path.normpath(path.parent / file))


def _named(at: KeyPath, tree: Mapping[str, Any]) -> KeyPath:
    """A key with the run's name in place of its index."""
    if at[:1] != ("runs",) or len(at) < 3:
        return at
    name = tree["runs"][at[1]].get("name")
    return ("runs", name, *at[2:]) if isinstance(name, str) and name else at


def _numbers_without_epoch(path: Path, settings: TableSettings, runs: Iterable[Run]) -> list[str]:
    """A line for each number of the paper that the runs as they stand can't be compared with."""
    epochs = {column.name: column.epoch for column in settings.columns}
    return [
        problem_line(
            os.fspath(path),
            ("runs", run.name, "paper", name),
            f"is read after {epochs[name]} epochs, and the run ends after {run.recipe.epochs}",
        )
        for run in runs
        for name in run.paper
        if isinstance(epoch := epochs[name], int) and epoch > run.recipe.epochs
    ]


# The runs.


def _own_runs(
    path: Path, settings: TableSettings, overrides: Sequence[str], keep_unset: bool
) -> tuple[list[Run], list[str]]:
    """The runs that a table resolves to, and a line for each fault of its recipes."""
    runs: dict[tuple[str, int], Run] = {}
    folders: dict[str, str] = {}
    faults: dict[str, dict[str, None]] = {}  # lines, and the names of the runs with each
    for entry, seed in _seeded(settings):
        recipe_path = _beside(path, entry.base or settings.base or "")
        values = list(_values(path, settings, entry, seed))
        try:
            extra = _that_apply(overrides, recipe_path, values)
            given = (*(f"{key}={_text(value)}" for _, key, value in values), *extra)
            recipe = load_recipe(recipe_path, given, keep_unset=keep_unset)
        except RecipeError as error:
            places = [(key, place) for place, key, _ in values]
            places += [(override.partition("=")[0].strip(), "--set") for override in overrides]
            for line in _relabelled(str(error), places):
                faults.setdefault(line, {})[entry.name] = None
            continue
        folder = folders.setdefault(dump_recipe(recipe), f"{entry.name}-seed{recipe.seed}")
        run = Run(entry.name, recipe.seed, recipe, recipe_path, given, folder, entry.paper)
        runs.setdefault((run.name, run.seed), run)  # an override of the seed makes them all one
    lines = [_with_runs(line, path, settings, names) for line, names in faults.items()]
    forked = [_forked(run, runs.get((settings.fork or "", run.seed))) for run in runs.values()]
    return forked, [*lines, *_fork_faults(path, settings.fork, forked)]


def _forked(run: Run, source: Run | None) -> Run:
    """A run that takes over another one's dense epochs, if both train some."""
    if source is None or source.folder == run.folder or not _shared_epochs(run, source):
        return run
    return dataclasses.replace(run, fork=source.folder)


def _shared_epochs(run: Run, source: Run) -> int:
    return min(dense_epochs(run.recipe), dense_epochs(source.recipe))


def _fork_faults(path: Path, fork: str | None, runs: Sequence[Run]) -> Iterator[str]:
    """A line for each run that can't take over the epochs of the one that it is to fork."""
    sources = {run.seed: run for run in runs if run.name == fork}
    seen: set[str] = set()
    for run in runs if sources else ():
        seen.add(run.folder)
        if run.name == fork or not dense_epochs(run.recipe):
            continue
        source = sources.get(run.seed)
        problem = (
            f"has the seed {run.seed}, which {fork} lacks: a run forks the one of its seed"
            if source is None
            else _fork_problem(run, source, seen)
        )
        if problem:
            yield problem_line(os.fspath(path), ("runs", run.name), problem)


def _fork_problem(run: Run, source: Run, seen: set[str]) -> str:
    """Why a run can't fork another one; empty if it can, or does not."""
    shared = _shared_epochs(run, source)
    unlike = beyond_pruning(training_differences(source.recipe, run.recipe))
    if unlike:
        keys = ", ".join(unlike)
        return f"can't fork {source.name}: they differ in {keys}, and may in pruning alone"
    if not run.fork:
        return ""
    if source.folder not in seen:
        return f"comes before {source.name}, which it forks: put it behind"
    if not any(epochs <= shared for epochs in source.recipe.training.keep_checkpoints):
        return (
            f"can't fork {source.name}, which keeps no checkpoint of their dense epochs: set its "
            f"training.keep_checkpoints to [{shared}]"
        )
    return ""


def _seeded(settings: TableSettings) -> Iterator[tuple[RunSettings, int | None]]:
    for entry in settings.runs:
        for seed in entry.seeds or settings.seeds or (None,):
            yield entry, seed


def _values(
    path: Path, settings: TableSettings, entry: RunSettings, seed: int | None
) -> Iterator[tuple[str, str, object]]:
    """What a run sets, in order: the place in the table, the recipe's key, the value."""
    for key, value in settings.set.items():
        yield f"{path}: set", key, value
    for key, value in entry.set.items():
        yield f"{path}: runs.{entry.name}.set", key, value
    if seed is not None:
        yield f"{path}: runs.{entry.name}.seeds", "seed", seed


def _that_apply(
    overrides: Sequence[str], recipe_path: Path, values: Sequence[tuple[str, str, object]]
) -> list[str]:
    """The overrides of a table's user for a run: nothing within `pruning` if it trains dense."""
    given = [value for _, key, value in values if key == "pruning"]
    pruning = given[-1] if given else read_mapping(recipe_path).get("pruning")
    return [o for o in overrides if pruning != "none" or not o.strip().startswith("pruning.")]


def _text(value: object) -> str:
    """A value in one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, str) and _WORD.fullmatch(value) and parse_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)  # of scalars, YAML too


def _relabelled(message: str, places: Sequence[tuple[str, str]]) -> Iterator[str]:
    """An error's lines, those about an override under the last of the places that gave it."""
    for line in message.splitlines():
        source, _, rest = line.partition(": ")
        keys = rest.partition(": ")[0].split(".")
        given = [
            place
            for key, place in places
            if all(a == b for a, b in zip(key.split("."), keys, strict=False))
        ]
        yield f"{given[-1]}: {rest}" if source == "--set" and given else line


def _with_runs(line: str, path: Path, settings: TableSettings, names: Iterable[str]) -> str:
    """An error's line, with the names of its runs where it tells none and is not that of all."""
    names = list(names)
    if len(names) == len(settings.runs) or line.startswith(f"{path}: runs."):
        return line
    return f"{path}: runs.{', '.join(names)}: {line}"


def _others_runs(
    path: Path, settings: TableSettings, source: Path, overrides: Sequence[str], keep_unset: bool
) -> tuple[list[Run], list[str]]:
    """The runs of another table that this one names, and a line for each fault of either."""
    try:
        if (other := _read(source)[0].runs_of) is not None:
            text = f"{settings.runs_of} has the runs of {other} itself; name that table"
            return [], [problem_line(os.fspath(path), ("runs_of",), text)]
        whole = load_table(source, overrides, keep_unset=keep_unset)
    except TableError as error:
        return [], str(error).splitlines()
    return _chosen_runs(path, settings, whole)


def _chosen_runs(path: Path, settings: TableSettings, whole: Table) -> tuple[list[Run], list[str]]:
    """Those runs, with this table's numbers of the paper."""
    names = list(dict.fromkeys(run.name for run in whole.runs))
    lines = [
        problem_line(
            os.fspath(path),
            ("runs", entry.name),
            f"is no run of {settings.runs_of}"
            + (nearest(entry.name, names) or f"; its runs are {', '.join(names)}"),
        )
        for entry in settings.runs
        if entry.name not in names
    ]
    runs = [
        dataclasses.replace(run, paper=entry.paper)
        for entry in settings.runs
        for run in whole.runs
        if run.name == entry.name
    ]
    return runs, lines
