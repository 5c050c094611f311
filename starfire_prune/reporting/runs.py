"""The runs of a report, read from their folders: recipe, metrics, weights and evaluation."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor, nn

from starfire_prune.engine.sparsity import Sparsity, measure_sparsity
from starfire_prune.evaluation.results import (
    Evaluation,
    evaluation_file,
    file_sha256,
    read_evaluation,
)
from starfire_prune.experiments.run_numbers import RunNumbers, run_numbers
from starfire_prune.models import create_model
from starfire_prune.recipe.load import dump_recipe, load_recipe
from starfire_prune.recipe.sections import Model, Recipe
from starfire_prune.runs.folder import RunError, exported_file, read_metrics
from starfire_prune.serialization.metadata import is_finished_pruning
from starfire_prune.serialization.pretrained import load_weights
from starfire_prune.serialization.pruned import read_metadata
from starfire_prune.utils.errors import (
    CheckpointError,
    EvaluationError,
    ModelError,
    PretrainedError,
)
from starfire_prune.utils.settings import RecipeError

__all__ = [
    "ReportError",
    "ReportedRun",
    "Variant",
    "folder_of_data",
    "read_run",
    "settings_key",
    "variants_of",
]


_SEED: Final = re.compile(r"-seed\d+$")
_NAMED_DATA: Final = {"digits", "tiny_imagenet"}
# Largest difference between the exported zeros and those of the last epoch: if an average of the
# weights is exported, it has other accidental zeros
_OTHER_WEIGHTS: Final = 1e-3


class ReportError(ValueError):
    """A run can't be reported; the message is a sentence that says why and what to do."""


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """A run of a report.

    Attributes:
        folder: Path of the run's folder, as it was given.
        recipe: The recipe that the run trained.
        metrics: The objects of its `metrics.jsonl`.
        sparsity: Sparsity of the exported weights; None if the run isn't finished.
        evaluation: Contents of its `evaluation.json`; None if it was not evaluated.
        is_pruned: Whether its pruning, if any, was finished when the weights were exported.
    """

    folder: Path
    recipe: Recipe
    metrics: Sequence[Mapping[str, Any]] = ()
    sparsity: Sparsity | None = None
    evaluation: Evaluation | None = None
    is_pruned: bool = True

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    def mask(self, layer: str) -> Tensor:
        """The mask of a layer in the exported file, bool, of the weight's shape."""
        with safe_open(str(exported_file(self.folder)), framework="pt") as file:
            weight: Tensor = file.get_tensor(f"{layer}.weight")
        return weight != 0

    @property
    def finished(self) -> bool:
        """Whether all its epochs are done."""
        return len(self.metrics) == self.recipe.total_epochs

    @functools.cached_property
    def numbers(self) -> RunNumbers:
        """The numbers that its metrics give."""
        pruning = self.recipe.pruning
        return run_numbers(self.metrics, 0.0 if pruning == "none" else pruning.amount)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs that differ only in the seed.

    Attributes:
        name: Name of their folders, without the seed.
        runs: The runs by seed.
    """

    name: str
    runs: tuple[ReportedRun, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first run."""
        return self.runs[0].recipe

    @property
    def method(self) -> str:
        """The pruning method for convolutions, or `"dense"`."""
        return "dense" if self.recipe.pruning == "none" else self.recipe.pruning.method

    @property
    def is_dense(self) -> bool:
        """Whether its runs don't prune."""
        return self.method == "dense"

    @property
    def counted(self) -> tuple[ReportedRun, ...]:
        """The runs that count in means: the finished ones, or all if none is finished."""
        return tuple(run for run in self.runs if run.finished) or self.runs


