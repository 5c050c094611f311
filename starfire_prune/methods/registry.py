"""The pruning methods by the names that recipes use, and how to add one."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import Field
from torch import nn

from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.schedules import unused_name
from starfire_prune.utils.settings import Settings
from starfire_prune.utils.text import did_you_mean

__all__ = [
    "METHODS",
    "RESERVED",
    "applies_to_any",
    "method_class",
    "method_name",
    "method_options",
    "register_method",
    "unregister_method",
]

MethodT = TypeVar("MethodT", bound=type[MaskMethod])

# Names that no option may have, since the sections of a recipe have them
RESERVED = frozenset(dir(Settings)) | {
    *("method", "amount", "era", "era_updates", "schedule", "resolution", "prune_dead_inputs"),
    *("include", "exclude", "overrides", "fc", "layers"),
    *("kinds", "default_method", "option_classes", "inherited"),
    *("methods", "method_of", "elsewhere", "options", "mask_method", "schedule_function"),
}

_METHODS: dict[str, type[MaskMethod]] = {}
METHODS: Mapping[str, type[MaskMethod]] = MappingProxyType(_METHODS)
"""The registered methods by name."""

_PASSED: dict[str, type[MaskMethod]] = {}  # classes that were passed as they are, by full name


def register_method(name: str) -> Callable[[MethodT], MethodT]:
    """Register a pruning method under a name, so that recipes can use it.

    The class is a dataclass: its fields are the keys that a recipe may give beside `method`, with
    their types, ranges and descriptions. `Pruner(model, {"method": MyMethod, ...})` also takes a
    class that isn't registered.

    Args:
        name: Name that recipes use.

    Raises:
        TypeError: If the class is not a dataclass that derives from `MaskMethod`.
        ValueError: If another class has this name.

    Example:
        >>> from typing import Annotated
        >>> import torch
        >>> from pydantic import Field
        >>> from starfire_prune.masks import magnitude_mask
        >>> @register_method("coarse")
        ... @dataclasses.dataclass(eq=False, kw_only=True)
        ... class Coarse(MaskMethod):
        ...     '''Prune single weights whose magnitudes are rounded to `digits` digits.'''
        ...
        ...     digits: Annotated[int, Field(ge=0, description="digits that are kept")] = 2
        ...
        ...     def compute_mask(self, t, default_mask):
        ...         rounded = t.round(decimals=self.digits)
        ...         return magnitude_mask(rounded, self.amount, mask=default_mask)
        >>> METHODS["coarse"](0.5, digits=1)
        Coarse(amount=0.5, digits=1)
        >>> unregister_method("coarse")
    """

    def register(cls: MethodT) -> MethodT:
        _check_class(cls)
        other = _METHODS.get(name)
        if other is not None and (other.__module__, other.__qualname__) != _place(cls):
            raise ValueError(
                f"the name {name!r} is that of {other.__module__}.{other.__qualname__}: choose "
                f"another name"
            )
        _METHODS[name] = cls
        return cls

    return register


def unregister_method(name: str) -> None:
    """Remove a method from the registry."""
    del _METHODS[name]


def method_class(method: str | type[MaskMethod]) -> type[MaskMethod]:
    """The class of a method, given by its name or as the class itself.

    A class that isn't registered is found by its full name, `module.Class`, from then on.

    Raises:
        TypeError: If the class is not a dataclass that derives from `MaskMethod`.
        ValueError: If no method has this name, and for a class that was defined in a function and
            isn't registered.
    """
    if isinstance(method, str):
        found = _METHODS.get(method, _PASSED.get(method))
        if found is None:
            raise ValueError(
                f"`method` (={method!r}) must be one of {', '.join(_METHODS)}, or a class that "
                f"derives from MaskMethod{did_you_mean(method, _METHODS)}"
            )
        return found
    _check_class(method)
    if method not in (*_METHODS.values(), *_PASSED.values()):
        _PASSED[unused_name(".".join(_place(method)), _PASSED, "register_method")] = method
    return method


def method_name(cls: type[MaskMethod]) -> str:
    """The name of a method: the one that it is registered under, or else its full name."""
    known = (*_METHODS.items(), *_PASSED.items())
    return next(name for name, method in known if method is cls)


def method_options(cls: type[MaskMethod]) -> dict[str, tuple[Any, Any]]:
    """The options of a method: their annotated types and defaults, as of pydantic's fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        field.name: (_from_list(hints[field.name]), _default(field))
        for field in dataclasses.fields(cls)
        if field.name != "amount" and field.init and not field.metadata.get("of_layer")
    }


def _from_list(annotation: Any) -> Any:
    """An option's type; a tuple may be given as a list, which is what YAML has."""
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return Annotated[annotation, Field(strict=False)] if get_origin(bare) is tuple else annotation


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


def applies_to_any(cls: type[MaskMethod], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a method prunes modules of any of these classes."""
    return any(issubclass(kind, cls.applies_to) for kind in kinds)


def _place(cls: type[MaskMethod]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _check_class(cls: object) -> None:
    if not (inspect.isclass(cls) and issubclass(cls, MaskMethod)):
        raise TypeError(f"a method must be a class that derives from MaskMethod, not {cls!r}")
    own = [
        name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)
    ]
    taken = sorted(RESERVED.intersection(own))
    if taken:
        raise TypeError(
            f"{cls.__qualname__}.{taken[0]} can't be an option: the settings of a pruning have "
            f"this name already; rename the field"
        )
    missing = set(own).difference(field.name for field in dataclasses.fields(cls))
    if missing:
        raise TypeError(
            f"{cls.__qualname__}.{sorted(missing)[0]} is annotated but not a field: decorate the "
            f"class by @dataclasses.dataclass(eq=False, kw_only=True)"
        )
