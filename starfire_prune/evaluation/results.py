"""What the weights of a run came to on the validation images, clean and attacked: a JSON file.

`evaluation.json` lies in the folder of the run. It holds a result for each attack and its settings,
all of the same weights and the same images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from starfire_prune.runs.folder import read_metrics
from starfire_prune.runs.weights import WeightsWithRecipe
from starfire_prune.serialization.pruned import read_metadata
from starfire_prune.utils.errors import EvaluationError
from starfire_prune.utils.files import write_text
from starfire_prune.utils.text import format_columns

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


_MEASURED: Final = {"top1", "top5", "loss"}
_ATTACKS: Final = ("none", "fgsm", "pgd")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Result(_Model):
    """What came of one attack with one epsilon.

    Attributes:
        attack: on the images; none for clean ones.
        epsilon: by how much an attack may change each number of an image; 0 for clean ones.
        space: epsilon is of pixels in [0, 1], or of the normalised numbers that the model gets;
            without meaning for clean images.
        steps: of PGD.
        step_size: of PGD, in the same unit as epsilon.
        restarts: of PGD.
        seed: of PGD's random starts; None where it starts from the images themselves.
        source: name of the run whose gradients the attack followed; None for the model's own.
        precision: of the passes, both of the attack and of the measurement.
        images: that were measured.
        top1, top5: shares in [0, 1].
        loss: mean cross entropy; None where it is not finite.
    """

    attack: Literal["none", "fgsm", "pgd"]
    epsilon: float = Field(ge=0)
    space: Literal["pixel", "normalised"] = "pixel"
    steps: int | None = Field(None, ge=1)
    step_size: float | None = Field(None, ge=0)
    restarts: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)
    source: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    images: int = Field(ge=1)
    top1: float = Field(ge=0, le=1)
    top5: float = Field(ge=0, le=1)
    loss: float | None

    @property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """Everything but what was measured: of two results with the same the later one counts."""
        return tuple(self.model_dump(exclude=_MEASURED).items())


class Evaluation(_Model):
    """The results of one file of weights.

    Attributes:
        format_version: of the file.
        weights_sha256: of the weights' file.
        source_sha256: of the weights' files of the runs that `Result.source` names.
        data: the settings of the data that decide what the images are.
        images: in the validation part; a result of fewer is of a part of them.
        environment: versions and device of the last evaluation.
        results: clean ones first, then by attack, source, settings and epsilon.
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
        EvaluationError: if the file is damaged, or of another format.

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
            f"{path} can't be read: {_reason(error)}; delete it, and evaluate anew"
        ) from error


def write_evaluation(folder: Path, evaluation: Evaluation) -> Evaluation:
    """Merge an evaluation into the file of a run's folder; what the file then holds.

    Raises:
        EvaluationError: if the file that is there can't be read, or none can be written.
    """
    whole = merged(read_evaluation(folder), evaluation)
    path = evaluation_file(folder)
    try:
        write_text(path, whole.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise EvaluationError(f"{path} can't be written: {error.strerror or error}") from error
    return whole


def merged(old: Evaluation | None, new: Evaluation) -> Evaluation:
    """The results of both: of the same settings the new one.

    Nothing old is left where it is of other weights or images, nor what was attacked from a run
    of the same name with other weights.
    """
    if old is None or _subject(old) != _subject(new):
        return new.model_copy(update={"results": _in_order(new.results)})
    replaced = {result.settings for result in new.results}
    stale = {
        name for name, own in new.source_sha256.items() if old.source_sha256.get(name, own) != own
    }
    kept = [
        result
        for result in old.results
        if result.settings not in replaced and result.source not in stale
    ]
    return new.model_copy(
        update={
            "source_sha256": {**old.source_sha256, **new.source_sha256},
            "results": _in_order([*kept, *new.results]),
        }
    )


def format_evaluation(evaluation: Evaluation) -> str:
    """The table of an evaluation, a result a line.

    Example:
        >>> clean = Result(attack="none", epsilon=0.0, images=8, top1=0.75, top5=1.0, loss=0.5)
        >>> known = {"weights_sha256": "", "data": {}, "environment": {}}
        >>> print(format_evaluation(Evaluation(images=8, results=(clean,), **known)))
        attack  epsilon  precision  images  top-1 [%]  top-5 [%]    loss
        ------  -------  ---------  ------  ---------  ---------  ------
        none             fp32            8      75.00     100.00  0.5000
    """
    header = ("attack", "epsilon", "precision", "images", "top-1 [%]", "top-5 [%]", "loss")
    rows = [
        [
            _attack_cell(result),
            "" if result.attack == "none" else f"{_amount(result, result.epsilon)} {result.space}",
            result.precision,
            f"{result.images}",
            f"{100 * result.top1:.2f}",
            f"{100 * result.top5:.2f}",
            "-" if result.loss is None else f"{result.loss:.4f}",
        ]
        for result in evaluation.results
    ]
    return format_columns(header, rows, left=(0, 1, 2))


def _attack_cell(result: Result) -> str:
    text: str = result.attack
    if result.steps is not None and result.step_size is not None:
        text += f" {result.steps} steps of {_amount(result, result.step_size)}"
        if result.seed is None:
            text += " from the images"
        elif result.restarts is not None and result.restarts > 1:
            text += f", {result.restarts} starts"
    return text if result.source is None else f"{text} by {result.source}"


def _amount(result: Result, value: float) -> str:
    """An epsilon as it is mostly written: levels of 255 for pixels."""
    levels = round(value * 255, 2)
    if result.space == "pixel" and 0 < value < 1 and abs(value * 255 - levels) < 1e-6:
        return f"{levels:g}/255"
    return f"{value:.4g}"


def _subject(evaluation: Evaluation) -> tuple[object, ...]:
    """Of what the results are; the same data may lie elsewhere."""
    data = {key: value for key, value in evaluation.data.items() if key != "root"}
    return evaluation.weights_sha256, data, evaluation.images


def _in_order(results: Iterable[Result]) -> tuple[Result, ...]:
    def place(result: Result) -> tuple[object, ...]:
        numbers = (result.steps, result.restarts, result.seed)
        return (
            _ATTACKS.index(result.attack),
            result.source or "",
            result.space,
            *(-1 if number is None else number for number in numbers),
            result.epsilon,
            result.step_size or 0.0,
            result.precision,
            result.images,
        )

    return tuple(sorted(results, key=place))


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def check_keeps(subject: WeightsWithRecipe) -> None:
    """Raise EvaluationError if the evaluation of a run could not be kept in its folder."""
    if subject.folder is None or not subject.keeps_evaluation:
        return
    read_evaluation(subject.folder)
    if not os.access(subject.folder, os.W_OK | os.X_OK):
        raise EvaluationError(
            f"{evaluation_file(subject.folder)} can't be written: make the folder writable, or "
            f"give {subject.weights} --recipe {subject.folder / 'recipe.yaml'}, which keeps nothing"
        )


def trained_top1(subject: WeightsWithRecipe) -> float | None:
    """The top-1 of a run's weights as it measured them itself at its end, in [0, 1]."""
    if subject.folder is None or not subject.keeps_evaluation:
        return None
    is_average = "average_decay" in read_metadata(subject.weights)
    rows = read_metrics(subject.folder)
    return rows[-1].get("ema_top1" if is_average else "top1") if rows else None
