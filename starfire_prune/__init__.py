"""Structured sparse training of convolutional networks in PyTorch.

The methods work like those of `torch.nn.utils.prune`, `Pruner` applies them while a model trains,
and `load_recipe` reads a training run from YAML.

The names are those of `starfire_prune.api`. They are loaded at their first use, so that commands
that need no torch, such as `starfire --help`, start at once.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from starfire_prune.api import *  # noqa: F403 its names are in its __all__
else:

    def __getattr__(name: str) -> Any:
        if not name.startswith("__") or name == "__all__":  # no `__wrapped__`, of doctest
            if find_spec(f"{__name__}.{name}"):
                return import_module(f"{__name__}.{name}")
            api = import_module(f"{__name__}.api")
            if name in (*api.__all__, "__all__"):
                return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module(f"{__name__}.api").__all__})