def read_run(folder: Path, *, unfinished: bool = False) -> ReportedRun:
    """Read the folder of a run.

    Args:
        folder: Path of the run's folder.
        unfinished: Accept a run that isn't finished, or whose pruning isn't.

    Raises:
        ReportError: If there is no such folder, it isn't a run's, the run isn't finished, or a
            file is damaged or belongs to another run.
        OSError: If a file can't be read.

    Example:
        >>> read_run(Path("runs/quickstart")).numbers.best_top1  # doctest: +SKIP
        97.78
    """
    recipe = _recipe(folder)
    try:
        metrics = read_metrics(folder)
    except RunError as error:
        raise ReportError(str(error)) from error
    _check_metrics(folder, recipe, metrics)
    is_exported = exported_file(folder).is_file()
    if not (is_exported and len(metrics) == recipe.total_epochs):
        _check_unfinished(folder, recipe, len(metrics), is_exported, unfinished)
    if not is_exported:
        return ReportedRun(folder, recipe, metrics)
    sparsity = _sparsity(folder, recipe, metrics[-1])
    is_pruned = is_finished_pruning(read_metadata(exported_file(folder)))
    if not (is_pruned or unfinished):
        raise ReportError(
            f"{folder} has exported its weights before its pruning was finished: leave it out, or "
            f"add --unfinished to report it as it is"
        )
    return ReportedRun(folder, recipe, metrics, sparsity, _evaluation(folder), is_pruned)


def variants_of(runs: Iterable[ReportedRun]) -> tuple[Variant, ...]:
    """The runs in groups that differ only in the seed, in the order of their first runs.

    The name of a variant is that of its first run's folder without `-seedN`. Where two variants
    would have the same name, the folders above are added.
    """
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault(settings_key(run.recipe), []).append(run)
    firsts = [group[0].folder for group in groups.values()]
    names = _distinct_names(firsts)
    return tuple(
        Variant(name, tuple(sorted(group, key=lambda run: run.recipe.seed)))
        for name, group in zip(names, groups.values(), strict=True)
    )


def settings_key(recipe: Recipe, *, pruning: bool = True) -> str:
    """A text that recipes share if they train alike except for the seed, and maybe `pruning`."""
    data = recipe.data.model_copy(update={"root": folder_of_data(recipe)})
    training = recipe.training.model_copy(update={"trackers": (), "keep_checkpoints": ()})
    same = {"seed": 0, "data": data, "training": training}
    return dump_recipe(recipe.model_copy(update=same if pruning else {**same, "pruning": "none"}))


