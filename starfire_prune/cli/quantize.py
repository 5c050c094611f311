"""`starfire quantize`: an int8 model of a finished run."""

from __future__ import annotations

import argparse
from typing import Final

from starfire_prune.cli.common import (
    Command,
    add_output,
    add_overrides,
    count_argument,
    path_argument,
)

__all__ = ["COMMAND"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help="folder of a finished run")
    text = "file to write; default: export/int8.safetensors in the run, if it is not there yet"
    add_output(parser, "FILE", text)
    add("--force", action="store_true", help="replace an existing file")
    text = "store no zeros and deflate the values; smaller, and only this package reads it"
    add("--compressed", action="store_true", help=text)
    text = "limit activations to 7 bits, for CPUs with AVX2 but without VNNI"
    add("--reduced-range", action="store_true", help=text)
    add("--unfinished", action="store_true", help="also quantize weights of an unfinished pruning")
    data = parser.add_argument_group("images")
    text = "training images to calibrate on; default: 512"
    data.add_argument("--images", type=count_argument, metavar="N", help=text)
    text = "evaluate N evenly spaced images (of shards the first N); default: all"
    data.add_argument("--limit", type=count_argument, metavar="N", help=text)
    text = "folder of the images; replaces data.root"
    data.add_argument("--data", type=path_argument, metavar="FOLDER", help=text)
    add_overrides(data, "override a key of the recipe, such as data.workers=0")


def _run(arguments: argparse.Namespace) -> None:
    from starfire_prune.cli.run_quantize import run

    run(arguments)


COMMAND: Final = Command(
    summary="Quantize a finished run to int8, with its pruned weights zero",
    details="Such as: starfire quantize runs/quickstart\n"
    "It prints the accuracy in float32 and in int8. docs/quantization.md explains the file.\n"
    "Of a run with a quantization phase it measures, or writes again, the int8 model that the run "
    "has trained.",
    add_arguments=_add_arguments,
    run=_run,
    interrupted="nothing was written",
)
