"""What `starfire sweep` does: it chooses runs, trains them in processes and prints results."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from starfire_prune.cli.common import Failed
from starfire_prune.cli.shipped import find_table
from starfire_prune.experiments.results import format_results, read_result
from starfire_prune.experiments.tables import Run, Table, load_table
from starfire_prune.runs.folder import check_writable

__all__ = ["run"]

TRAIN = ("-m", "starfire_prune", "train")  # after a launcher, such as `accelerate launch`
PATIENCE_S = 45.0  # from the signal to end to killing a run; torchrun gives its workers 30
POLL_S = 0.05
ENDING = [  # Windows has only some of them
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    if name in signal.Signals.__members__
]


def run(arguments: argparse.Namespace) -> None:
    """Train the chosen runs, or print what the options ask for instead."""
    shows = arguments.list or arguments.print_commands or arguments.results
    table = load_table(find_table(arguments.table), arguments.overrides, keep_unset=shows)
    runs = _chosen(table, arguments.only, arguments.index)
    launcher = _launcher(arguments.launcher, must_exist=not shows)
    output = arguments.output or Path("runs") / "tables" / table.trained_in
    if arguments.list:
        _list(runs, output)
    elif arguments.print_commands:
        for each in _by_folder(runs).values():
            print(shlex.join(_command(each, output, launcher)))
    elif arguments.results:
        _print_results(table, runs, output)
    else:
        _sweep(table, runs, output, launcher)


# What to run


def _chosen(table: Table, patterns: Sequence[str], index: int | None) -> list[Run]:
    """The runs that fit a pattern, or all; of these the index-th with those of the same folder."""
    for pattern in patterns:
        if not any(_fits(run, pattern) for run in table.runs):
            names = [*dict.fromkeys(run.name for run in table.runs)]
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
            raise ValueError(
                f"--only {pattern} fits no run of {table.name}; nearest: {', '.join(near)}"
            )
    fitting = [run for run in table.runs if any(_fits(run, pattern) for pattern in patterns)]
    runs = fitting if patterns else list(table.runs)
    if index is None:
        return runs
    folders = list(_by_folder(runs))
    if not 0 <= index < len(folders):
        last = len(folders) - 1
        raise ValueError(
            f"--index {index} is out of range: there are {len(folders)} runs, 0 to {last}"
        )
    return [run for run in runs if run.folder == folders[index]]


def _fits(run: Run, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (run.name, run.folder))


def _by_folder(runs: Iterable[Run]) -> dict[str, Run]:
    """The first run of each folder: runs of the same recipe are trained once."""
    by_folder: dict[str, Run] = {}
    for run in runs:
        by_folder.setdefault(run.folder, run)
    return by_folder


def _launcher(command: str, *, must_exist: bool) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--launcher {command!r} is not a command: {error}") from None
    if not words:
        raise ValueError("--launcher is empty; such as --launcher 'accelerate launch'")
    if must_exist and shutil.which(words[0]) is None:
        raise ValueError(f"--launcher: there is no command {words[0]}; install it, or give another")
    return words


def _command(run: Run, output: Path, launcher: Sequence[str]) -> list[str]:
    settings = [word for override in run.overrides for word in ("--set", override)]
    fork = ["--fork", str(output / run.fork)] if run.fork else []
    folder = str(output / run.folder)
    return [*launcher, *TRAIN, str(run.recipe_path), *settings, *fork, "--output", folder]


# Running


def _sweep(table: Table, runs: Sequence[Run], output: Path, launcher: Sequence[str]) -> None:
    check_writable(output)
    by_folder = _by_folder(runs)
    failed: dict[str, str] = {}
    with _ending_signals() as received:
        for number, (folder, run) in enumerate(by_folder.items(), start=1):
            print(f"\nrun {number} of {len(by_folder)}: {folder}", flush=True)
            reason = _train(run, output, launcher, received)
            if received:
                text = (
                    f"interrupted by {signal.Signals(received[0]).name}; the same command goes on"
                )
                raise Failed(f"{text} where this one stopped", status=128 + received[0])
            if reason:
                failed[folder] = reason
    print()
    _print_results(table, runs, output)
    if failed:
        listed = "; ".join(f"{folder} ({reason})" for folder, reason in failed.items())
        raise Failed(f"{len(failed)} of {len(by_folder)} runs failed: {listed}", status=1)


@contextlib.contextmanager
def _ending_signals() -> Iterator[list[int]]:
    """Note the signals that ask to end, such as Ctrl-C's, instead of ending at once."""
    received: list[int] = []
    earlier = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in ENDING
        if signal.getsignal(number) != signal.SIG_IGN  # as nohup has it
    }
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _train(run: Run, output: Path, launcher: Sequence[str], received: Sequence[int]) -> str:
    """Train a run if it isn't finished; why it failed, or nothing."""
    result = read_result(run, output)
    if result.error:
        return result.error
    if result.finished:
        print("is finished", flush=True)
        return ""
    command = _command(run, output, launcher)
    print(shlex.join(command), flush=True)
    status = _status_of(command, received)
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"status {status}" if status else ""


def _status_of(command: Sequence[str], received: Sequence[int]) -> int:
    """The exit status of a launcher, which a signal that is received ends.

    It leads a process group of its own: so signals reach all that it starts, once each.
    """
    process = subprocess.Popen(command, start_new_session=True)
    while process.returncode is None and not received:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    if received or process.returncode:
        _end(process, received[0] if received else signal.SIGTERM)
    return process.wait()


def _end(launcher: subprocess.Popen[bytes], number: int) -> None:
    """Pass a signal on to a launcher and what it has started; in the end none of them is left."""
    deadline = time.monotonic() + PATIENCE_S
    running = _signalled(launcher.pid, number)
    while running and time.monotonic() < deadline:
        time.sleep(POLL_S)
        launcher.poll()
        running = _signalled(launcher.pid, 0)
    _signalled(launcher.pid, signal.SIGKILL)


def _signalled(group: int, number: int) -> bool:
    """Send a signal to a process group, with 0 none; whether somebody is in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS refuses where all have ended
        return False
    return True


# What is printed


def _list(runs: Sequence[Run], output: Path) -> None:
    for index, (folder, run) in enumerate(_by_folder(runs).items()):
        names = ", ".join(dict.fromkeys(other.name for other in runs if other.folder == folder))
        result = read_result(run, output)
        state = f"{result.epochs} of {run.recipe.total_epochs} epochs"
        state = result.error or ("finished" if result.finished else state)
        print(f"{index}  {names}  {output / folder}  {state}")


def _print_results(table: Table, runs: Iterable[Run], output: Path) -> None:
    print(format_results(table, [read_result(run, output) for run in runs]), flush=True)
