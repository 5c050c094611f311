"""The command `starfire`, which is also `python -m starfire_prune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

import starfire_prune
from starfire_prune.cli import evaluate, export, quantize, recipes, report, sweep, train
from starfire_prune.cli.common import USAGE_ERROR, Command, parse, run_command
from starfire_prune.utils.text import did_you_mean

__all__ = ["COMMANDS", "main"]

COMMANDS: Final[dict[str, Command]] = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "export": export.COMMAND,
    "quantize": quantize.COMMAND,
    "report": report.COMMAND,
    "sweep": sweep.COMMAND,
    "recipes": recipes.COMMAND,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status.

    Args:
        words: The command line after the name of the program; by default that of this process.
    """
    words = sys.argv[1:] if words is None else words
    if words and words[0] in COMMANDS:
        return run_command(COMMANDS[words[0]], words[1:], prog=f"starfire {words[0]}")
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return USAGE_ERROR
    if words[0].startswith("-"):
        parse(parser, words)
        text = "name a command before its options, such as train"
    else:
        names = ", ".join(COMMANDS)
        suggestion = did_you_mean(words[0], COMMANDS) or f"; the commands are {names}"
        text = f"there is no command {words[0]!r}{suggestion}"
    print(f"{parser.format_usage()}starfire: {text}", file=sys.stderr)
    return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="starfire",
        usage="starfire [--help] [--version] COMMAND ...",
        description="Structured sparse training of convolutional networks.",
        epilog="\n".join(
            [
                "commands:",
                *lines,
                "",
                "`starfire COMMAND --help` shows the options of a command. To train in several",
                "processes: accelerate launch -m starfire_prune train RECIPE",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"starfire_prune {starfire_prune.__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser
