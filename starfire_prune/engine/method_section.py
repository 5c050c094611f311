"""Sections of settings whose keys depend on the pruning method that they name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from torch import nn

from starfire_prune.methods.base import CONVOLUTIONS, LINEAR, MaskMethod
from starfire_prune.methods.registry import METHODS, applies_to_any, method_class, method_options
from starfire_prune.utils.settings import Problem, Settings, got, plain
from starfire_prune.utils.text import did_you_mean

__all__ = ["MethodSection", "with_any_options", "with_options"]

# Keys that other programs have for those of a pruning
_SYNONYMS = {
    **dict.fromkeys(("sparsity", "target_sparsity", "final_sparsity", "sparsity_level"), "amount"),
    **dict.fromkeys(("ratio", "pruning_ratio", "rate", "share", "percentage"), "amount"),
    **dict.fromkeys(("epochs", "era_epochs"), "era"),
    **dict.fromkeys(("steps", "era_steps", "updates"), "era_updates"),
    **dict.fromkeys(("layers", "modules"), "include"),
    **dict.fromkeys(("ignore", "ignored", "skip"), "exclude"),
}
SectionT = TypeVar("SectionT", bound="MethodSection")


class MethodSection(Settings):
    """A section whose further keys are the options of its `method`."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (*CONVOLUTIONS, *LINEAR)
    default_method: ClassVar[str | None] = None
    option_classes: ClassVar[tuple[type[MaskMethod], ...] | None] = None
    """The methods whose options are keys of this section; None before its method is known."""

    def __new__(cls, **settings: Any) -> MethodSection:
        """An instance of the section with the options of the method."""
        return super().__new__(cls.for_tree(settings))

    @classmethod
    def methods(cls) -> dict[str, type[MaskMethod]]:
        """The registered methods that this section takes, by name."""
        return {name: own for name, own in METHODS.items() if applies_to_any(own, cls.kinds)}

    @classmethod
    def method_of(cls, tree: Mapping[str, Any]) -> type[MaskMethod] | None:
        """The method that a mapping names, or None if this section doesn't take it."""
        try:
            own = method_class(str(tree.get("method", cls.default_method)))
        except ValueError:
            return None
        return own if applies_to_any(own, cls.kinds) else None

    @classmethod
    def for_tree(cls, tree: Any) -> type[MethodSection]:
        """The section with the options of the method that a mapping names."""
        if cls.option_classes is not None or not isinstance(tree, dict):
            return cls
        own = cls.method_of(tree)
        return with_options(cls, (own,)) if own else with_any_options(cls)

    @model_validator(mode="wrap")
    @classmethod
    def _by_method(
        cls: type[SectionT],
        value: Any,
        handler: ModelWrapValidatorHandler[SectionT],
        info: ValidationInfo,
    ) -> SectionT:
        if isinstance(value, MethodSection) and not isinstance(value, cls):
            value = plain(value)  # an override whose place among the settings was unknown
        section = cls.for_tree(value)
        if section is cls:
            return handler(value)
        return section.model_validate(value, context=info.context)  # type: ignore[return-value]

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if cls.option_classes is not None:
            return handler(core_schema)
        sections = [_schema_section(cls, name) for name in cls.methods()]
        return {"oneOf": [handler(own.__pydantic_core_schema__) for own in sections]}

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """What is known of a key that this section doesn't have: whose option it is."""
        synonym = _SYNONYMS.get(key)
        if synonym in cls.model_fields:
            return f"; did you mean {synonym}?"
        owners = [name for name, own in METHODS.items() if key in method_options(own)]
        return f"; it is an option of {', '.join(owners)}" if owners else ""

    def __reduce__(self) -> tuple[Any, ...]:
        # By the section that stands in a module: those of the methods are made when needed
        for own in type(self).__mro__:
            if getattr(sys.modules[own.__module__], own.__name__, None) is own:
                break
        return own.model_validate, (plain(self),)  # type: ignore[attr-defined]

    @classmethod
    def problems(cls, section: dict[str, Any]) -> Iterator[Problem]:
        """A method that these layers don't have, and options without effect."""
        method = section.get("method", cls.default_method)
        own = cls.method_of(section)
        if own is not None:
            for option, reason in own.option_problems(section):
                yield (option,), f"{reason} {got(section[option])}; remove it"
        elif isinstance(method, str):
            names = list(cls.methods())
            suggestion = cls.elsewhere(method) or did_you_mean(method, names)
            yield ("method",), f"must be one of {', '.join(names)} {got(method)}{suggestion}"

    @classmethod
    def elsewhere(cls, method: str) -> str:
        """Where a method belongs that these layers don't have; empty if nowhere."""
        return ""

    @property
    def options(self) -> dict[str, Any]:
        """The method's options by name."""
        classes = type(self).option_classes or ()
        names = {name: None for own in classes for name in method_options(own)}
        return {name: getattr(self, name) for name in names}


def with_any_options(section: type[SectionT]) -> type[SectionT]:
    """A section that accepts all options: where the method is wrong, only that is reported."""
    names = {name for own in METHODS.values() for name in method_options(own)}
    fields: dict[str, Any] = dict.fromkeys(names, (Any, None))
    made = create_model(section.__name__, __base__=section, __doc__=section.__doc__, **fields)
    made.option_classes = ()
    return made


@functools.cache
def with_options(
    section: type[SectionT], classes: tuple[type[MaskMethod], ...], optional: bool = False
) -> type[SectionT]:
    """A section that also has the options of these methods."""
    fields: dict[str, Any] = {}
    for own in classes:
        for name, (annotation, default) in method_options(own).items():
            if optional:
                description = FieldInfo.from_annotation(annotation).description
                fields[name] = (annotation | None, Field(None, description=description))
            else:
                fields[name] = (annotation, default)
    made = create_model(section.__name__, __base__=section, __doc__=section.__doc__, **fields)
    made.option_classes = classes
    return made


def _schema_section(section: type[MethodSection], name: str) -> type[MethodSection]:
    """The section of one method, as the JSON Schema shows it."""
    field = section.model_fields["method"]
    default = name if name == section.default_method else ...
    method: Any = (Literal[name], Field(default, description=field.description))
    base = with_options(section, (METHODS[name],))
    return create_model(f"{section.__name__}_{name}", __base__=base, method=method)
