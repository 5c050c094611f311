"""Log messages of this package on the console of a command."""

from __future__ import annotations

import logging
import sys

__all__ = ["log_to_console"]


def log_to_console() -> None:
    """Print the messages of this package to stdout, from the level INFO on.

    Nothing else is printed with a message, and it appears above a progress bar if there is one.
    Without this call Python's defaults hold: a library user sees warnings only, or configures the
    logger `starfire_prune`.

    Example:
        >>> log_to_console()
        >>> logging.getLogger("starfire_prune.training").info("epoch 1/90")
        epoch 1/90
    """
    logger = logging.getLogger("starfire_prune")
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # handlers of other packages would print the messages again


class _ConsoleHandler(logging.Handler):
    """Prints messages as they are; errors, such as a broken pipe, reach the caller as print's."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        tqdm = sys.modules.get("tqdm")  # without it there is no progress bar
        if tqdm is None:
            sys.stdout.write(f"{text}\n")
        else:
            tqdm.tqdm.write(text)
