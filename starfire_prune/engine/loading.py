"""Notices when weights are loaded into the layers that a pruner prunes."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["notify_of_loads"]


def notify_of_loads(
    module: nn.Module, function: Callable[[str], None], name: str
) -> RemovableHandle:
    """Call a bound method with `name` after each `load_state_dict` that reaches a module.

    The module refers to the method's object weakly, and copies of the module, also those of pickle,
    don't refer to it at all.

    Returns:
        A handle that ends this.
    """
    register: Any = module.register_load_state_dict_post_hook
    handle: RemovableHandle = register(_Notification(weakref.WeakMethod(function), name))
    return handle


class _Notification:
    """A load post-hook of torch; without a method, as in copies, it does nothing."""

    def __init__(
        self, method: weakref.WeakMethod[Callable[[str], None]] | None = None, name: str = ""
    ) -> None:
        self._method, self._name = method, name

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Notification:
        return _Notification()

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of the standard library that writes to a dictionary of its own and returns
        # None, as torch expects: a pickled model doesn't need this package
        return functools.partial, (operator.setitem, {})
