"""The scratch memory of a compiled model's calls, kept for later calls."""

from __future__ import annotations

import threading

from torch import Tensor

__all__ = ["WorkspacePool"]


MAX_WORKSPACES = 16  # kept for later calls


class WorkspacePool:
    """Unused workspaces by batch size. Thread-safe; copies and pickles are empty.

    The least recently used workspace is dropped when there are too many.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return len(self._unused)

    def __reduce__(self) -> tuple[type[WorkspacePool], tuple[()]]:
        return WorkspacePool, ()

    def acquire(self, batch: int) -> Tensor | None:
        """Remove and return a workspace for that batch size; None if there is none."""
        with self._lock:
            for index in reversed(range(len(self._unused))):
                if self._unused[index][0] == batch:
                    return self._unused.pop(index)[1]
        return None

    def release(self, batch: int, workspace: Tensor) -> None:
        """Keep a workspace for later calls."""
        with self._lock:
            self._unused.append((batch, workspace))
            del self._unused[:-MAX_WORKSPACES]
