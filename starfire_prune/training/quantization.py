"""The last phase of a run, in which the model trains with the rounding of int8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.models import create_model
from starfire_prune.quantization.training import QuantizedTraining
from starfire_prune.runs.folder import RunError, int8_file
from starfire_prune.serialization.quantized import save_quantized
from starfire_prune.training.learning_rate import recipe_factor
from starfire_prune.training.setup import Run, example_images
from starfire_prune.utils.errors import QuantizationError, TraceError
from starfire_prune.utils.modules import unwrap

__all__ = [
    "begin_quantization",
    "check_quantization",
    "explained_divergence",
    "export_quantized",
    "float_model",
]


def check_quantization(run: Run) -> None:
    """Check that the phase can be trained and its model exported, if the recipe has the phase.

    Args:
        run: The prepared run; it is not changed.

    Raises:
        RunError: If the run has several processes or a GPU, or torchao can't quantize its model.
        ModuleNotFoundError: If torchao is not installed.
    """
    settings = run.recipe.quantization
    if settings is None:
        return
    processes, device = run.accelerator.num_processes, run.accelerator.device.type
    if processes > 1:
        raise RunError(
            f"quantization (epochs={settings.epochs}) is trained by a single process, and this run "
            f"has {processes}: launch one, or remove quantization"
        )
    if device != "cpu":
        raise RunError(
            f"quantization (epochs={settings.epochs}) is trained on the CPU only, and this run is "
            f"on {device}: launch it by accelerate launch --cpu, or remove quantization"
        )
    model = run.recipe.model
    try:
        _try_out(run, create_model(model.name, model.num_classes, **model.options))
    except (QuantizationError, TraceError) as error:
        raise RunError(
            f"quantization: model {model.name} can't be trained for int8: {error}; or remove "
            f"quantization"
        ) from error


def begin_quantization(run: Run, state: Mapping[str, Tensor] | None = None) -> None:
    """Let a run go on with the rounding of int8; its optimizer and pruner stay as they are.

    Args:
        run: The run after its float epochs.
        state: State of the phase from a checkpoint; without it the phase begins.
    """
    masks = {} if run.pruner is None else run.pruner.masks()
    run.quantized = _quantized(run, float_model(run.model), masks)
    if state is not None:
        run.quantized.load_state(state)


@contextmanager
def explained_divergence(run: Run) -> Iterator[None]:
    """Raise RunError for what fails in the phase because numbers are no longer finite."""
    try:
        yield
    except (AssertionError, QuantizationError, RuntimeError) as error:  # torchao asserts
        if run.quantized is None or _is_finite(run.quantized.module):
            raise
        rate = run.recipe.optimizer.lr * recipe_factor(run.recipe, run.recipe.epochs)
        raise RunError(
            f"training has diverged in the quantization phase: weights or ranges are no longer "
            f"finite; lower quantization.lr (={rate:g})"
        ) from error


def _is_finite(module: nn.Module) -> bool:
    scales = [value for name, value in module.named_buffers() if name.endswith("scale")]
    return all(bool(each.isfinite().all()) for each in (*module.parameters(), *scales))


def float_model(model: nn.Module) -> nn.Module:
    """The model without wrappers, and without the autocast that Accelerate adds to it."""
    model = unwrap(model)
    if vars(model).pop("_original_forward", None) is not None:
        vars(model).pop("forward", None)
    return model


def export_quantized(run: Run, architecture: Mapping[str, Any]) -> None:
    """Write the int8 model of a run that has trained the phase."""
    if run.quantized is not None:
        file = int8_file(run.folder)
        save_quantized(run.quantized.finished(), file, architecture=architecture)


def _quantized(run: Run, model: nn.Module, masks: Mapping[str, Tensor]) -> QuantizedTraining:
    settings = run.recipe.quantization
    return QuantizedTraining(
        model,
        example_images(run.recipe, run.accelerator.device),
        reduced_range=settings is not None and settings.reduced_range,
        masks=masks,
    )


def _try_out(run: Run, model: nn.Module) -> None:
    """Train a model for a forward pass, and quantize it."""
    images = example_images(run.recipe, run.accelerator.device)
    if run.recipe.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    training = _quantized(run, model, {})
    with torch.no_grad():
        training.module(images)
    training.finished()
