"""`evaluation.json`: accuracy of a run's weights on the validation images, clean and attacked.

The file is in the folder of the run. It has a result for each attack with its settings, all of the
same weights and the same images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from starfire_prune.evaluation.attacks import Attack
from starfire_prune.runs.folder import read_metrics
from starfire_prune.runs.weights import WeightsWithRecipe
from starfire_prune.serialization.pruned import read_metadata
from starfire_prune.utils.errors import EvaluationError
from starfire_prune.utils.files import write_text
from starfire_prune.utils.text import format_columns, number_text

__all__ = [
    "Evaluation",
    "Result",
    "check_keeps",
    "evaluation_file",
    "file_sha256",
    "format_evaluation",
    "merged",
    "read_evaluation",
    "trained_top1",
    "write_evaluation",
]


_ATTACKS: Final = ("none", "fgsm", "pgd")
_SETTINGS: Final = {field.name for field in dataclasses.fields(Attack)} - {"name"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Result(_Model):
    """The accuracy under one attack with one epsilon, or of clean images.

    In JSON the attack's name is `attack`, and its settings are keys beside those of the result.

    Attributes:
        attack: The attack with its settings.
        images: Number of images measured.
        top1, top5: Accuracies in [0, 1].
        loss: Mean cross entropy; None where it is not finite.
    """

    attack: Attack
    images: int = Field(ge=1)
    top1: float = Field(ge=0, le=1)
    top5: float = Field(ge=0, le=1)
    loss: float | None

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or isinstance(tree.get("attack"), Attack):
            return tree
        settings = {key: tree[key] for key in tree if key in _SETTINGS}
        rest = {key: tree[key] for key in tree if key not in _SETTINGS}
        return {**rest, "attack": {"name": tree.get("attack"), **settings}}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.attack)
        measured = {key: getattr(self, key) for key in ("images", "top1", "top5", "loss")}
        return {"attack": settings.pop("name"), **settings, **measured}


class Evaluation(_Model):
    """The results of one file of weights.

    Attributes:
        format_version: Version of the file's format.
        weights_sha256: SHA-256 of the file of weights.
        source_sha256: SHA-256 of the weights of the runs that `Attack.source` names.
        data: The settings of the data that decide which images are measured.
        images: Number of validation images; a result with fewer is of a part of them.
        environment: Versions and device of the last evaluation.
        results: Clean images first, then by attack, source, settings and epsilon.
    """

    format_version: Literal[1] = 1
    weights_sha256: str
    source_sha256: dict[str, str] = {}
    data: dict[str, Any]
    images: int = Field(ge=1)
    environment: dict[str, Any]
    results: tuple[Result, ...] = Field(strict=False)


def evaluation_file(folder: Path) -> Path:
    """The file of a run's folder that holds its evaluation."""
    return folder / "evaluation.json"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_evaluation(folder: Path) -> Evaluation | None:
    """Read the evaluation in a run's folder; None where it has not been evaluated.

    Raises:
        EvaluationError: If the file is damaged, or of another format.

    Example:
        >>> evaluation = read_evaluation(Path("runs/quickstart"))  # doctest: +SKIP
        >>> evaluation.results[0].top1  # doctest: +SKIP
        0.9611
    """
    path = evaluation_file(folder)
    if not path.is_file():
        return None
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(
            f"{path} can't be read: {_reason(error)}; delete it, and evaluate again"
        ) from error


def write_evaluation(folder: Path, evaluation: Evaluation) -> Evaluation:
    """Merge an evaluation into the file in a run's folder, and return what the file then contains.

    Raises:
        EvaluationError: If the existing file can't be read, or the new one can't be written.
    """
    whole = merged(read_evaluation(folder), evaluation)
    path = evaluation_file(folder)
    try:
        write_text(path, whole.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise EvaluationError(f"{path} can't be written: {error.strerror or error}") from error
    return whole


def merged(old: Evaluation | None, new: Evaluation) -> Evaluation:
    """The results of both evaluations; of two with the same settings the new one.

    Old results of other weights or other images are dropped, and so are those whose attack followed
    a run with the same name and other weights.
    """
    if old is None or _measured_on(old) != _measured_on(new):
        return new.model_copy(update={"results": _in_order(new.results)})
    replaced = {(result.attack, result.images) for result in new.results}
    stale = {
        name
        for name, sha256 in new.source_sha256.items()
        if old.source_sha256.get(name, sha256) != sha256
    }
    kept = [
        result
        for result in old.results
        if (result.attack, result.images) not in replaced and result.attack.source not in stale
    ]
    return new.model_copy(
        update={
            "source_sha256": {**old.source_sha256, **new.source_sha256},
            "results": _in_order([*kept, *new.results]),
        }
    )


def format_evaluation(evaluation: Evaluation) -> str:
    """The table of an evaluation, a line per result.

    Example:
        >>> clean = Result(attack=Attack("none"), images=8, top1=0.75, top5=1.0, loss=0.5)
        >>> known = {"weights_sha256": "", "data": {}, "environment": {}}
        >>> print(format_evaluation(Evaluation(images=8, results=(clean,), **known)))
        attack  epsilon  precision  images  top-1 [%]  top-5 [%]    loss
        ------  -------  ---------  ------  ---------  ---------  ------
        clean            fp32            8      75.00     100.00  0.5000
    """
    header = ("attack", "epsilon", "precision", "images", "top-1 [%]", "top-5 [%]", "loss")
    rows = [
        [
            result.attack.label,
            "" if result.attack.name == "none" else result.attack.epsilon_text,
            result.attack.precision,
            f"{result.images}",
            f"{100 * result.top1:.2f}",
            f"{100 * result.top5:.2f}",
            number_text(result.loss, 4),
        ]
        for result in evaluation.results
    ]
    return format_columns(header, rows, left=(0, 1, 2))


def _measured_on(evaluation: Evaluation) -> tuple[object, ...]:
    """The weights and images that are measured; the same data may be in another folder."""
    data = {key: value for key, value in evaluation.data.items() if key != "root"}
    return evaluation.weights_sha256, data, evaluation.images


def _in_order(results: Iterable[Result]) -> tuple[Result, ...]:
    def place(result: Result) -> tuple[object, ...]:
        attack = result.attack
        numbers = (-1 if n is None else n for n in (attack.steps, attack.restarts, attack.seed))
        size = (attack.epsilon, attack.step_size or 0.0)
        kind = (_ATTACKS.index(attack.name), attack.source or "", attack.space)
        return (*kind, *numbers, *size, attack.precision, result.images)

    return tuple(sorted(results, key=place))


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def check_keeps(trained: WeightsWithRecipe) -> None:
    """Raise EvaluationError if the evaluation of a run can't be stored in its folder."""
    if trained.folder is None or not trained.keeps_evaluation:
        return
    read_evaluation(trained.folder)
    if not os.access(trained.folder, os.W_OK | os.X_OK):
        raise EvaluationError(
            f"{evaluation_file(trained.folder)} can't be written: make the folder writable, or "
            f"give {trained.weights} --recipe {trained.folder / 'recipe.yaml'}, which stores none"
        )


def trained_top1(trained: WeightsWithRecipe) -> float | None:
    """The top-1 in [0, 1] that a run measured at its end; None for other weights.

    It is None after a quantization phase too, whose epochs are measured in int8.
    """
    if trained.folder is None or not trained.keeps_evaluation or trained.recipe.quantization:
        return None
    is_average = "average_decay" in read_metadata(trained.weights)
    rows = read_metrics(trained.folder)
    return rows[-1].get("ema_top1" if is_average else "top1") if rows else None