def folder_of_data(recipe: Recipe) -> str | None:
    """The folder's name where it identifies the data set of a recipe; None where `data.name` does.

    Only the last part of the path counts: on another machine the same data are elsewhere.
    """
    data = recipe.data
    if data.root is None or data.name in _NAMED_DATA or data.name.startswith("hfds/"):
        return None
    return re.split(r"[/\\]", data.root.rstrip("/\\"))[-1]


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path without the seed; more parts where these are not distinct."""
    parts = [folder.resolve().parts for folder in folders]
    names = [_SEED.sub("", path[-1]) for path in parts]
    depth = 1
    while len(set(names)) < len(names):
        doubled = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path[-depth:]) if name in doubled else name
            for name, path in zip(names, parts, strict=True)
        ]
        depth += 1
    return names


def _recipe(folder: Path) -> Recipe:
    if not folder.is_dir():
        raise ReportError(
            f"there is no folder {folder}: give a run's folder, which starfire train creates"
        )
    file = folder / "recipe.yaml"
    if not file.is_file():
        inner = sorted(path.parent for path in folder.glob("*/recipe.yaml"))
        hint = f"; it holds runs, give their folders: {inner[0]} …" if inner else ""
        raise ReportError(f"{folder} is not a run's folder: it holds no {file.name}{hint}")
    try:
        return load_recipe(file, keep_unset=True)
    except RecipeError as error:
        first, *more = str(error).splitlines()
        rest = f" (and {len(more)} more)" if more else ""
        raise ReportError(f"{first}{rest}; restore that file, or leave the run out") from error


def _check_metrics(folder: Path, recipe: Recipe, metrics: Sequence[Mapping[str, Any]]) -> None:
    epochs = [row["epoch"] for row in metrics]
    file = folder / "metrics.jsonl"
    if epochs != list(range(len(epochs))):
        raise ReportError(f"{file} is damaged: its epochs are not 0, 1, 2 …: restore it")
    if len(epochs) > recipe.total_epochs:
        raise ReportError(
            f"{file} belongs to another run: it has {len(epochs)} epochs, and the recipe beside it "
            f"{recipe.total_epochs}: restore it, or leave the run out"
        )
    for row in metrics:
        for key in ("top1", "sparsity_network"):
            if key not in row:
                raise ReportError(
                    f"{file} is damaged: epoch {row['epoch']} has no {key}: restore it"
                )


def _check_unfinished(
    folder: Path, recipe: Recipe, done: int, is_exported: bool, unfinished: bool
) -> None:
    if is_exported:
        raise ReportError(
            f"{folder / 'metrics.jsonl'} is damaged: it ends after {done} of {recipe.total_epochs} "
            f"epochs, though the run has exported its weights: restore it, or leave the run out"
        )
    if not unfinished:
        raise ReportError(
            f"{folder} isn't finished ({done} of {recipe.total_epochs} epochs are done): wait for "
            f"it, leave it out, or add --unfinished to report the epochs that are done"
        )


# Weights


def _sparsity(folder: Path, recipe: Recipe, last: Mapping[str, Any]) -> Sparsity:
    """Sparsity of the exported weights, which must fit the recipe's model and the metrics."""
    file = exported_file(folder)
    try:
        pruned = _pruned_layers(read_metadata(file), file)
        model = _model(recipe.model)
        fresh = load_weights(model, file)
    except (CheckpointError, PretrainedError) as error:
        raise ReportError(f"{error}; restore it, or leave the run out") from error
    except ModelError as error:
        raise ReportError(f"{folder}: {error}; leave the run out") from error
    if fresh:
        raise ReportError(
            f"{file} has another number of classes than the recipe beside it "
            f"({recipe.model.num_classes}): restore it, or leave the run out"
        )
    sparsity = measure_sparsity(model, pruned)
    _check_zeros(file, sparsity.network, last["sparsity_network"])
    return sparsity


def _pruned_layers(metadata: Mapping[str, Any], file: Path) -> list[str]:
    try:
        return [key.removesuffix(".weight") for key in metadata["weights"]]
    except (AttributeError, LookupError, TypeError) as error:
        raise ReportError(
            f"{file} was not exported by starfire train, its metadata don't name the pruned "
            f"layers: restore it, or leave the run out"
        ) from error


def _check_zeros(file: Path, exported: float, trained: float | None) -> None:
    if trained is not None and abs(exported - trained) > _OTHER_WEIGHTS:
        raise ReportError(
            f"{file} belongs to another run: {exported:.2%} of its weights are zero, and "
            f"metrics.jsonl ends with {trained:.2%}: restore it, or leave the run out"
        )


def _evaluation(folder: Path) -> Evaluation | None:
    try:
        evaluation = read_evaluation(folder)
    except EvaluationError as error:
        raise ReportError(str(error)) from error
    file = exported_file(folder)
    if evaluation is not None and evaluation.weights_sha256 != file_sha256(file):
        raise ReportError(
            f"{evaluation_file(folder)} belongs to other weights than {file}: evaluate again, or "
            f"delete it"
        )
    return evaluation


def _model(settings: Model) -> nn.Module:
    """The model of a recipe, the same object for subsequent runs of the same model."""
    return _cached_model(settings.name, settings.num_classes, json.dumps(settings.options))


@functools.lru_cache(maxsize=1)
def _cached_model(name: str, num_classes: int, options: str) -> nn.Module:
    return create_model(name, num_classes, **json.loads(options))
