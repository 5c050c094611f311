"""`starfire export`: write trained weights for other programs.

Every file that is written is compared with the weights that it was made from.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from starfire_prune.cli.common import Command, Failed, name_argument, path_argument
from starfire_prune.cli.shipped import find_recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from starfire_prune.export.input import ExportInput

__all__ = ["COMMAND"]

FORMATS = ("dense", "compressed", "timm", "onnx", "compact")
# The formats with which an option has an effect
EFFECTS = {"fold_bn": ("onnx",), "compact": ("onnx",), "deflate": ("compressed", "compact")}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=path_argument,
        nargs="?",
        metavar="RUN_OR_FILE",
        help="folder of a finished run, or a safetensors file",
    )
    parser.add_argument("--format", choices=FORMATS, help="format to write, see docs/export.md")
    parser.add_argument(
        "--output", type=path_argument, metavar="PATH", help="file to write; for timm a folder"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing --output")
    parser.add_argument(
        "--inspect",
        type=path_argument,
        metavar="FILE",
        help="print the tensors of a safetensors file instead: sparsity, encoding and bytes",
    )
    models = parser.add_argument_group("the model of a safetensors file that doesn't name its own")
    models.add_argument("--recipe", type=name_argument, metavar="FILE", help="recipe of the run")
    models.add_argument("--model", metavar="NAME", help="name of a timm model")
    options = parser.add_argument_group("options of formats")
    options.add_argument(
        "--fold-bn",
        action="store_true",
        help="onnx: fold batch norms into the convolutions before them",
    )
    options.add_argument(
        "--compact", action="store_true", help="onnx: remove dead channels before exporting"
    )
    options.add_argument(
        "--deflate",
        action="store_true",
        help="compressed, compact: also deflate the values; a fifth smaller, and slower to load",
    )


# Options and paths


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that are missing or have no effect."""
    given = [name for name, value in vars(arguments).items() if value not in (None, False)]
    if arguments.inspect:
        if others := [name for name in given if name != "inspect"]:
            raise ValueError(f"{_option(others[0])} has no effect with --inspect: leave it out")
        return
    for name, wanted in (
        ("source", "the folder of a run or a safetensors file"),
        ("format", f"one of {', '.join(FORMATS)}"),
        ("output", "the file or folder to write"),
    ):
        if name not in given:
            raise ValueError(f"{_option(name)} is missing: name {wanted}")
    for name, formats in EFFECTS.items():
        if name in given and arguments.format not in formats:
            raise ValueError(
                f"{_option(name)} has no effect with --format {arguments.format}: it is for "
                f"{' and '.join(formats)}"
            )


def _option(name: str) -> str:
    return "RUN_OR_FILE" if name == "source" else f"--{name.replace('_', '-')}"


def _check_output(arguments: argparse.Namespace, source: ExportInput) -> None:
    """Raise ValueError if the output can't be written, or would replace what it must not."""
    from starfire_prune.runs.folder import existing_part

    output: Path = arguments.output
    is_folder = arguments.format == "timm"
    if output.resolve() == source.weights.resolve():
        raise ValueError(f"--output {output} is what is exported: choose another")
    if is_folder:
        _check_folder(output, source, arguments.force)
    else:
        _check_file(output, arguments.format, arguments.force)
    place = existing_part(output if is_folder else output.absolute().parent)
    if not place.is_dir():
        raise ValueError(f"--output {output} can't be written: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--output {output} can't be written: {place} is not writable")


def _check_file(output: Path, format: str, force: bool) -> None:
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: --format {format} writes a file")
    from starfire_prune.export.onnx import data_files

    beside = data_files(output) if format == "onnx" else ()
    for path in (output, *beside):
        if path.exists() and not force:
            raise ValueError(f"{path} is there already: choose another --output, or give --force")


def _check_folder(output: Path, source: ExportInput, force: bool) -> None:
    from starfire_prune.export.timm import CONFIG, WEIGHTS, is_folder_of

    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output {output} is a file: --format timm writes a folder")
    held = {path.name for path in output.iterdir()}
    if is_folder_of(source, output):
        if CONFIG in held and not force:
            raise ValueError(f"{output / CONFIG} is there already: give --force to replace it")
    elif output.resolve() == Path.cwd():
        raise ValueError(
            f"--output {output} is the folder that you are in, which would be replaced: name "
            f"another, such as a new one within it"
        )
    elif others := sorted(held - {CONFIG, WEIGHTS}):
        raise ValueError(
            f"--output {output} holds other files, such as {others[0]}: choose another folder"
        )
    elif held and not force:
        raise ValueError(f"{output} is there already: choose another --output, or give --force")


# Inspecting and exporting


def _inspected(arguments: argparse.Namespace) -> Iterator[str]:
    from starfire_prune.serialization.inspect import format_inspection, inspect_pruned

    if arguments.inspect.is_dir():
        raise ValueError(f"--inspect {arguments.inspect} is a folder: name a safetensors file")
    yield format_inspection(inspect_pruned(arguments.inspect))


def _exported(arguments: argparse.Namespace) -> Iterator[str]:
    from starfire_prune.export.input import find_input

    recipe = None if arguments.recipe is None else find_recipe(arguments.recipe)
    source = find_input(arguments.source, recipe, arguments.model)
    _check_output(arguments, source)
    exports: dict[str, Callable[[argparse.Namespace, ExportInput], Iterator[str]]] = {
        "dense": _export_weights,
        "compressed": _export_weights,
        "timm": _export_timm,
        "onnx": _export_onnx,
        "compact": _export_compact,
    }
    yield from exports[arguments.format](arguments, source)


def _export_weights(arguments: argparse.Namespace, source: ExportInput) -> Iterator[str]:
    from starfire_prune.export.input import write_weights
    from starfire_prune.serialization.inspect import inspect_pruned

    format: Literal["dense", "compressed"] = arguments.format
    for option in ("recipe", "model"):
        if getattr(arguments, option) is not None and source.is_checked:
            raise ValueError(
                f"--{option} has no effect with --format {format}: {source.weights} is written "
                f"anew with what it tells of its model"
            )
    write_weights(source, arguments.output, format, deflate=arguments.deflate)
    yield _size_line(arguments.output, inspect_pruned(arguments.output).dense_bytes)


def _export_timm(arguments: argparse.Namespace, source: ExportInput) -> Iterator[str]:
    from starfire_prune.export.input import load_input
    from starfire_prune.export.timm import write_timm_folder

    output: Path = arguments.output
    config = write_timm_folder(source, load_input(source), output)
    named = "label_names" in config
    yield f"{output}: {config['architecture']} of {config['num_classes']} classes" + (
        ", with their names" if named else ", whose names are not known here"
    )
    first = "after import starfire_prune.models: " if config["architecture"] in _own() else ""
    yield f'{first}timm.create_model("local-dir:{output}", pretrained=True)'


def _export_onnx(arguments: argparse.Namespace, source: ExportInput) -> Iterator[str]:
    from starfire_prune.export.input import load_input
    from starfire_prune.export.onnx import export_onnx

    model = load_input(source)
    size = source.input_size(model)
    if arguments.compact:
        model = _compacted(model, _example(size))
    known = {
        "starfire_prune.model": source.architecture,
        "starfire_prune.images": source.images and source.images.as_timm(),
        "starfire_prune.label_names": source.label_names(model),
    }
    metadata = {key: value for key, value in known.items() if value is not None}
    report = export_onnx(
        model, arguments.output, size, fold_bn=arguments.fold_bn, metadata=metadata
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


def _export_compact(arguments: argparse.Namespace, source: ExportInput) -> Iterator[str]:
    from starfire_prune.compact.compaction import format_compaction
    from starfire_prune.compact.files import save_compact
    from starfire_prune.export.input import load_input
    from starfire_prune.utils.errors import ExportError

    model = load_input(source)
    example = _example(source.input_size(model))
    dense_bytes = sum(value.nbytes for value in model.state_dict().values())
    try:
        report = save_compact(
            model,
            arguments.output,
            example,
            source.architecture or {},
            deflate=arguments.deflate,
        )
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    yield format_compaction(report)
    yield _size_line(arguments.output, dense_bytes)


def _compacted(model: nn.Module, example: Tensor) -> nn.Module:
    from starfire_prune.compact.compaction import compact
    from starfire_prune.utils.errors import ExportError

    try:
        return compact(model, example)[0]
    except RuntimeError as error:
        raise ExportError(str(error)) from error


def _example(input_size: tuple[int, int, int]) -> Tensor:
    import torch

    return torch.zeros(2, *input_size)


def _own() -> tuple[str, ...]:
    """The names of models that timm knows from this package alone."""
    from starfire_prune.models import default_cfgs

    return tuple(default_cfgs)


def _size_line(path: Path, dense_bytes: int) -> str:
    size = path.stat().st_size
    return f"{path}: {size:,} bytes, {size / dense_bytes:.1%} of the {dense_bytes:,} of all weights"


def _unforeseen(arguments: argparse.Namespace, error: BaseException) -> str:
    """A sentence for what no check foresees."""
    told = " ".join(str(error).split())[:300] or type(error).__name__
    path, done = (
        (arguments.inspect, "inspected")
        if arguments.inspect
        else (arguments.source, f"exported as {arguments.format}")
    )
    if isinstance(error, MemoryError):
        return f"{path} can't be {done}: it takes more memory than is free ({told})"
    if isinstance(error, RecursionError):
        return f"{path} can't be {done}: it nests too deeply ({told}); restore it"
    return f"{path} can't be {done}: {told}"


def _run(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    from starfire_prune.runs.folder import RunError

    try:
        for line in _inspected(arguments) if arguments.inspect else _exported(arguments):
            print(line, flush=True)
    except RunError:
        raise
    except (RuntimeError, MemoryError) as error:  # torch's, a full memory's, of deep nesting
        raise Failed(_unforeseen(arguments, error), status=1) from error


COMMAND: Final = Command(
    summary="Write trained weights for other programs, or inspect a file of weights",
    details="Such as: starfire export runs/quickstart --format onnx --output model.onnx\n"
    "docs/export.md explains the formats. Each file is compared with the weights it was made from.",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="nothing was written",
)
