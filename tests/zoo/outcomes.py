"""How an attempt ends: right, refused in a sentence, or not as it should."""

from __future__ import annotations

import dataclasses
import linecache
import re
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import starfire_prune

__all__ = ["Outcome", "WrongError", "attempt", "named_in", "sentence_fault"]


_PACKAGE = str(Path(starfire_prune.__file__).parent)
_BUILTIN = (ValueError, TypeError, RuntimeError, NotImplementedError, ModuleNotFoundError)
_ARGUMENT = re.compile(r"`[\w.]+`|\b\w+ \(=|\bpruning\.\w+|\baten[.:]+\w+|\bmodel\.\w+")
_LONGEST = 700


class WrongError(Exception):
    """A result that is not what it should be."""


class _LateError(BaseException):
    """The time limit has passed; a BaseException, so that nothing handles it as a failure."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of an attempt.

    Attributes:
        status: `right`; `refused`, in a sentence of the package; `wrong`, a result that is not as
            it should be; `unclear`, any other error; `late`, after the time limit; `open`, not
            tried because an earlier attempt failed.
        text: The sentence, or what is wrong.
        seconds: Seconds of processor time.
    """

    status: str
    text: str = ""
    seconds: float = 0.0

    @property
    def is_accepted(self) -> bool:
        """Whether the package keeps its promise: right, or refused in a sentence."""
        return self.status in ("right", "refused")


def attempt(action: Callable[[], str | None], names: Collection[str], limit: float) -> Outcome:
    """Try something.

    Args:
        action: What is tried; it returns a remark, and raises `WrongError` if the result is wrong.
        names: Names of the model's modules, one of which a sentence should name.
        limit: Seconds of processor time after which it is given up, however busy the machine is.
    """
    start = time.process_time()
    try:
        with _limited(limit):
            status, text = "right", action() or ""
    except _LateError:
        status, text = "late", f"takes more than {limit:.0f} s of processor time"
    except WrongError as error:
        status, text = "wrong", str(error)
    except Exception as error:  # what is tried raises errors of every kind
        fault = sentence_fault(error, names)
        text = str(error) if fault is None else f"{fault}: {type(error).__name__}: {error}"
        status = "refused" if fault is None else "unclear"
    return Outcome(status, text[:2000], round(time.process_time() - start, 1))


def sentence_fault(error: BaseException, names: Collection[str]) -> str | None:
    """Why an error is not a sentence of the package that names a layer or an argument, or None.

    Several sentences are one a line.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    text = str(error)
    if not frame.filename.startswith(_PACKAGE) or not line.startswith("raise"):
        return f"not an error of the package ({Path(frame.filename).name}:{frame.lineno})"
    if not (type(error).__module__.startswith("starfire_prune.") or type(error) in _BUILTIN):
        return "not a type of the package"
    for sentence in text.split("\n"):
        if len(sentence) > _LONGEST:
            return "not a sentence"
        if not named_in(sentence, names) and not _ARGUMENT.search(sentence):
            return "names neither a layer nor an argument"
    return None


def named_in(text: str, names: Collection[str]) -> list[str]:
    """The modules that a text names, the longest names first.

    A name that may be a word of the text, such as `head`, counts only after "layer" or "module".
    """
    words = set(re.findall(r"[\w.]*\w", text))
    words_of_prose = {name for name in names if name.isalpha()}
    called = set(re.findall(r"\b(?:layer|module) ([\w.]*\w)", text))
    found = called.intersection(names) | (words.intersection(names) - words_of_prose)
    return sorted(found, key=len, reverse=True)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _LateError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
