"""Reading, overriding and writing recipes: YAML files that describe a training run.

A recipe is read into frozen models. Unknown keys, wrong types, values out of range and options
without effect are errors, and all of them are reported in one `RecipeError`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starfire_prune.engine.settings import Pruning
from starfire_prune.recipe.sections import Recipe
from starfire_prune.recipe.yaml import dump_yaml, parse_yaml
from starfire_prune.utils.files import write_text
from starfire_prune.utils.settings import (
    RecipeError,
    Settings,
    deep_problems,
    got,
    plain,
    problem_line,
    validated,
)

__all__ = ["dump_recipe", "load_recipe", "recipe_schema", "write_schema"]


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, keep_unset: bool = False
) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: Path of the file, in UTF-8.
        overrides: Settings that replace the file's, each `"KEY=VALUE"`: a dotted key (items of a
            list by index, from 0) and a value in YAML. Of two for the same key the later applies.
        keep_unset: Whether `${NAME}` is kept where that variable is not set, for a recipe that is
            only read.

    Raises:
        RecipeError: All errors, a line each: the source (the file, or `--set` for an override),
            the dotted key, what is wrong, the value, and a suggestion.

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


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe in YAML: defaults are written out, variables expanded.

    Options without effect are left out. `load_recipe` reads it back to an equal recipe.

    Example:
        >>> print(dump_recipe(load_recipe("recipes/quickstart.yaml")).splitlines()[-1])
          fc: {method: fine}
    """
    tree = recipe.model_dump(exclude_none=True)
    if recipe.pruning != "none":  # the method's options follow the method
        pruning = tree["pruning"]
        first = ("method", "amount", *recipe.pruning.options)
        own = {key: pruning.pop(key) for key in first if key in pruning}
        tree["pruning"] = {**own, **pruning}
    for (*parents, option), _ in list(deep_problems(Pruning, plain(tree["pruning"]))):
        section = tree["pruning"]
        for parent in parents:
            section = section[parent]
        del section[option]
    return dump_yaml(tree)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe: keys, types and ranges, no checks between keys.

    Example:
        >>> sorted(recipe_schema()["required"])
        ['data', 'epochs', 'model', 'optimizer', 'pruning']
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def write_schema(path: str | os.PathLike[str]) -> None:
    """Write `recipe_schema()` to the file `path`.

    Example:
        >>> write_schema("recipes/recipe.schema.json")  # doctest: +SKIP
    """
    write_text(Path(path), _schema_text())


def _schema_text() -> str:
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Print the schema."""
    sys.stdout.write(_schema_text())


def _overridden(
    tree: Any, overrides: Sequence[str]
) -> tuple[Any, list[tuple[str, ...]], list[str]]:
    """The tree with the overrides, the keys that they set, and an error for each that failed."""
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
    """The unchecked keys and values of a YAML file with the keys of `root`."""
    try:
        tree = parse_yaml(path.read_bytes().decode("utf-8-sig"))
        if isinstance(tree, dict):
            return tree
        received = "is empty" if tree is None else f"must be a mapping {got(tree, typed=True)}"
        message = f"{received}; a {kind} has the keys {', '.join(root.model_fields)}"
    except FileNotFoundError:
        message = f"no such file{_near_files(path.parent, path.name)}"
    except IsADirectoryError:
        message = f"is a folder, not a {kind}{_near_files(path, f'{kind}.yaml')}"
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except ValueError as error:
        message = str(error)
    raise RecipeError(problem_line(os.fspath(path), (), message))


def _near_files(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(name, names) or names
    return f"; in that folder: {', '.join(near[:5])}" if near else "; no YAML file in that folder"


if __name__ == "__main__":
    main()
