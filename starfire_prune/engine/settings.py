"""The settings of a pruning: the recipe's section `pruning`, which the engine owns.

The keys of a section depend on its `method`: to the keys that all methods share come the options
that the method's class declares. So there is a section for each method, and an option that does
not belong to the method is an unknown key.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    Tag,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from torch import nn

from starfire_prune.engine.method_section import (
    MethodSection,
    with_any_options,
    with_options,
)
from starfire_prune.methods.base import CONVOLUTIONS, LINEAR, MaskMethod
from starfire_prune.methods.registry import (
    METHODS,
    method_class,
    method_name,
)
from starfire_prune.methods.schedules import SCHEDULES, Schedule, schedule_function, schedule_name
from starfire_prune.utils.settings import (
    Problem,
    RecipeError,
    Settings,
    SettingsT,
    got,
    plain,
    problem_line,
    settings_error,
    validated,
)
from starfire_prune.utils.text import did_you_mean

__all__ = ["Fc", "Override", "Pruning", "is_era", "one_or_list", "parse_pruning"]

_ERA: Final = "[first, end]: prunes from epoch first to epoch end - 1, 0-based"
_AMOUNT: Final = "share of the weights or kernels to prune, a float in (0, 1]"


def parse_pruning(settings: Mapping[str, object] | Pruning) -> Pruning:
    """Check pruning settings that come from Python; a `Pruning` is returned as it is.

    Args:
        settings: The keys and values of a recipe's `pruning`. `method` may also be a class that
            derives from `MaskMethod`, and `schedule` a function.

    Raises:
        RecipeError: All errors, a line each, with `pruning` as the source.

    Example:
        >>> parse_pruning({"method": "ck", "amount": 0.6, "era": [40, 60]}).options["scope"]
        'channel'
    """
    if isinstance(settings, Pruning):
        return settings
    tree = plain(settings)
    try:
        named = _with_names(tree)
    except (TypeError, ValueError) as error:
        raise RecipeError(problem_line("pruning", (), str(error))) from None
    pruning, problems = validated(Pruning, named)
    if pruning is None:
        raise RecipeError("\n".join(problem_line("pruning", *problem) for problem in problems))
    return pruning


def _with_names(tree: Any) -> Any:
    """Settings in which the names of methods and schedules replace classes and functions."""
    if isinstance(tree, list):
        return [_with_names(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    named = {key: _with_names(value) for key, value in tree.items()}
    if isinstance(method := named.get("method"), type):
        named["method"] = method_name(method_class(method))
    if callable(schedule := named.get("schedule")):
        named["schedule"] = schedule_name(schedule)
    return named


# Values that pydantic's own types don't describe.


def _amount(value: object) -> object:
    if isinstance(value, float) and 0 < value <= 1:
        return float(value)
    suggestion = "60 % is 0.6"
    if isinstance(value, (int, float)) and 1 < value <= 100:
        suggestion = f"{value:g} % is {value / 100:g}"
    elif type(value) is int and value == 1:
        suggestion = "100 % is 1.0, 1 % is 0.01"
    elif value == 0:
        suggestion = "exclude leaves layers dense, pruning: none all of them"
    raise settings_error(
        f"must be a float above 0 and at most 1 {got(value, typed=True)}; {suggestion}"
    )


def is_era(value: Any) -> bool:
    """Whether a value is an era: two epochs `[first, end]` with 0 <= first < end."""
    two = isinstance(value, (list, tuple)) and [type(item) for item in value] == [int, int]
    return two and 0 <= value[0] < value[1]


def _era(value: object, *, unit: str = "epochs", example: tuple[int, int] = (40, 60)) -> object:
    if is_era(value):
        return value
    first, end = example
    raise settings_error(
        f"must be two {unit} [first, end] with 0 <= first < end {got(value)}; "
        f"[{first}, {end}] prunes in the {unit} {first} to {end - 1}"
    )


def _era_updates(value: object) -> object:
    return _era(value, unit="updates", example=(1000, 5000))


def _schedule(value: str) -> str:
    try:
        return schedule_name(value)
    except ValueError:
        suggestion = did_you_mean(value, SCHEDULES)
        raise settings_error(
            f"must be one of {', '.join(SCHEDULES)} {got(value)}{suggestion}"
        ) from None


def one_or_list(value: object) -> object:
    """A list of one for a single text."""
    return [value] if isinstance(value, str) else value


def _kind(value: object) -> str:
    return "<none>" if isinstance(value, str) and value == "none" else "<mapping>"


OrNone = Annotated[
    Annotated[SerializeAsAny[SettingsT], Tag("<mapping>")]
    | Annotated[Literal["none"], Tag("<none>")],
    Discriminator(_kind),
]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(one_or_list, json_schema_input_type=Name | list[Name]),
    Field(strict=False),
]
Amount = Annotated[float, BeforeValidator(_amount), Field(gt=0, le=1)]
Epoch = Annotated[int, Field(ge=0)]
Span = Annotated[tuple[Epoch, Epoch], Field(strict=False)]
ScheduleName = Annotated[
    str,
    AfterValidator(_schedule),
    Field(json_schema_extra=lambda schema: schema.update(enum=list(SCHEDULES))),
]


class Fc(MethodSection):
    """How linear layers are pruned."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = LINEAR
    default_method: ClassVar[str | None] = "fine"

    method: str = Field("fine", description="method for linear layers")
    amount: Amount | None = Field(None, description=f"{_AMOUNT}; default: pruning.amount")


class Override(MethodSection):
    """Other settings for some layers; of several overrides that match a layer the last one holds.

    An override that names a method starts from that method's defaults; one that doesn't changes
    single options of the layers' method.
    """

    layers: Names = Field(min_length=1, description="module names or globs: one, or a list")
    method: str | None = Field(None, description="method for these layers; default: as they have")
    amount: Amount | None = Field(None, description=_AMOUNT)

    inherited: ClassVar[tuple[type[MaskMethod], ...]] = ()
    """The methods that the layers have where the override names none."""

    @classmethod
    def for_tree(cls, tree: Any) -> type[MethodSection]:
        if cls.option_classes is not None or not isinstance(tree, dict):
            return cls
        if tree.get("method") is None:
            return with_options(cls, cls.inherited or tuple(METHODS.values()), optional=True)
        own = cls.method_of(tree)
        return with_options(cls, (own,), optional=True) if own else with_any_options(cls)

    @classmethod
    def problems(cls, section: dict[str, Any]) -> Iterator[Problem]:
        """An override that changes nothing, a wrong method, and options without effect."""
        if [key for key, value in section.items() if value is not None] == ["layers"]:
            yield (), "changes nothing; give it a method, an amount or an option"
        if section.get("method") is not None:
            yield from super().problems(section)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        if cls.option_classes is not None:
            return handler(core_schema)
        made = with_options(cls, tuple(METHODS.values()), optional=True)
        return handler(made.__pydantic_core_schema__)


class Pruning(MethodSection):
    """What is pruned, how far, and when."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = CONVOLUTIONS

    method: str = Field(description="method for convolutions")
    amount: Amount = Field(description=_AMOUNT)
    era: Annotated[Span, BeforeValidator(_era)] | None = Field(
        None, description=f"{_ERA}; required unless era_updates is given"
    )
    era_updates: Annotated[Span, BeforeValidator(_era_updates)] | None = Field(
        None,
        description="[first, end]: prunes from update first to update end - 1, 0-based; in place "
        "of era",
    )
    schedule: ScheduleName = Field("linear", description="how the amount rises over the era")
    resolution: float = Field(
        0.0025,
        ge=0,
        lt=1,
        description="rise of a layer's sparsity from which on its mask is computed again, in "
        "[0, 1); 0: at any rise; the era's last update always computes it",
    )
    prune_dead_inputs: bool = Field(
        False,
        description="true: at the end of the era, weights that only read zeros are pruned too",
    )
    include: Names = Field(("*",), min_length=1, description="layers to prune: one glob, or a list")
    exclude: Names = Field((), description="layers of these to leave dense: one glob, or a list")
    overrides: Annotated[tuple[SerializeAsAny[Override], ...], Field(strict=False)] = Field(
        (), description="other settings for some layers"
    )
    fc: OrNone[Fc] = Field(default_factory=Fc, description="linear layers; none leaves them dense")

    parts: ClassVar[Mapping[str, type[Settings]]] = {"overrides": Override, "fc": Fc}

    @classmethod
    def for_tree(cls, tree: Any) -> type[MethodSection]:
        section = super().for_tree(tree)
        if section is cls or not issubclass(section, Pruning):
            return section
        given = tree.get("fc", {})
        fc = type(given) if isinstance(given, Fc) else Fc.for_tree(given)
        return _with_overrides(section, fc.option_classes or ())

    @classmethod
    def problems(cls, section: dict[str, Any]) -> Iterator[Problem]:
        """A method that convolutions don't have, options without effect, and not one era."""
        yield from super().problems(section)
        given = [key for key in ("era", "era_updates") if section.get(key) is not None]
        if not given:
            yield ("era",), f"is required ({_ERA}), or era_updates, which counts updates"
        if len(given) > 1:
            text = f"can't be given beside era {got(section['era_updates'])}; remove one of them"
            yield ("era_updates",), text

    @classmethod
    def elsewhere(cls, method: str) -> str:
        """That a method for linear layers belongs into `fc`."""
        return (
            f"; {method} is for linear layers: give it as fc.method"
            if method in Fc.methods()
            else ""
        )

    @property
    def mask_method(self) -> MaskMethod:
        """The method for convolutions, with the target as its amount."""
        return method_class(self.method)(self.amount, **self.options)

    @property
    def schedule_function(self) -> Schedule:
        """The schedule, a function from the progress of the era to the share of the target."""
        return schedule_function(self.schedule)


@functools.cache
def _with_overrides(section: type[Pruning], fc: tuple[type[MaskMethod], ...]) -> type[Pruning]:
    """A section whose overrides have the options of its own method and of `fc`'s."""

    class Own(Override):
        inherited = (*(section.option_classes or ()), *fc)

    Own.__name__ = Override.__name__
    annotation = Annotated[tuple[SerializeAsAny[Own], ...], Field(strict=False)]
    description = Pruning.model_fields["overrides"].description
    overrides: Any = (annotation, Field((), description=description))
    made = create_model(section.__name__, __base__=section, overrides=overrides)
    made.parts = {**section.parts, "overrides": Own}
    return made
