"""How commands are run and how they end."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

MODULE = (sys.executable, "-m", "starfire_prune")


class Ended(NamedTuple):
    """How a command ended."""

    status: Any
    stdout: str
    stderr: str


Tool = Callable[..., Ended]
