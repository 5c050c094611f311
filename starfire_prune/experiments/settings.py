"""The settings of a table: frozen models that refuse what they don't know, as a recipe's do."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from starfire_prune.engine.settings import Count, Name, Seed
from starfire_prune.utils.settings import KeyPath, Problem, Settings, got, nearest, validated

__all__ = ["Column", "RunSettings", "TableSettings", "sound_part", "table_problems"]


ItemT = TypeVar("ItemT")
_RUN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEY: Final = re.compile(r"[\w-]+(\.[\w-]+)*")


def _refusal(text: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{text}", {"text": text})


def _read_epoch(value: object) -> object:
    if value in ("best", "last") or (type(value) is int and value >= 1):
        return value
    raise _refusal(f"must be a number of epochs from 1, best or last {got(value)}")


def _run_name(name: str) -> str:
    if _RUN_NAME.fullmatch(name):
        return name
    raise _refusal(f"must be letters, digits, dots, _ and - {got(name)}; it names a folder")


def _dotted_keys(values: dict[str, Any]) -> dict[str, Any]:
    for key in values:
        if not _KEY.fullmatch(key):
            raise _refusal(f"must have dotted keys such as pruning.amount {got(key)}")
    return values


def _not_empty(items: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
    if items:
        return items
    raise _refusal(f"must be a list of at least one {got(items)}")


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) == len(seeds):
        return seeds
    raise _refusal(f"must differ from each other {got(seeds)}")


ReadEpoch = Annotated[
    Annotated[int, Field(ge=1)] | Literal["best", "last"], BeforeValidator(_read_epoch)
]
RunName = Annotated[
    str,
    AfterValidator(_run_name),
    Field(json_schema_extra={"pattern": f"^{_RUN_NAME.pattern}$"}),
]
Values = Annotated[dict[str, JsonValue], AfterValidator(_dotted_keys)]
# Not min_length, which a tuple is held to fall short of where its items are refused
List = Annotated[
    tuple[ItemT, ...],
    Field(strict=False, json_schema_extra={"minItems": 1}),
    AfterValidator(_not_empty),
]
Seeds = Annotated[List[Seed], AfterValidator(_distinct)]
_BASE: Final = "file of the recipe, relative to the table's"
_SET: Final = "keys of the recipe and their values, as KEY=VALUE of --set: {pruning.amount: 0.7}"
_FORK: Final = (
    "name of the run whose dense epochs the others of its seed take over: they differ from it in "
    "pruning alone"
)
_SEEDS: Final = "a run each with these seeds; default: the recipe's seed"


class Column(Settings):
    """A number that is read from each run; accuracies and sparsity are in percent."""

    name: Name = Field(description="its heading, and the key in the runs' paper")
    metric: Literal["top1", "top5", "sparsity", "best_epoch"] = Field(
        "top1", description="what is read; best_epoch: after how many epochs top-1 is best"
    )
    epoch: ReadEpoch = Field(
        "last", description="after how many epochs, from 1; best: where top-1 is; last: all"
    )
    since: Count | None = Field(None, description="reads the gain since this many epochs")


class RunSettings(Settings):
    """A run, or one for each seed."""

    name: RunName = Field(description="name of the run, and of its folder")
    base: Name | None = Field(None, description=f"{_BASE}; default: the table's base")
    set: Values = Field({}, description=_SET)
    seeds: Seeds | None = Field(None, description=_SEEDS)
    paper: dict[str, float] = Field({}, description="the paper's numbers, by column")


class TableSettings(Settings):
    """A table: its runs, the columns to read from them, and the paper's numbers."""

    title: Name = Field(description="what the table shows")
    base: Name | None = Field(None, description=_BASE)
    runs_of: Name | None = Field(
        None, description="file of the table whose runs are read, relative to this one"
    )
    set: Values = Field({}, description=f"for all runs: {_SET}")
    fork: Name | None = Field(None, description=_FORK)
    seeds: Seeds | None = Field(None, description=_SEEDS)
    columns: List[Column] = Field(description="what is read from the runs")
    runs: List[RunSettings] = Field(description="the runs, in the table's order")

    parts: ClassVar[Mapping[str, type[Settings]]] = {"columns": Column, "runs": RunSettings}


_OF_TRAINING: Final = (
    "base",
    "set",
    "seeds",
    "fork",
)  # what a table of another one's runs leaves to it


# Checks between keys: on plain data, so that they also run where a model was refused.


