"""The settings of a table: frozen models with strict keys and types, as those of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from starfire_prune.engine.settings import Name
from starfire_prune.methods.options import Count, Seed
from starfire_prune.utils.settings import Problem, Settings, got, settings_error
from starfire_prune.utils.text import did_you_mean

__all__ = ["Column", "RunSettings", "TableSettings"]


ItemT = TypeVar("ItemT")
_RUN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEY: Final = re.compile(r"[\w-]+(\.[\w-]+)*")


def _read_epoch(value: object) -> object:
    if value in ("best", "last") or (type(value) is int and value >= 1):
        return value
    raise settings_error(f"must be a number of epochs from 1, best or last {got(value)}")


def _run_name(name: str) -> str:
    if _RUN_NAME.fullmatch(name):
        return name
    raise settings_error(f"must be letters, digits, dots, _ and - {got(name)}; it names a folder")


def _dotted_keys(values: dict[str, Any]) -> dict[str, Any]:
    for key in values:
        if not _KEY.fullmatch(key):
            raise settings_error(f"must have dotted keys such as pruning.amount {got(key)}")
    return values


def _not_empty(items: tuple[ItemT, ...]) -> tuple[ItemT, ...]:
    if items:
        return items
    raise settings_error(f"must be a list of at least one {got(items)}")


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) == len(seeds):
        return seeds
    raise settings_error(f"must differ from each other {got(seeds)}")


ReadEpoch = Annotated[
    Annotated[int, Field(ge=1)] | Literal["best", "last"], BeforeValidator(_read_epoch)
]
RunName = Annotated[
    str,
    AfterValidator(_run_name),
    Field(json_schema_extra={"pattern": f"^{_RUN_NAME.pattern}$"}),
]
Values = Annotated[dict[str, JsonValue], AfterValidator(_dotted_keys)]
# Not min_length: where items are refused, pydantic counts only the others
List = Annotated[
    tuple[ItemT, ...],
    Field(strict=False, json_schema_extra={"minItems": 1}),
    AfterValidator(_not_empty),
]
Seeds = Annotated[List[Seed], AfterValidator(_distinct)]
_BASE: Final = "path of the recipe's file, relative to the table's"
_SET: Final = "keys of the recipe and their values, as KEY=VALUE of --set: {pruning.amount: 0.7}"
_FORK: Final = (
    "name of the run whose dense epochs the other runs of its seed reuse: they may differ from it "
    "only in pruning"
)
_SEEDS: Final = "seeds, each of them trained; default: the recipe's seed"


class Column(Settings):
    """A number that is read from each run; accuracies and sparsity are in percent."""

    name: Name = Field(description="heading of the column, and key in `paper` of the runs")
    metric: Literal["top1", "top5", "sparsity", "best_epoch"] = Field(
        "top1", description="number that is read; best_epoch: the first epoch with the best top-1"
    )
    epoch: ReadEpoch = Field(
        "last", description="epoch, from 1, after which it is read; best: that of the best top-1"
    )
    since: Count | None = Field(None, description="epoch, from 1, since which the gain is read")

    @classmethod
    def problems(cls, column: dict[str, Any]) -> Iterator[Problem]:
        """The errors between the keys of a column."""
        epoch, since = column.get("epoch"), column.get("since")
        if column.get("metric") == "best_epoch":
            for key in ("epoch", "since"):
                if column.get(key) is not None:
                    text = f"has no effect with metric best_epoch {got(column[key])}; remove it"
                    yield (key,), text
        elif type(since) is int and type(epoch) is int and since >= epoch:
            yield ("since",), f"must be below epoch = {epoch} {got(since)}"


class RunSettings(Settings):
    """A run, or one for each seed."""

    name: RunName = Field(description="name of the run, and of its folder")
    base: Name | None = Field(None, description=f"{_BASE}; default: the table's base")
    set: Values = Field({}, description=_SET)
    seeds: Seeds | None = Field(None, description=_SEEDS)
    paper: dict[str, float] = Field({}, description="the paper's numbers, by column")


class TableSettings(Settings):
    """A table: its runs, the columns to read from them, and the paper's numbers."""

    title: Name = Field(description="title of the table")
    base: Name | None = Field(None, description=_BASE)
    runs_of: Name | None = Field(
        None, description="path of the table whose runs are read, relative to this one"
    )
    set: Values = Field({}, description=f"for all runs: {_SET}")
    fork: Name | None = Field(None, description=_FORK)
    seeds: Seeds | None = Field(None, description=_SEEDS)
    columns: List[Column] = Field(description="numbers that are read from the runs")
    runs: List[RunSettings] = Field(description="the runs, in the table's order")

    parts: ClassVar[Mapping[str, type[Settings]]] = {"columns": Column, "runs": RunSettings}

    @classmethod
    def problems(cls, table: dict[str, Any]) -> Iterator[Problem]:
        """The errors between the keys of a table."""
        columns, runs = _items(table.get("columns")), _items(table.get("runs"))
        yield from _doubled("columns", columns)
        yield from _doubled("runs", runs)
        yield from _source_problems(table, runs)
        fork = table.get("fork")
        names = _names(runs)
        if isinstance(fork, str) and fork not in names and table.get("runs_of") is None:
            suggestion = did_you_mean(fork, names) or f"; the runs are {', '.join(names)}"
            yield ("fork",), f"is not a run of the table {got(fork)}{suggestion}"
        names = _names(columns)
        for index, run in runs:
            paper = run.get("paper")
            for name in paper if names and isinstance(paper, dict) else ():
                if name not in names:
                    suggestion = (
                        did_you_mean(name, names) or f"; the columns are {', '.join(names)}"
                    )
                    text = f"is not a column of the table{suggestion}"
                    yield ("runs", index, "paper", name), text


_Items = list[tuple[int, dict[str, Any]]]
_OF_TRAINING: Final = ("base", "set", "seeds", "fork")  # no keys of a table of another's runs


def _items(values: object) -> _Items:
    """The mappings in a list, with their indices; other items are errors of their type."""
    listed = values if isinstance(values, list) else []
    return [(index, item) for index, item in enumerate(listed) if isinstance(item, dict)]


def _names(items: _Items) -> list[str]:
    return [name for _, item in items if isinstance(name := item.get("name"), str)]


def _doubled(key: str, items: _Items) -> Iterator[Problem]:
    seen: dict[object, int] = {}
    for index, item in items:
        name = item.get("name")
        if isinstance(name, str) and seen.setdefault(name, index) != index:
            yield (key, index, "name"), f"is also the name of {key}.{seen[name]} {got(name)}"


def _source_problems(table: dict[str, Any], runs: _Items) -> Iterator[Problem]:
    """The errors about where the recipes of the runs come from."""
    if table.get("runs_of") is None:
        for index, run in runs:
            if table.get("base") is None and run.get("base") is None:
                yield ("runs", index, "base"), f"is required without a base of the table ({_BASE})"
        return
    for at, given in ((), table), *((("runs", index), run) for index, run in runs):
        for key in _OF_TRAINING:
            if given.get(key) is not None:
                text = f"has no effect with runs_of {got(given[key])}; set it in {table['runs_of']}"
                yield (*at, key), text
