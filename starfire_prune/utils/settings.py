"""The base class of all settings, from YAML or Python, and their error messages."""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from starfire_prune.utils.text import NUMBER, did_you_mean, nearest

__all__ = [
    "KeyPath",
    "Problem",
    "RecipeError",
    "Settings",
    "SettingsT",
    "deep_problems",
    "got",
    "plain",
    "problem_line",
    "settings_error",
    "validated",
]


class RecipeError(ValueError):
    """All errors of a recipe, one per line: `source: key: what is wrong (value); suggestion`."""


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


_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
KeyPath = tuple[str | int, ...]
Problem = tuple[KeyPath, str]


def problem_line(source: str, path: KeyPath, text: str) -> str:
    """A line of a `RecipeError`: `source: key: what is wrong`."""
    return ": ".join(part for part in (source, ".".join(map(str, path)), text) if part)


def validated(
    root: type[SettingsT],
    tree: Any,
    *,
    keep_unset: bool = False,
) -> tuple[SettingsT | None, list[Problem]]:
    """The settings in `tree`, or None and a list of all errors in them."""
    try:
        return root.model_validate(tree, context={"keep_unset": keep_unset}), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = [_problem(root, tree, detail) for detail in details]
    absent = set(filter(None, (_meant(root, tree, detail) for detail in details)))
    return None, [
        (path, text)
        for path, text in dict.fromkeys((*problems, *deep_problems(root, tree)))
        if path not in absent
    ]


def _path_of(detail: ErrorDetails) -> KeyPath:
    return tuple(key for key in detail["loc"] if key not in ("<mapping>", "<none>", "[key]"))


def _meant(root: type[Settings], tree: Any, detail: ErrorDetails) -> KeyPath | None:
    """The path of the absent key that an unknown key resembles: its absence is no second error."""
    if detail["type"] not in ("extra_forbidden", "invalid_key"):
        return None
    *parents, key = _path_of(detail)
    near = nearest(key, _section_at(root, tree, tuple(parents)).model_fields)
    section = functools.reduce(_value_at, parents, tree)
    return None if near is None or near in (section or ()) else (*parents, near)


def _problem(root: type[Settings], tree: Any, detail: ErrorDetails) -> Problem:
    path = _path_of(detail)
    for free in ("options", "set"):  # below them, pydantic adds the types it tried
        if free in path:
            path = path[: path.index(free) + 2]
    section = _section_at(root, tree, path[:-1])
    if detail["type"] == "recipe":
        return path, detail["msg"]
    if detail["type"] == "missing":
        return path, f"is required ({section.model_fields[str(path[-1])].description})"
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        names = list(section.model_fields)
        suggestion = (
            section.unknown_key(str(path[-1]))
            or did_you_mean(path[-1], names)
            or f"; the keys here are {', '.join(names)}"
        )
        return path, f"unknown key {got(detail['input'])}{suggestion}"
    return path, _wrong_value(path, detail)


def _section_at(root: type[Settings], tree: Any, path: KeyPath) -> type[Settings]:
    """The section at a path within `tree`, the plain data of a `root`."""
    section = root.for_tree(tree)
    for key in path:
        tree = _value_at(tree, key)
        if isinstance(key, str) and key in section.parts:
            section = section.parts[key]
        section = section.for_tree(tree)
    return section


def _value_at(tree: Any, key: str | int) -> Any:
    """The value of a key of plain data, or None."""
    if isinstance(tree, dict):
        return tree.get(key)
    return tree[key] if isinstance(tree, list) and isinstance(key, int) else None


def _wrong_value(path: KeyPath, detail: ErrorDetails) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        return f"must be one of {', '.join(names)} {got(value)}{did_you_mean(value, names)}"
    if kind not in _EXPECTED:
        return f"{detail['msg'].replace('Input should', 'must')} {got(value)}"
    expected = _EXPECTED[kind].format(**context)
    if kind == "model_type" and path[-1:] in (("pruning",), ("fc",)):
        expected += " of settings, or none"
    quoted = kind in ("int_type", "float_type") and isinstance(value, str) and NUMBER.match(value)
    suggestion = f"; without quotes: {value}" if quoted else ""
    return f"must be {expected} {got(value, typed=kind.endswith('_type'))}{suggestion}"


def got(value: object, *, typed: bool = False) -> str:
    """The part of an error that shows a value: `(got 60)`, or `(got 60, an int)` if typed."""
    if value is None:
        return "(got nothing)"
    name = {"dict": "mapping", "tuple": "list"}.get(type(value).__name__, type(value).__name__)
    shown = _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    article = "an" if name[0] in "aeiou" else "a"
    return f"(got {shown}, {article} {name})" if typed else f"(got {shown})"


def settings_error(text: str) -> PydanticCustomError:
    """An error whose text appears unchanged in the `RecipeError`."""
    return PydanticCustomError("recipe", "{text}", {"text": text})


SettingsT = TypeVar("SettingsT", bound="Settings")


class Settings(BaseModel):
    """A section of settings: immutable, and strict about keys, types and ranges."""

    parts: ClassVar[Mapping[str, type[Settings]]] = {}
    """The sections within this one by their keys, including nested ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _cross_checked(self: SettingsT) -> SettingsT:
        problems = [
            InitErrorDetails(type=settings_error(text), loc=path, input=None)
            for path, text in self.problems(plain(self))
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    @classmethod
    def for_tree(cls, tree: Any) -> type[Settings]:
        """The class that validates this plain data, if the valid keys depend on values."""
        del tree
        return cls

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """The end of the error about a key that this section doesn't have, or nothing."""
        del key
        return ""

    @classmethod
    def problems(cls, tree: dict[str, Any]) -> Iterator[Problem]:
        """Errors between the keys of this section.

        Args:
            tree: The section as plain data, so that it can be checked even if a value is invalid.

        Yields:
            The path of a key within the section, and the error.
        """
        del tree
        yield from ()


def plain(value: Any) -> Any:
    """Turn mappings and models (their explicitly set fields) into dicts, sequences into lists."""
    if isinstance(value, BaseModel):
        value = {key: item for key, item in value if key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def deep_problems(root: type[Settings], tree: Any) -> Iterator[Problem]:
    """The errors between keys of a section and of the sections within it."""
    if isinstance(tree, list):
        for index, item in enumerate(tree):
            for path, text in deep_problems(root, item):
                yield (index, *path), text
    if not isinstance(tree, dict):
        return
    section = root.for_tree(tree)
    yield from section.problems(tree)
    for name, part in section.parts.items():
        if name in section.model_fields:
            for path, text in deep_problems(part, tree.get(name)):
                yield (name, *path), text
