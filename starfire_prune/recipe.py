"""Recipes: a training run written down as strict data.

A recipe is a YAML file read into frozen models. Unknown keys, wrong types, values out of range and
options without effect are refused, all of them in one `RecipeError`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from starfire_prune.files import write_text
from starfire_prune.recipe_models import (
    Data,
    Ema,
    Fc,
    KeyPath,
    LrSchedule,
    Model,
    Optimizer,
    Override,
    Problem,
    Pruning,
    Recipe,
    Settings,
    SettingsT,
    Training,
    cross_problems,
    got,
    plain,
)
from starfire_prune.strict_yaml import NUMBER, dump_yaml, parse_yaml

__all__ = [
    "Data",
    "Ema",
    "Fc",
    "LrSchedule",
    "Model",
    "Optimizer",
    "Override",
    "Pruning",
    "Recipe",
    "RecipeError",
    "Training",
    "beyond_pruning",
    "dense_epochs",
    "differing_keys",
    "dump_recipe",
    "load_recipe",
    "parse_pruning",
    "recipe_schema",
    "training_differences",
    "write_schema",
]


class RecipeError(ValueError):
    """All that is wrong with a recipe, a line each: `source: key: what (value); the way out`."""


# Messages.

_PARTS: Final[Mapping[str, type[Settings]]] = {
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "lr_schedule": LrSchedule,
    "training": Training,
    "ema": Ema,
    "pruning": Pruning,
    "overrides": Override,
    "fc": Fc,
}
# What doesn't change a run: the data may lie elsewhere, as on a node's own disk
_MAY_DIFFER: Final = ("data.root", "training.trackers", "training.keep_checkpoints")
_EXPECTED: Final = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "greater_than": "above {gt:.10g}",
    "greater_than_equal": "at least {ge:.10g}",
    "less_than": "below {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
    "string_too_short": "at least a character long",
    "too_short": "a list of at least one",
}


def problem_line(source: str, path: KeyPath, text: str) -> str:
    """A line of a `RecipeError`: `source: key: what is wrong`."""
    return ": ".join(part for part in (source, ".".join(map(str, path)), text) if part)


def validated(
    root: type[SettingsT],
    tree: Any,
    parts: Mapping[str, type[Settings]] = _PARTS,
    *,
    keep_unset: bool = False,
) -> tuple[SettingsT | None, list[Problem]]:
    """The settings in `tree`, or None and the problems; `parts` are the sections by their keys."""
    try:
        return root.model_validate(tree, context={"keep_unset": keep_unset}), []
    except ValidationError as error:
        problems = [_problem(root, parts, detail) for detail in error.errors(include_url=False)]
    return None, list(dict.fromkeys((*problems, *cross_problems(root, tree, deep=True))))


def _problem(
    root: type[Settings], parts: Mapping[str, type[Settings]], detail: ErrorDetails
) -> Problem:
    path = tuple(key for key in detail["loc"] if key not in ("<mapping>", "<none>", "[key]"))
    for free in ("options", "set"):  # what is in them pydantic tells by the types it tried
        if free in path:
            path = path[: path.index(free) + 2]
    parents = [key for key in path[:-1] if isinstance(key, str)]
    section = parts.get(parents[-1], root) if parents else root
    if detail["type"] == "recipe":
        return path, detail["msg"]
    if detail["type"] == "missing":
        return path, f"is required ({section.model_fields[str(path[-1])].description})"
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        names = list(section.model_fields)
        way_out = nearest(path[-1], names) or f"; the keys here are {', '.join(names)}"
        return path, f"unknown key {got(detail['input'])}{way_out}"
    return path, _wrong_value(path, detail)


def _wrong_value(path: KeyPath, detail: ErrorDetails) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        return f"must be one of {', '.join(names)} {got(value)}{nearest(value, names)}"
    if kind not in _EXPECTED:
        return f"{detail['msg'].replace('Input should', 'must')} {got(value)}"
    expected = _EXPECTED[kind].format(**context)
    if kind == "model_type" and path[-1:] in (("pruning",), ("fc",)):
        expected += " of settings, or none"
    quoted = kind in ("int_type", "float_type") and isinstance(value, str) and NUMBER.match(value)
    way_out = f"; without quotes: {value}" if quoted else ""
    return f"must be {expected} {got(value, typed=kind.endswith('_type'))}{way_out}"


def nearest(value: object, names: Sequence[str]) -> str:
    """The way out of a wrong name, or nothing where no name is near."""
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


# Reading and writing.


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, keep_unset: bool = False
) -> Recipe:
    """Reads a recipe from a YAML file.

    Args:
        path: the file, in UTF-8.
        overrides: settings that replace the file's, each `"KEY=VALUE"`: a dotted key (items of a
            list by index, from 0) and a value in YAML. Of two for the same key the later wins.
        keep_unset: leave `${NAME}` where that variable is not set, in a recipe that is not to run.

    Raises:
        RecipeError: all that is wrong, a line each: the source (the file, or `--set` for what an
            override brought), the dotted key, what is wrong with which value, and the way out.

    Example:
        >>> recipe = load_recipe("recipes/quickstart.yaml", ["pruning.amount=0.7"])
        >>> recipe.pruning.amount
        0.7
    """
    tree, keys_set, lines = _overridden(read_mapping(Path(path)), overrides)
    recipe, problems = validated(Recipe, tree, keep_unset=keep_unset)
    for at, text in problems:
        from_set = any(
            all(str(a) == key for a, key in zip(at, keys, strict=False)) for keys in keys_set
        )
        lines.append(problem_line("--set" if from_set else os.fspath(path), at, text))
    if recipe is None or lines:
        raise RecipeError("\n".join(lines))
    return recipe


def parse_pruning(settings: Mapping[str, object] | Pruning) -> Pruning:
    """Checks pruning settings that come from Python; a `Pruning` is returned as it is.

    Args:
        settings: the keys and values of a recipe's `pruning`.

    Raises:
        RecipeError: all that is wrong, a line each, with `pruning` as the source.

    Example:
        >>> parse_pruning({"method": "ck", "amount": 0.6, "era": [40, 60]}).scope
        'channel'
    """
    if isinstance(settings, Pruning):
        return settings
    pruning, problems = validated(Pruning, plain(settings))
    if pruning is None:
        raise RecipeError("\n".join(problem_line("pruning", *problem) for problem in problems))
    return pruning


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe in YAML: defaults written out, variables expanded.

    Options without effect are left out, and `load_recipe` reads it back to an equal recipe.

    Example:
        >>> print(dump_recipe(load_recipe("recipes/quickstart.yaml")).splitlines()[-1])
          fc: {method: fine}
    """
    tree = recipe.model_dump(exclude_none=True)
    for (*parents, option), _ in list(cross_problems(Pruning, plain(tree["pruning"]))):
        section = tree["pruning"]
        for parent in parents:
            section = section[parent]
        del section[option]
    return dump_yaml(tree)


