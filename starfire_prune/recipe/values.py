"""Types of values in recipes, with the checks that a single value needs."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationInfo,
    WithJsonSchema,
)

from starfire_prune.data import DATASETS, READER_OPTIONS, is_policy, reader_of
from starfire_prune.engine.settings import Name, one_or_list
from starfire_prune.methods.options import Count
from starfire_prune.utils.settings import got, settings_error

__all__ = [
    "ChannelMeans",
    "ChannelScales",
    "CropScale",
    "DataName",
    "Milestones",
    "Options",
    "Policy",
    "Pretrained",
    "Probability",
    "Root",
    "Trackers",
]


def _rising(milestones: tuple[int, ...]) -> tuple[int, ...]:
    if all(a < b for a, b in itertools.pairwise(milestones)):
        return milestones
    raise settings_error(f"must rise {got(milestones)}; in order: {sorted(set(milestones))}")


def _expanded(root: str, info: ValidationInfo) -> str:
    kept = []

    def value_of(match: re.Match[str]) -> str:
        if value := os.environ.get(match[1]):
            return value
        if info.context and info.context.get("keep_unset"):
            kept.append(match[0])
            return match[0]
        raise settings_error(
            f"the environment variable {match[1]} is not set {got(root)}; "
            f"export {match[1]}=/path/to/the/data, or name the folder itself"
        )

    path = os.path.expanduser(re.sub(r"\$\{(\w+)\}", value_of, root))
    if path.count("${") > len(kept):
        raise settings_error(f"has a ${{ without a name and }} {got(path)}; write ${{NAME}}")
    return path


def _data_name(name: str, info: ValidationInfo) -> str:
    reader, _, rest = name.partition("/")
    if reader_of(name) is not None:
        return f"{reader}/{_expanded(rest, info)}"
    if name in DATASETS:
        return name
    readers = ", ".join(f"{reader}/…" for reader in READER_OPTIONS)
    near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    raise settings_error(
        f"must be one of {', '.join(DATASETS)}, {readers} {got(name)}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _channels(value: object) -> object:
    numbers = isinstance(value, (list, tuple)) and [type(item) in (int, float) for item in value]
    if numbers == [True] * 3:
        return value
    raise settings_error(f"must be three numbers, one a channel {got(value)}")


def _scale(value: object) -> object:
    numbers = isinstance(value, (list, tuple)) and [type(item) in (int, float) for item in value]
    if numbers == [True] * 2 and 0 < value[0] <= value[1] <= 1:  # type: ignore[index]
        return value
    raise settings_error(f"must be two numbers, 0 < low <= high <= 1 {got(value)}")


def _policy(text: str) -> str:
    if is_policy(text):
        return text
    raise settings_error(
        f"is no policy of timm's {got(text)}; such as rand-m9-mstd0.5, augmix-m3, original or 3a"
    )


def _pretrained(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and value:
        return _expanded(value, info)
    if isinstance(value, bool):
        return value
    raise settings_error(f"must be true, false or a safetensors file {got(value, typed=True)}")


Options = dict[str, JsonValue]
DataName = Annotated[
    str,
    AfterValidator(_data_name),
    WithJsonSchema(
        {"anyOf": [{"enum": [*DATASETS]}, {"pattern": "^((hfds|torch|torchvision)/.|wds/)"}]}
    ),
]
Pretrained = Annotated[bool | Name, BeforeValidator(_pretrained)]
Tracker = Literal[
    "tensorboard",
    "wandb",
    "comet_ml",
    "aim",
    "mlflow",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
]
Trackers = Annotated[
    tuple[Tracker, ...],
    BeforeValidator(one_or_list, json_schema_input_type=Tracker | list[Tracker]),
    Field(strict=False),
]
Probability = Annotated[float, Field(ge=0, le=1)]
Root = Annotated[str, AfterValidator(_expanded)]
Policy = Annotated[str, AfterValidator(_policy)]
Milestones = Annotated[tuple[Count, ...], Field(strict=False), AfterValidator(_rising)]
ChannelMeans = Annotated[
    tuple[float, float, float], BeforeValidator(_channels), Field(strict=False)
]
_Positive = Annotated[float, Field(gt=0)]
ChannelScales = Annotated[
    tuple[_Positive, _Positive, _Positive], BeforeValidator(_channels), Field(strict=False)
]
CropScale = Annotated[tuple[float, float], BeforeValidator(_scale), Field(strict=False)]
