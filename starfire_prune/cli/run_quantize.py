"""What `starfire quantize` does: it calibrates, measures, writes the file and prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from starfire_prune.cli.common import Failed
from starfire_prune.evaluation.quantized import quantize_weights
from starfire_prune.export.input import find_input, load_input
from starfire_prune.quantization.checks import check_masks
from starfire_prune.runs.folder import exported_file
from starfire_prune.runs.weights import find_weights
from starfire_prune.serialization.files import FileFormat
from starfire_prune.serialization.quantized import save_quantized
from starfire_prune.utils.errors import TraceError

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Quantize a run, and print accuracy, zeros and size."""
    if not arguments.run.is_dir():
        raise ValueError(f"{arguments.run} is no folder: name the folder of a finished run")
    trained = find_weights(arguments.run, None, arguments.overrides, arguments.data)
    if others := [key for key in trained.other_settings if key.startswith("model.")]:
        raise ValueError(f"--set {others[0]} has no effect: the run's model is quantized")
    given = find_input(arguments.run, unfinished=arguments.unfinished)
    output = arguments.output or exported_file(arguments.run).with_name("int8.safetensors")
    _check_output(output, given.weights, force=arguments.force)
    try:
        quantized = quantize_weights(
            trained,
            load_input(given),
            calibration_images=arguments.images,
            limit=arguments.limit,
            reduced_range=arguments.reduced_range,
            unfinished=arguments.unfinished,
        )
    except TraceError as error:
        raise Failed(f"{arguments.run} can't be quantized: {error}") from error
    module, format = quantized.module, _format(arguments)
    save_quantized(
        module,
        output,
        format,
        deflate=format == "compressed",
        architecture=given.architecture,
    )
    zeros = check_masks(module).values()
    total = sum(layer.total for layer in zeros)
    print(
        f"top-1 {quantized.top1:.2%} in float32, {quantized.quantized_top1:.2%} in int8 "
        f"({quantized.images:,} images)"
    )
    print(
        f"{sum(layer.zeros for layer in zeros) / total:.2%} of {total:,} int8 weights are zero, "
        f"all {sum(layer.pruned for layer in zeros):,} pruned ones among them"
    )
    print(f"{output}: {output.stat().st_size:,} bytes")


def _format(arguments: argparse.Namespace) -> FileFormat:
    return "compressed" if arguments.compressed else "dense"


def _check_output(output: Path, weights: Path, *, force: bool) -> None:
    """Raise ValueError if the output would replace what it must not."""
    if output.resolve() == weights.resolve():
        raise ValueError(f"--output {output} is what is quantized: choose another")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file")
    if output.exists() and not force:
        raise ValueError(f"{output} is there already: choose another --output, or give --force")
