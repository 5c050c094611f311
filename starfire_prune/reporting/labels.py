"""Texts that several parts of a report share, and the names of its pictures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from starfire_prune.recipe.sections import Recipe
from starfire_prune.reporting.document import Picture
from starfire_prune.reporting.runs import Variant, folder_of_data

__all__ = ["data_text", "enumerated", "file_name", "numbered", "settings_text"]


def settings_text(variants: Iterable[Variant]) -> str:
    """The model, data, epochs and seeds of runs, in a few words."""
    runs = [run for variant in variants for run in variant.runs]
    seeds = sorted({run.recipe.seed for run in runs})
    epochs = sorted({run.recipe.total_epochs for run in runs})
    models = dict.fromkeys(run.recipe.model.name for run in runs)
    data = dict.fromkeys(data_text(run.recipe) for run in runs)
    epochs_text = f"{enumerated(epochs)} epoch{'s' * (epochs != [1])}"
    seeds_text = f"seed{'s' * (len(seeds) > 1)} {enumerated(seeds)}"
    return f"{enumerated(models)} on {enumerated(data)}, {epochs_text}, {seeds_text}"


def data_text(recipe: Recipe) -> str:
    """The data set of a recipe: name, folder, classes and image size."""
    data = recipe.data
    name, folder = data.name, folder_of_data(recipe)
    if folder is not None:
        name = folder if name == "folder" else f"{name} in {folder}"
    return f"{name} ({recipe.model.num_classes} classes, {data.image_size} px)"


def enumerated(items: Iterable[object]) -> str:
    """Items with commas and an "and".

    Example:
        >>> enumerated([0, 1, 2])
        '0, 1 and 2'
    """
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last


def numbered(pictures: Sequence[Picture]) -> Iterator[Picture]:
    """The same pictures, with distinct file names."""
    taken: set[str] = set()
    for picture in pictures:
        names = (picture.name, *(f"{picture.name}-{n}" for n in range(2, len(pictures) + 1)))
        name = next(name for name in names if name.lower() not in taken)
        taken.add(name.lower())  # some file systems ignore case
        yield dataclasses.replace(picture, name=name)


def file_name(name: str) -> str:
    """A name without the characters that don't belong in a file name.

    Example:
        >>> file_name("runs/ck 60")
        'runs-ck-60'
    """
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
