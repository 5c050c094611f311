"""Write docs/recipe.md, the page of all keys of a recipe: python docs/keys.py.

The names, defaults and descriptions are those of the recipe's schema, which the settings declare.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starfire_prune.methods.registry import METHODS
from starfire_prune.recipe.load import recipe_schema

PAGE = Path(__file__).with_name("recipe.md")

HEAD = """\
# The keys of a recipe

A recipe is a YAML file with the sections below. Unknown keys, values out of range and options
without effect are errors; `--dry-run` checks a recipe without training. `--set KEY=VALUE` overrides
a key by its dotted name, such as `--set pruning.amount=0.7`. What a default of "-" means is in the
description. [`recipe.schema.json`](../recipes/recipe.schema.json) completes the keys in editors.

`python docs/keys.py` writes this page from the settings themselves.
"""
SECTIONS = {
    "model": "Model",
    "data": "Data",
    "optimizer": "Optimizer",
    "lr_schedule": "LrSchedule",
    "training": "Training",
    "training.ema": "Ema",
    "quantization": "Quantization",
}


def page() -> str:
    """The page in Markdown."""
    schema = recipe_schema()
    parts = schema["$defs"]
    lines = [HEAD, "## The recipe\n", *_table(schema)]
    for key, name in SECTIONS.items():
        lines += [f"\n## `{key}`\n", f"{parts[name]['description']}\n", *_table(parts[name])]
    return "\n".join([*lines, *_pruning(parts)]) + "\n"


def _pruning(parts: Mapping[str, Any]) -> Iterator[str]:
    methods = {name: parts[f"Pruning_{name}"] for name in METHODS if f"Pruning_{name}" in parts}
    first = next(iter(methods.values()))
    shared = [
        key
        for key in first["properties"]
        if all(key in own["properties"] for own in methods.values())
    ]
    yield "\n## `pruning`\n"
    yield "What is pruned, how far and when; `pruning: none` trains a dense network.\n"
    yield from _table({**first, "properties": {key: first["properties"][key] for key in shared}})
    yield f"\nIts `method` is one of {_quoted(methods)}. The other keys are options of methods:\n"
    yield from _options(methods, shared)
    fc = _variants(parts["Fc"])
    yield "\n## `pruning.fc`\n"
    yield "How linear layers are pruned; `fc: none` leaves them dense.\n"
    some = {"properties": {key: fc["fine"]["properties"][key] for key in ("method", "amount")}}
    yield from _table(some)
    yield f"\nIts `method` is one of {_quoted(fc)}. The other keys are options of methods:\n"
    yield from _options(fc, [*some["properties"]])
    yield ""
    override = parts["Override"]
    own = ("layers", "method", "amount")
    yield "## `pruning.overrides`\n"
    description = " ".join(override["description"].split())
    further = "the options of the method that it names, or else of the methods of its layers"
    yield f"{description} Further keys are {further}.\n"
    yield from _table({**override, "properties": {key: override["properties"][key] for key in own}})


def _variants(section: Mapping[str, Any]) -> dict[str, Any]:
    """The variants of a section by their method."""
    return {each["properties"]["method"]["const"]: each for each in section["oneOf"]}


def _table(section: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | default | description |"
    yield "|---|---|---|"
    required = section.get("required", ())
    for key, field in section["properties"].items():
        default = "required" if key in required else _default(field)
        yield f"| `{key}` | {default} | {_description(field)} |"


def _options(methods: Mapping[str, Any], without: list[str]) -> Iterator[str]:
    """The options of methods, one a line for each different description."""
    yield "| key | methods | default | description |"
    yield "|---|---|---|---|"
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, section in methods.items():
        for key, field in section["properties"].items():
            if key not in without:
                line = (key, _default(field), _description(field))
                found.setdefault(line, []).append(name)
    for (key, default, description), names in found.items():
        yield f"| `{key}` | {_quoted(names)} | {default} | {description} |"


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    return "-" if value in (None, "", {}, []) else f"`{_yaml(value)}`"


def _description(field: Mapping[str, Any]) -> str:
    text = field.get("description", "").replace("|", "\\|")
    choices = field.get("enum") or field.get("items", {}).get("enum") or []
    new = [str(choice) for choice in choices if str(choice) not in text.replace(",", " ").split()]
    return f"{text}: {_quoted(choices)}" if new else text


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