def table_problems(tree: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems between the keys of a table."""
    columns, runs = _items(tree.get("columns")), _items(tree.get("runs"))
    yield from _doubled("columns", columns)
    yield from _doubled("runs", runs)
    yield from _source_problems(tree, runs)
    yield from _fork_problems(tree, runs)
    for index, column in columns:
        yield from ((("columns", index, key), text) for key, text in _column_problems(column))
    names = [name for _, column in columns if isinstance(name := column.get("name"), str)]
    for index, run in runs:
        paper = run.get("paper")
        for name, value in paper.items() if isinstance(paper, dict) else ():
            if names and name not in names:
                way_out = nearest(name, names) or f"; the columns are {', '.join(names)}"
                text = f"is no column of the table {got(value)}{way_out}"
                yield ("runs", index, "paper", name), text


def _fork_problems(
    tree: Mapping[str, Any], runs: Sequence[tuple[int, Mapping[str, Any]]]
) -> Iterator[Problem]:
    fork = tree.get("fork")
    names = [name for _, run in runs if isinstance(name := run.get("name"), str)]
    if isinstance(fork, str) and fork not in names and tree.get("runs_of") is None:
        way_out = nearest(fork, names) or f"; the runs are {', '.join(names)}"
        yield ("fork",), f"is no run of the table {got(fork)}{way_out}"


def _items(values: object) -> list[tuple[int, dict[str, Any]]]:
    """The mappings in a list, with their indices; the others are refused already."""
    listed = values if isinstance(values, list) else []
    return [(index, item) for index, item in enumerate(listed) if isinstance(item, dict)]


def _doubled(key: str, items: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[Problem]:
    seen: dict[object, int] = {}
    for index, item in items:
        name = item.get("name")
        if isinstance(name, str) and seen.setdefault(name, index) != index:
            yield (key, index, "name"), f"is also the name of {key}.{seen[name]} {got(name)}"


def _source_problems(
    tree: Mapping[str, Any], runs: Sequence[tuple[int, Mapping[str, Any]]]
) -> Iterator[Problem]:
    if tree.get("runs_of") is None:
        for index, run in runs:
            if tree.get("base") is None and run.get("base") is None:
                yield ("runs", index, "base"), f"is required without a base of the table ({_BASE})"
        return
    places: Iterable[tuple[KeyPath, Mapping[str, Any]]] = [
        ((), tree),
        *((("runs", index), run) for index, run in runs),
    ]
    for at, given in places:
        for key in _OF_TRAINING:
            if given.get(key) is not None:
                text = f"has no effect with runs_of {got(given[key])}; set it in {tree['runs_of']}"
                yield (*at, key), text


def _column_problems(column: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    epoch, since = column.get("epoch"), column.get("since")
    if column.get("metric") == "best_epoch":
        for key in ("epoch", "since"):
            if column.get(key) is not None:
                yield key, f"has no effect with metric best_epoch {got(column[key])}; remove it"
    elif type(since) is int and type(epoch) is int and since >= epoch:
        yield "since", f"must be below epoch = {epoch} {got(since)}"


# What is left of a table with faults, for the faults of its recipes to be told with them.


def sound_part(tree: Mapping[str, Any]) -> TableSettings:
    """The columns and runs of a table that are as they should be, without seeds and title."""
    stand_ins = {"title": "-", "columns": [{"name": "-"}], "runs": [{"name": "0"}]}
    whole = {key: tree[key] for key in ("base", "runs_of", "set") if key in tree}
    settings, _ = validated(TableSettings, {**stand_ins, **whole})
    if settings is None:  # then no recipe of a run is as it is meant
        return TableSettings.model_validate(stand_ins).model_copy(update={"runs": ()})
    columns = [validated(Column, item)[0] for _, item in _items(tree.get("columns"))]
    sound = {column.name: column for column in columns if column is not None}
    runs = [_sound_run(run, sound) for _, run in _items(tree.get("runs"))]
    if settings.base is None and settings.runs_of is None:
        runs = [run for run in runs if run is not None and run.base is not None]
    kept = tuple(run for run in runs if run is not None)
    return settings.model_copy(update={"columns": tuple(sound.values()), "runs": kept})


def _sound_run(run: Mapping[str, Any], columns: Iterable[str]) -> RunSettings | None:
    """A run whose recipe can be resolved, with its numbers of those columns; None for others."""
    given = {key: run[key] for key in ("name", "base", "set") if key in run}
    paper = run.get("paper")
    numbers = {
        name: value
        for name, value in (paper.items() if isinstance(paper, dict) else ())
        if name in columns and type(value) in (int, float) and math.isfinite(value)
    }
    return validated(RunSettings, {**given, "paper": numbers})[0]
