"""The paper's tables: the runs of a published table as strict data, each a recipe with changes.

A table is a YAML file, such as those in `recipes/tables/`, that names a recipe, the keys that its
runs set in it, the columns that are read from the results of the runs, and the paper's numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from starfire_prune.experiments.settings import Column, RunSettings, TableSettings
from starfire_prune.recipe.compare import (
    beyond_pruning,
    dense_epochs,
    shared_epochs,
    training_differences,
)
from starfire_prune.recipe.load import dump_recipe, load_recipe, read_mapping
from starfire_prune.recipe.sections import Recipe
from starfire_prune.recipe.yaml import parse_yaml
from starfire_prune.utils.files import write_text
from starfire_prune.utils.settings import KeyPath, RecipeError, problem_line, validated
from starfire_prune.utils.text import did_you_mean, first_few

__all__ = ["Run", "Table", "TableError", "load_table", "table_schema", "write_table_schema"]


_WORD: Final = re.compile(r"[A-Za-z][\w./-]*")  # written in YAML without quotes


class TableError(RecipeError):
    """All errors of a table, a line each: `source: key: what (value); suggestion`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of a table.

    Attributes:
        name: Name of the run; runs that differ only in the seed share it.
        seed: Seed of the run.
        recipe: The recipe that the run trains.
        recipe_path: Path of the file that gives this recipe with `overrides`.
        overrides: Settings, `KEY=VALUE` each, as `load_recipe` and `--set` accept them.
        folder: Name of the run's folder. Runs of the same recipe share one: it is trained once.
        paper: The paper's numbers by the names of the columns.
        fork: Folder name of the run whose dense epochs this run reuses; empty if it reuses none.
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
        name: Name of its file, without the ending.
        title: What the table shows.
        columns: The numbers that are read from the runs.
        runs: The runs in the file's order, those of a name by seed.
        trained_in: Name of the table that trains the runs: this one, or the one in `runs_of`.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    runs: tuple[Run, ...]
    trained_in: str


def load_table(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, keep_unset: bool = False
) -> Table:
    """Read a table and resolve the recipes of its runs.

    The table is checked first, then the recipes of its runs, then these runs.

    Args:
        path: Path of the YAML file.
        overrides: Settings for all runs, `"KEY=VALUE"` each, applied after the table's own. Keys
            within `pruning` don't apply to dense runs.
        keep_unset: Keep `${NAME}` in recipes where that variable is not set: for a table whose
            runs are listed or read, not trained.

    Raises:
        TableError: With all errors of the first check that fails, a line each: the file, the key
            (with the name of the run), what is wrong with which value, and a suggestion.

    Example:
        >>> table = load_table("recipes/tables/quickstart.yaml")
        >>> [run.name for run in table.runs]
        ['dense', 'ck', 'window', 'intra']
    """
    path = Path(path)
    settings = _read(path)
    if settings.runs_of is None:
        runs = _own_runs(path, settings, overrides, keep_unset)
        trained_in = path.stem
    else:
        source = _beside(path, settings.runs_of)
        runs = _others_runs(path, settings, source, overrides, keep_unset)
        trained_in = source.stem
    if not overrides:
        _raise(_numbers_without_epoch(path, settings, runs))
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


def _read(path: Path) -> TableSettings:
    try:
        tree = read_mapping(path, "table", TableSettings)
    except RecipeError as error:
        raise TableError(str(error)) from None
    settings, problems = validated(TableSettings, tree)
    if settings is None:
        lines = (problem_line(os.fspath(path), _named(at, tree), text) for at, text in problems)
        raise TableError("\n".join(lines))
    return settings


def _raise(lines: Iterable[str]) -> None:
    """Raise a TableError with these lines, if there are any."""
    if text := "\n".join(lines):
        raise TableError(text)


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
    """A line for each number of the paper that is read after the end of its run."""
    epochs = {column.name: column.epoch for column in settings.columns}
    return [
        problem_line(
            os.fspath(path),
            ("runs", run.name, "paper", name),
            f"is read after {epochs[name]} epochs, and the run ends after "
            f"{run.recipe.total_epochs}",
        )
        for run in runs
        for name in run.paper
        if isinstance(epoch := epochs[name], int) and epoch > run.recipe.total_epochs
    ]


# The runs.


