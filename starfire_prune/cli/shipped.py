"""The recipes and tables that come with the package, found by name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Final

import starfire_prune
from starfire_prune.utils.text import first_few

__all__ = [
    "find_recipe",
    "find_table",
    "place_of",
    "recipes",
    "referred_files",
    "tables",
]

_PACKAGE: Final = Path(starfire_prune.__file__).resolve().parent
_PACKAGED: Final = _PACKAGE / "shipped_recipes"  # where pyproject.toml puts them in a wheel
_FOLDER: Final = _PACKAGED if _PACKAGED.is_dir() else _PACKAGE.parent / "recipes"
_REFERENCE: Final = re.compile(r"^(?:base|runs_of): (\S+\.yaml)\s*$|\$schema=(\S+)", re.MULTILINE)


def recipes() -> dict[str, Path]:
    """The files of the shipped recipes by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def tables() -> dict[str, Path]:
    """The files of the shipped tables of runs by name."""
    return {path.stem: path for path in sorted((_FOLDER / "tables").glob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """The file that a path or the name of a shipped recipe stands for; a file that exists wins.

    Raises:
        ValueError: If `text` names no folder, and neither a file nor a shipped recipe.
    """
    hints = {name: f"{name} is a table of runs: starfire sweep {name}" for name in tables()}
    return _find(text, "recipe", recipes(), hints)


def find_table(text: str) -> Path:
    """The file that a path or the name of a shipped table stands for; a file that exists wins.

    Raises:
        ValueError: If `text` names no folder, and neither a file nor a shipped table.
    """
    hints = {name: f"{name} is a recipe: starfire train {name}" for name in recipes()}
    return _find(text, "table", tables(), hints)


def _find(text: str, kind: str, shipped: dict[str, Path], hints: dict[str, str]) -> Path:
    path = Path(text)
    name = path.name.removesuffix(".yaml")
    if path.is_file():
        return path
    if path.parent != Path() or not path.name:
        if name in shipped and not path.parent.is_dir():
            raise ValueError(f"{text}: no such file; a {kind} of this name is shipped: {name}")
        return path  # whoever reads it says what is wrong
    if name in shipped:
        return shipped[name]
    if path.exists():
        return path
    here = (file.name for file in Path().glob("*.y*ml"))
    near = difflib.get_close_matches(text, {*shipped, *here}, n=3)
    suggestion = hints.get(name) or (
        f"did you mean {' or '.join(near)}?" if near else f"shipped are {first_few([*shipped], 9)}"
    )
    raise ValueError(f"{text}: no such file, and no shipped {kind} has this name; {suggestion}")


def referred_files(path: Path) -> list[Path]:
    """A shipped file and all files that it refers to: its schema, the base of a table."""
    found = [path]
    for file in found:
        text = file.read_text(encoding="utf-8") if file.suffix == ".yaml" else ""
        named = [
            (file.parent / (base or schema)).resolve() for base, schema in _REFERENCE.findall(text)
        ]
        found += [other for other in dict.fromkeys(named) if other not in found]
    return found


def place_of(path: Path) -> Path:
    """The place of a shipped file, relative to the folder of all of them."""
    return path.resolve().relative_to(_FOLDER.resolve())
