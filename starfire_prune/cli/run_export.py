"""What `starfire export` does: it writes a file, or inspects one, and prints what is in it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from starfire_prune.cli.common import Failed
from starfire_prune.cli.shipped import find_recipe
from starfire_prune.compact.compaction import compact, format_compaction
from starfire_prune.compact.files import save_compact
from starfire_prune.export.input import ExportInput, find_input, load_input, write_weights
from starfire_prune.export.onnx import data_files, export_onnx
from starfire_prune.export.timm import CONFIG, WEIGHTS, is_folder_of, write_timm_folder
from starfire_prune.runs.folder import RunError, existing_part
from starfire_prune.runtime.program import load
from starfire_prune.serialization import inspect
from starfire_prune.serialization.program import save_program
from starfire_prune.sparse.compiler import compile
from starfire_prune.utils.errors import ExportError

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> None:
    """Export or inspect, and print a line or a table as soon as it is known."""
    try:
        for text in _inspected(arguments.inspect) if arguments.inspect else _exported(arguments):
            print(text, flush=True)
    except RunError:
        raise
    except (RuntimeError, MemoryError) as error:  # torch's, a full memory's, of deep nesting
        raise Failed(_unforeseen(arguments, error), status=1) from error


def _unforeseen(arguments: argparse.Namespace, error: BaseException) -> str:
    """The sentence for an error that no check foresees."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"it takes more memory than is free ({text})"
    if isinstance(error, RecursionError):
        text = f"it nests too deeply ({text}); restore it"
    if arguments.inspect:
        return f"{arguments.inspect} can't be inspected: {text}"
    return f"{arguments.source} can't be exported as {arguments.format}: {text}"


def _inspected(file: Path) -> Iterator[str]:
    if file.is_dir():
        raise ValueError(f"--inspect {file} is a folder: name a safetensors file")
    yield inspect.format_inspection(inspect.inspect_pruned(file))


def _exported(arguments: argparse.Namespace) -> Iterator[str]:
    recipe = None if arguments.recipe is None else find_recipe(arguments.recipe)
    given = find_input(arguments.source, recipe, arguments.model, unfinished=arguments.unfinished)
    _check_output(arguments, given)
    if arguments.format in ("dense", "compressed"):
        return _weights(arguments, given)
    model = load_input(given)
    formats = {"timm": _timm, "onnx": _onnx, "compact": _compact, "program": _program}
    return formats[arguments.format](arguments, given, model)


# The output


def _check_output(arguments: argparse.Namespace, given: ExportInput) -> None:
    """Raise ValueError if the output can't be written, or would replace what it must not."""
    output: Path = arguments.output
    if output.resolve() == given.weights.resolve():
        raise ValueError(f"--output {output} is what is exported: choose another")
    is_folder = arguments.format == "timm"
    replaced = _in_folder(output, given) if is_folder else _files(output, arguments.format)
    for path in replaced:
        if path.exists() and not arguments.force:
            raise ValueError(f"{path} is there already: choose another --output, or give --force")
    place = existing_part(output if is_folder else output.absolute().parent)
    if not place.is_dir():
        raise ValueError(f"--output {output} can't be written: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--output {output} can't be written: {place} is not writable")


def _files(output: Path, format: str) -> list[Path]:
    """The files that a format writes."""
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: --format {format} writes a file")
    return [output, *(data_files(output) if format == "onnx" else ())]


def _in_folder(output: Path, given: ExportInput) -> list[Path]:
    """What an export for timm replaces in a folder that exists."""
    if is_folder_of(given, output):
        return [output / CONFIG]
    if not output.exists():
        return []
    if not output.is_dir():
        raise ValueError(f"--output {output} is a file: --format timm writes a folder")
    if output.resolve() == Path.cwd():
        raise ValueError(
            f"--output {output} is the folder that you are in, which would be replaced: name "
            f"another, such as a new one within it"
        )
    held = {path.name for path in output.iterdir()}
    if others := sorted(held - {CONFIG, WEIGHTS}):
        raise ValueError(
            f"--output {output} holds other files, such as {others[0]}: choose another folder"
        )
    return [output] if held else []