def _own_runs(
    path: Path, settings: TableSettings, overrides: Sequence[str], keep_unset: bool
) -> list[Run]:
    """The runs of a table that it trains itself."""
    runs: dict[tuple[str, int], Run] = {}
    folders: dict[str, str] = {}
    errors: dict[str, dict[str, None]] = {}  # lines, each with the names of its runs
    for entry, seed in _seeded(settings):
        recipe_path = _beside(path, entry.base or settings.base or "")
        values = [*settings.set.items(), *entry.set.items()]
        values += [] if seed is None else [("seed", seed)]
        try:
            extra = _that_apply(overrides, recipe_path, values)
            given = (*(f"{key}={_text(value)}" for key, value in values), *extra)
            recipe = load_recipe(recipe_path, given, keep_unset=keep_unset)
        except RecipeError as error:
            for line in str(error).splitlines():
                errors.setdefault(_located(line, path, overrides), {})[entry.name] = None
            continue
        folder = folders.setdefault(dump_recipe(recipe), f"{entry.name}-seed{recipe.seed}")
        run = Run(entry.name, recipe.seed, recipe, recipe_path, given, folder, entry.paper)
        runs.setdefault((run.name, run.seed), run)  # an override of the seed makes them all one
    _raise(
        line if len(names) == len(settings.runs) else _with_runs(line, path, list(names))
        for line, names in errors.items()
    )
    forked = [_forked(run, runs.get((settings.fork or "", run.seed))) for run in runs.values()]
    _raise(_fork_errors(path, settings.fork, forked))
    return forked


def _located(line: str, path: Path, overrides: Sequence[str]) -> str:
    """An error of a recipe, with the table's path for `--set` if the table sets the key."""
    source, _, rest = line.partition(": ")
    at, _, text = rest.partition(": ")
    keys = [override.partition("=")[0].strip() for override in overrides]
    by_user = not text or any(at.startswith(key) or key.startswith(at) for key in keys)
    return line if source != "--set" or by_user else f"{path}: {rest}"


def _with_runs(line: str, path: Path, names: Sequence[str]) -> str:
    """An error that only some runs of a table have, with their names."""
    return f"{path}: runs.{first_few(names)}: {line.removeprefix(f'{path}: ')}"


def _forked(run: Run, source: Run | None) -> Run:
    """The run with the run whose dense epochs it reuses, if both train some."""
    if (
        source is None
        or source.folder == run.folder
        or not shared_epochs(run.recipe, source.recipe)
    ):
        return run
    return dataclasses.replace(run, fork=source.folder)


def _fork_errors(path: Path, fork: str | None, runs: Sequence[Run]) -> Iterator[str]:
    """A line for each run that can't reuse the epochs of the run that it is to fork."""
    sources = {run.seed: run for run in runs if run.name == fork}
    seen: set[str] = set()
    for run in runs if sources else ():
        seen.add(run.folder)
        if run.name == fork or not dense_epochs(run.recipe):
            continue
        source = sources.get(run.seed)
        text = (
            f"has the seed {run.seed}, which {fork} lacks: a run forks the one of its seed"
            if source is None
            else _fork_error(run, source, seen)
        )
        if text:
            yield problem_line(os.fspath(path), ("runs", run.name), text)


def _fork_error(run: Run, source: Run, seen: set[str]) -> str:
    """Why a run can't fork another one; empty if it can, or does not."""
    shared = shared_epochs(run.recipe, source.recipe)
    unlike = beyond_pruning(training_differences(source.recipe, run.recipe))
    if unlike:
        keys = ", ".join(unlike)
        return (
            f"can't fork {source.name}: they differ in {keys}, and may only differ in pruning and "
            f"quantization"
        )
    if not run.fork:
        return ""
    if source.folder not in seen:
        return f"comes before {source.name}, which it forks: put it after {source.name}"
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


def _that_apply(
    overrides: Sequence[str], recipe_path: Path, values: Sequence[tuple[str, object]]
) -> list[str]:
    """The user's overrides that apply to a run: none within `pruning` if it trains dense."""
    given = [value for key, value in values if key == "pruning"]
    pruning = given[-1] if given else read_mapping(recipe_path).get("pruning")
    return [o for o in overrides if pruning != "none" or not o.strip().startswith("pruning.")]


def _text(value: object) -> str:
    """A value in one line of YAML: a plain word, or JSON."""
    if isinstance(value, str) and _WORD.fullmatch(value) and parse_yaml(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _others_runs(
    path: Path, settings: TableSettings, source: Path, overrides: Sequence[str], keep_unset: bool
) -> list[Run]:
    """The runs of another table that this one names, with this table's numbers of the paper."""
    if (other := _read(source).runs_of) is not None:
        text = f"{settings.runs_of} itself reads the runs of {other}; name that table"
        _raise([problem_line(os.fspath(path), ("runs_of",), text)])
    trained = load_table(source, overrides, keep_unset=keep_unset).runs
    names = list(dict.fromkeys(run.name for run in trained))
    _raise(
        problem_line(
            os.fspath(path),
            ("runs", entry.name),
            f"is not a run of {settings.runs_of}"
            + (did_you_mean(entry.name, names) or f"; its runs are {', '.join(names)}"),
        )
        for entry in settings.runs
        if entry.name not in names
    )
    return [
        dataclasses.replace(run, paper=entry.paper)
        for entry in settings.runs
        for run in trained
        if run.name == entry.name
    ]