def differing_keys(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    """Where two recipes differ: dotted key to the values in `a` and in `b`; empty if nowhere.

    Example:
        >>> a = load_recipe("recipes/quickstart.yaml")
        >>> differing_keys(a, load_recipe("recipes/quickstart.yaml", ["pruning.amount=0.7"]))
        {'pruning.amount': (0.6, 0.7)}
    """
    return dict(_differences(a.model_dump(), b.model_dump(), ()))


def training_differences(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    """`differing_keys` of two recipes, but for where the data lie and what is merely kept or told.

    Example:
        >>> a = load_recipe("recipes/quickstart.yaml")
        >>> training_differences(
        ...     a, load_recipe("recipes/quickstart.yaml", ["training.keep_checkpoints=[3]"])
        ... )
        {}
    """
    return {key: value for key, value in differing_keys(a, b).items() if key not in _MAY_DIFFER}


def beyond_pruning(
    differing: Mapping[str, tuple[object, object]],
) -> dict[str, tuple[object, object]]:
    """Those of differing keys that are not within `pruning`."""
    return {key: value for key, value in differing.items() if key.partition(".")[0] != "pruning"}


def dense_epochs(recipe: Recipe) -> int:
    """The epochs that a recipe trains dense, before its era or without one.

    Example:
        >>> dense_epochs(load_recipe("recipes/quickstart.yaml"))
        3
    """
    return recipe.epochs if recipe.pruning == "none" else recipe.pruning.era[0]


def _differences(a: Any, b: Any, at: KeyPath) -> Iterator[tuple[str, tuple[object, object]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from _differences(a.get(key), b.get(key), (*at, key))
    elif a != b:
        yield ".".join(map(str, at)), (a, b)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe: keys, types and ranges, not the cross checks.

    Example:
        >>> sorted(recipe_schema()["required"])
        ['data', 'epochs', 'model', 'optimizer', 'pruning']
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def write_schema(path: str | os.PathLike[str]) -> None:
    """Writes `recipe_schema()` to the file `path`.

    Example:
        >>> write_schema("recipes/recipe.schema.json")
    """
    write_text(Path(path), _schema_text())


def _schema_text() -> str:
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Prints the schema."""
    sys.stdout.write(_schema_text())


def _overridden(
    tree: Any, overrides: Sequence[str]
) -> tuple[Any, list[tuple[str, ...]], list[str]]:
    """The tree with the overrides, the keys they set, and a line for each that could not be set."""
    keys_set, lines = [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        keys = tuple(part.strip() for part in key.split("."))
        if not (equals and all(keys)):
            text = f"must be KEY=VALUE {got(override)}, such as pruning.amount=0.7"
            lines.append(problem_line("--set", (), text))
            continue
        try:
            tree = _with_value(tree, keys, parse_yaml(value))
            keys_set.append(keys)
        except ValueError as error:
            lines.append(problem_line("--set", keys, str(error)))
    return tree, keys_set, lines


def _with_value(node: Any, keys: Sequence[str], value: object) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node, list):
        if not (key.isdecimal() and int(key) < len(node)):
            raise ValueError(f"no item {key} in a list of {len(node)}; the first is 0")
        index = int(key)
        return [*node[:index], _with_value(node[index], rest, value), *node[index + 1 :]]
    if node is None or isinstance(node, dict):
        node = node or {}
        return {**node, key: _with_value(node.get(key), rest, value)}
    raise ValueError(f"has no key {key} to set {got(node)}; set the whole value instead")


def read_mapping(path: Path, kind: str = "recipe", root: type[Settings] = Recipe) -> dict[Any, Any]:
    """The keys and values of a YAML file that is to hold a `root`, unchecked."""
    try:
        tree = parse_yaml(path.read_bytes().decode("utf-8-sig"))
        if isinstance(tree, dict):
            return tree
        received = "is empty" if tree is None else f"must be a mapping {got(tree, typed=True)}"
        fault = f"{received}; a {kind} has the keys {', '.join(root.model_fields)}"
    except FileNotFoundError:
        fault = f"no such file{_near_files(path.parent, path.name)}"
    except IsADirectoryError:
        fault = f"is a folder, not a {kind}{_near_files(path, f'{kind}.yaml')}"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except ValueError as error:
        fault = str(error)
    raise RecipeError(problem_line(os.fspath(path), (), fault))


def _near_files(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(name, names) or names
    return f"; in that folder: {', '.join(near[:5])}" if near else "; no YAML file in that folder"


if __name__ == "__main__":
    main()
