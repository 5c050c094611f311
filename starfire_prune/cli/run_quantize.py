"""What `starfire quantize` does: it calibrates, measures, writes the file and prints.

Of a run that has trained its quantization it reads the int8 model in place of calibrating one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from starfire_prune.cli.common import Failed, options_given
from starfire_prune.evaluation.quantized import (
    QuantizedWeights,
    measure_quantized,
    quantize_weights,
)
from starfire_prune.export.input import ExportInput, find_input, load_input
from starfire_prune.quantization.checks import check_masks
from starfire_prune.runs.folder import int8_file
from starfire_prune.runs.weights import WeightsWithRecipe, find_weights
from starfire_prune.serialization.files import FileFormat
from starfire_prune.serialization.quantized import load_quantized, save_quantized
from starfire_prune.utils.errors import TraceError

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Quantize a run, and print accuracy, zeros and size."""
    if not arguments.run.is_dir():
        raise ValueError(f"{arguments.run} is no folder: name the folder of a finished run")
    trained = find_weights(arguments.run, None, arguments.overrides, arguments.data)
    if others := [key for key in trained.other_settings if key.startswith("model.")]:
        raise ValueError(f"--set {others[0]} has no effect: the run's model is quantized")
    if any(each.startswith("quantization") for each in arguments.overrides):
        raise ValueError("--set quantization has no effect: the run is trained")
    if trained.recipe.quantization is not None:
        _check_trained(arguments)
    given = find_input(arguments.run, unfinished=arguments.unfinished)
    output = _output(arguments, trained)
    if output is not None:
        _check_output(output, given.weights, force=arguments.force)
    try:
        quantized = _quantized(arguments, trained, given)
    except TraceError as error:
        raise Failed(f"{arguments.run} can't be quantized: {error}") from error
    if output is not None:
        format = _format(arguments)
        save_quantized(
            quantized.module,
            output,
            format,
            deflate=format == "compressed",
            architecture=given.architecture,
        )
    _print(quantized, output or int8_file(arguments.run))


def _quantized(
    arguments: argparse.Namespace, trained: WeightsWithRecipe, given: ExportInput
) -> QuantizedWeights:
    model = load_input(given)
    if trained.recipe.quantization is not None:
        module = load_quantized(int8_file(arguments.run), model)
        return measure_quantized(trained, model, module, arguments.limit)
    return quantize_weights(
        trained,
        model,
        calibration_images=arguments.images or 512,
        limit=arguments.limit,
        reduced_range=arguments.reduced_range,
        unfinished=arguments.unfinished,
    )


def _print(quantized: QuantizedWeights, file: Path) -> None:
    zeros = check_masks(quantized.module).values()
    total = sum(layer.total for layer in zeros)
    print(
        f"top-1 {quantized.top1:.2%} in float32, {quantized.quantized_top1:.2%} in int8 "
        f"({quantized.images:,} images)"
    )
    print(
        f"{sum(layer.zeros for layer in zeros) / total:.2%} of {total:,} int8 weights are zero, "
        f"all {sum(layer.pruned for layer in zeros):,} pruned ones among them"
    )
    print(f"{file}: {file.stat().st_size:,} bytes")


def _format(arguments: argparse.Namespace) -> FileFormat:
    return "compressed" if arguments.compressed else "dense"


def _output(arguments: argparse.Namespace, trained: WeightsWithRecipe) -> Path | None:
    """The file to write; None if the run has written it and no other is asked for."""
    if arguments.output is None and trained.recipe.quantization is not None:
        return None
    return arguments.output or int8_file(arguments.run)


def _check_trained(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options without effect on a run that has trained its quantization."""
    given = options_given(arguments)
    for name in ("images", "reduced_range", "unfinished"):
        if name in given:
            raise ValueError(
                f"{given[name]} has no effect: {arguments.run} has trained its quantization, as "
                f"its recipe says"
            )
    for name in ("force", "compressed"):
        if name in given and arguments.output is None:
            raise ValueError(
                f"{given[name]} needs --output FILE: {int8_file(arguments.run)} is what "
                f"{arguments.run} has trained"
            )


def _check_output(output: Path, weights: Path, *, force: bool) -> None:
    """Raise ValueError if the output would replace what it must not."""
    if output.resolve() == weights.resolve():
        raise ValueError(f"--output {output} is what is quantized: choose another")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file")
    if output.exists() and not force:
        raise ValueError(f"{output} is there already: choose another --output, or give --force")
