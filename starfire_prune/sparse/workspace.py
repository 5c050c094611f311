"""The memory that calls of a compiled model work in, kept for later calls."""

from __future__ import annotations

import threading

from torch import Tensor

__all__ = ["Arenas"]


MOST_ARENAS = 16  # kept for later calls


class Arenas:
    """Arenas that no call uses, by the size of the batch; copies and pickles have none.

    Any number of threads may take and give. The longest unused is dropped if there are too many.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return len(self._unused)

    def __reduce__(self) -> tuple[type[Arenas], tuple[()]]:
        return Arenas, ()

    def take(self, batch: int) -> Tensor | None:
        """One for batches of that size, the caller's from now on; None if there is none."""
        with self._lock:
            for index in reversed(range(len(self._unused))):
                if self._unused[index][0] == batch:
                    return self._unused.pop(index)[1]
        return None

    def give(self, batch: int, arena: Tensor) -> None:
        """Keep one for later calls."""
        with self._lock:
            self._unused.append((batch, arena))
            del self._unused[:-MOST_ARENAS]
