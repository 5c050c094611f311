"""What the commands share: their options, and errors of users as one sentence."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from starfire_prune.utils.console import log_to_console
from starfire_prune.utils.errors import PruningError, RanksError

__all__ = [
    "USAGE_ERROR",
    "Command",
    "Failed",
    "Options",
    "add_output",
    "add_overrides",
    "count_argument",
    "name_argument",
    "options_given",
    "parse",
    "path_argument",
    "run_command",
]

USAGE_ERROR = 2  # as argparse has it
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE, which Windows lacks
Options: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"


@dataclass(frozen=True)
class Command:
    """A subcommand of `starfire`.

    Attributes:
        summary: What it does, in one line of `starfire --help`.
        details: What its own help says after that.
        add_arguments: Adds its options to a parser.
        run: Does it. Errors of users are raised as ValueError, OSError, a run's errors or `Failed`.
        interrupted: What Ctrl-C leaves behind; `{name}` stands for the value of an option.
    """

    summary: str
    details: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    interrupted: str


class Failed(Exception):  # noqa: N818 it says how a command ended, and may follow results
    """The message and the exit status of a command that could not do all that was asked."""

    def __init__(self, message: str, status: int = USAGE_ERROR) -> None:
        super().__init__(message)
        self.status = status


def run_command(command: Command, words: Sequence[str], prog: str) -> int:
    """Parse the words of a command line, run the command and give its exit status.

    Errors of users are printed as one sentence after `prog`. A command whose output nobody reads
    any longer, as in `… | head`, ends quietly.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=f"{command.summary}.\n\n{command.details}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    arguments = parse(parser, words)
    log_to_console()
    try:
        command.run(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        text = f"interrupted; {command.interrupted.format(**vars(arguments))}"
        failure = Failed(text, INTERRUPTED)
    except Failed as error:
        failure = error
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return BROKEN_PIPE
        message = _message(error)
        if message is None:
            raise
        failure = Failed(message)
    print(f"{prog}: {failure}", file=sys.stderr)
    return failure.status


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; help that nobody reads ends quietly, which Python 3.10 doesn't do."""
    try:
        return parser.parse_args(words)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.exit(BROKEN_PIPE)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended; then Python's last flush is quiet too."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    if not stdout.poll(0):  # such as a broken pipe between processes of a run
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _message(error: Exception) -> str | None:
    """The sentence for an error of a user, None for an error of this package."""
    if isinstance(error, ModuleNotFoundError):
        text = str(error)
        return text if "pip install" in text else f"{text}: pip install 'starfire-prune[train]'"
    from starfire_prune.data.errors import DataError, error_sentence  # which load torch
    from starfire_prune.runs.folder import RunError

    if isinstance(error, DataError):
        return error_sentence(error)
    known = (ValueError, OSError, RunError, PruningError, RanksError)
    return str(error) if isinstance(error, known) else None


# Options


def name_argument(text: str) -> str:
    """The type of an option that names a file, also one that comes with the package."""
    if not text:  # such as a variable that is not set
        raise argparse.ArgumentTypeError("is empty; name a folder or a file")
    return os.path.expanduser(text)  # shells leave the ~ of --output=~/run


def path_argument(text: str) -> Path:
    """The type of an option that names a folder or a file."""
    return Path(name_argument(text))


def count_argument(text: str) -> int:
    """The type of an option that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def add_overrides(options: Options, text: str) -> None:
    """Add `--set KEY=VALUE`, whose values are `arguments.overrides`."""
    help = f"{text} (repeatable)"
    options.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help=help
    )


def add_output(options: Options, metavar: str, text: str, default: Path | None = None) -> None:
    """Add `--output`."""
    options.add_argument(
        "--output", type=path_argument, metavar=metavar, default=default, help=text
    )


def options_given(arguments: argparse.Namespace) -> dict[str, str]:
    """The options that a command line has, as they are written there, by their names."""
    return {
        name: f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if value is not None and value is not False and value != []
    }
