"""`starfire export`: write trained weights for other programs."""

from __future__ import annotations

import argparse
from typing import Final

from starfire_prune.cli.common import (
    Command,
    add_output,
    name_argument,
    options_given,
    path_argument,
)

__all__ = ["COMMAND"]

FORMATS = ("dense", "compressed", "timm", "onnx", "compact", "program")
# The formats with which an option has an effect
EFFECTS = {"fold_bn": ("onnx",), "compact": ("onnx",), "deflate": ("compressed", "compact")}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "folder of a finished run, or a safetensors file"
    add("source", type=path_argument, nargs="?", metavar="RUN_OR_FILE", help=text)
    add("--format", choices=FORMATS, help="format to write, see docs/export.md")
    add_output(parser, "PATH", "file to write; for timm a folder")
    add("--force", action="store_true", help="replace an existing --output")
    text = "print the tensors of a safetensors file instead: sparsity, encoding and bytes"
    add("--inspect", type=path_argument, metavar="FILE", help=text)
    add("--unfinished", action="store_true", help="also export weights of an unfinished pruning")
    models = parser.add_argument_group("the model of a safetensors file that doesn't name its own")
    models.add_argument("--recipe", type=name_argument, metavar="FILE", help="recipe of the run")
    models.add_argument("--model", metavar="NAME", help="name of a timm model")
    options = parser.add_argument_group("options of formats")
    for option, text in (
        ("--fold-bn", "onnx: fold batch norms into the convolutions before them"),
        ("--compact", "onnx: remove dead channels before exporting"),
        (
            "--deflate",
            "compressed, compact: also deflate the values; a fifth smaller, and slower to load",
        ),
    ):
        options.add_argument(option, action="store_true", help=text)


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that are missing or have no effect."""
    given = options_given(arguments)
    if arguments.source is not None:
        given["source"] = "RUN_OR_FILE"
    if given.pop("inspect", None):
        for option in given.values():
            raise ValueError(f"{option} has no effect with --inspect: leave it out")
        return
    for name, option, wanted in (
        ("source", "RUN_OR_FILE", "the folder of a run or a safetensors file"),
        ("format", "--format", f"one of {', '.join(FORMATS)}"),
        ("output", "--output", "the file or folder to write"),
    ):
        if name not in given:
            raise ValueError(f"{option} is missing: name {wanted}")
    for name, formats in EFFECTS.items():
        if name in given and arguments.format not in formats:
            raise ValueError(
                f"{given[name]} has no effect with --format {arguments.format}: it is for "
                f"{' and '.join(formats)}"
            )


def _run(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    from starfire_prune.cli.run_export import run

    run(arguments)


COMMAND: Final = Command(
    summary="Write trained weights for other programs, or inspect a file of weights",
    details="Such as: starfire export runs/quickstart --format onnx --output model.onnx\n"
    "docs/export.md explains the formats. Each file is compared with the weights it was made from.",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="nothing was written",
)