# The formats


def _weights(arguments: argparse.Namespace, given: ExportInput) -> Iterator[str]:
    for option in ("recipe", "model"):
        if getattr(arguments, option) is not None and given.is_checked:
            raise ValueError(
                f"--{option} has no effect with --format {arguments.format}: {given.weights} is "
                f"written with the metadata of its model that it has"
            )
    write_weights(given, arguments.output, arguments.format, deflate=arguments.deflate)
    yield _size_line(arguments.output, inspect.inspect_pruned(arguments.output).dense_bytes)


def _timm(arguments: argparse.Namespace, given: ExportInput, model: nn.Module) -> Iterator[str]:
    from starfire_prune.models import default_cfgs  # it imports timm

    output: Path = arguments.output
    config = write_timm_folder(given, model, output)
    names = "with their names" if "label_names" in config else "whose names are not known here"
    yield f"{output}: {config['architecture']} of {config['num_classes']} classes, {names}"
    ours = config["architecture"] in default_cfgs
    first = "after import starfire_prune.models: " if ours else ""
    yield f'{first}timm.create_model("local-dir:{output}", pretrained=True)'


def _onnx(arguments: argparse.Namespace, given: ExportInput, model: nn.Module) -> Iterator[str]:
    size = given.input_size(model)
    if arguments.compact:
        model = compact(model, _example(size), unfinished=arguments.unfinished)[0]
    known = {
        "starfire_prune.model": given.architecture,
        "starfire_prune.images": given.images and given.images.as_timm(),
        "starfire_prune.label_names": given.label_names(model),
    }
    metadata = {key: value for key, value in known.items() if value is not None}
    report = export_onnx(
        model,
        arguments.output,
        size,
        fold_bn=arguments.fold_bn,
        metadata=metadata,
        unfinished=arguments.unfinished,
    )
    beside = "" if report.external is None else f", its weights in {report.external.name} beside it"
    folded, norms = report.batch_norms
    yield f"{arguments.output}: {report.size_bytes:,} bytes, opset {report.opset}{beside}"
    yield f"{report.sparsity:.2%} of the convolution and linear weights are zero, as in the model"
    for layer in report.unchecked:
        yield f"the weight of {layer} is not in the file as one tensor: its zeros are not checked"
    yield f"batch norms folded: {folded} of {norms}"
    yield (
        f"ONNX Runtime differs from torch by at most {report.deviation:.1e}; the largest output "
        f"is {report.largest:.3g}"
    )


def _compact(arguments: argparse.Namespace, given: ExportInput, model: nn.Module) -> Iterator[str]:
    dense_bytes = sum(value.nbytes for value in model.state_dict().values())
    example, architecture = _example(given.input_size(model)), given.architecture or {}
    options = {"deflate": arguments.deflate, "unfinished": arguments.unfinished}
    report = save_compact(model, arguments.output, example, architecture, **options)
    yield format_compaction(report)
    yield _size_line(arguments.output, dense_bytes)


def _program(arguments: argparse.Namespace, given: ExportInput, model: nn.Module) -> Iterator[str]:
    output: Path = arguments.output
    size = given.input_size(model)
    compiled = compile(model, _example(size), unfinished=arguments.unfinished)
    save_program(compiled, output)
    program, images = load(output), torch.rand(3, *size)
    expected, results = compiled(images), program(images.numpy())
    if not isinstance(results, list):
        expected, results = [expected], [results]
    if not all(np.array_equal(a.numpy(), b) for a, b in zip(expected, results, strict=True)):
        raise ExportError(f"{output} has other outputs than sparse.compile: don't use it")
    yield f"{output}: {output.stat().st_size:,} bytes, {program}"
    yield "outputs are those of sparse.compile, bit for bit"


def _example(input_size: tuple[int, int, int]) -> Tensor:
    return torch.zeros(2, *input_size)


def _size_line(path: Path, dense_bytes: int) -> str:
    size = path.stat().st_size
    return f"{path}: {size:,} bytes, {size / dense_bytes:.1%} of the {dense_bytes:,} of all weights"
