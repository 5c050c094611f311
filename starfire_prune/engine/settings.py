"""The settings of a pruning: the recipe's section `pruning`, which the engine owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag

from starfire_prune.utils.settings import (
    KeyPath,
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

__all__ = [
    "Fc",
    "Override",
    "Pruning",
    "Seed",
    "is_era",
    "one_or_list",
    "parse_pruning",
]


def parse_pruning(settings: Mapping[str, object] | Pruning) -> Pruning:
    """Checks pruning settings that come from Python; a `Pruning` is returned as it is.

    Args:
        settings: the keys and values of a recipe's `pruning`.

    Raises:
        RecipeError: all that is wrong, a line each, with `pruning` as the source.

    Example:
        >>> parse_pruning({"method": "ck", "amount": 0.6, "era": [40, 60]}).scope
        'channel'
    """
    if isinstance(settings, Pruning):
        return settings
    pruning, problems = validated(Pruning, plain(settings))
    if pruning is None:
        raise RecipeError("\n".join(problem_line("pruning", *problem) for problem in problems))
    return pruning


ConvMethod = Literal["window", "ck", "intra", "inter", "magnitude", "random", "filter"]
FcMethod = Literal["fine", "block", "dead_inputs", "magnitude", "random"]
# Not inter: its two halves of the era are the whole network's.
OverrideMethod = Literal[
    "window", "ck", "intra", "magnitude", "random", "filter", "fine", "block", "dead_inputs"
]
_METHODS: Final = (*get_args(ConvMethod), *get_args(FcMethod))
# The methods that read an option; giving it to any other is an error.
OPTION_METHODS: Final[Mapping[str, tuple[str, ...]]] = {
    "exact_layer_sparsity": ("window",),
    "max_nonzero": ("window", "ck"),
    "pointwise": ("window",),
    "scope": ("ck", "intra", "inter", "window"),
    "group": ("ck", "window"),
    "window_fraction": ("intra", "inter"),
    "ck_fraction_of_era": ("inter",),
    "seed": ("random",),
    "then": ("dead_inputs",),
    "block_size": ("block", "dead_inputs"),
}
_POINTWISE_OPTIONS: Final = ("scope", "group")  # window reads them for its 1x1 kernels alone
_AMOUNT: Final = "share of the weights or kernels that goes, a float in (0, 1]"
_SPREAD: Final = "true: layers reach their amount exactly, not in steps of 1/(R·S) (window)"
_MAX_NONZERO: Final = "most weights left in a kernel (window), or kernels in a locale (ck); from 1"
_POINTWISE: Final = "how 1x1 kernels are pruned; none leaves them dense (window)"
_SCOPE: Final = "where kernels compete (ck, intra, inter, window's 1x1 kernels)"
_GROUP: Final = "output channels that share a kernel mask, from 1 (ck, window's 1x1 kernels)"
_SHARE: Final = "part of the amount that is window's, in [0, 1] (intra, inter)"
_THEN: Final = "how the rest goes behind the columns that read zeros (dead_inputs)"
_BLOCK_SIZE: Final = "side of a block in weights, from 1 (block, dead_inputs then block)"


def _amount(value: object) -> object:
    if isinstance(value, float) and 0 < value <= 1:
        return float(value)
    way_out = "60 % is 0.6"
    if isinstance(value, (int, float)) and 1 < value <= 100:
        way_out = f"{value:g} % is {value / 100:g}"
    elif type(value) is int and value == 1:
        way_out = "100 % is 1.0, 1 % is 0.01"
    elif value == 0:
        way_out = "exclude leaves layers dense, pruning: none all of them"
    raise settings_error(
        f"must be a float above 0 and at most 1 {got(value, typed=True)}; {way_out}"
    )


def is_era(value: Any) -> bool:
    two = isinstance(value, (list, tuple)) and [type(item) for item in value] == [int, int]
    return two and 0 <= value[0] < value[1]


def _era(value: object) -> object:
    if is_era(value):
        return value
    raise settings_error(
        f"must be two epochs [first, end] with 0 <= first < end {got(value)}; "
        "[40, 60] prunes in the epochs 40 to 59"
    )


def one_or_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _kind(value: object) -> str:
    return "<none>" if isinstance(value, str) and value == "none" else "<mapping>"


OrNone = Annotated[
    Annotated[SettingsT, Tag("<mapping>")] | Annotated[Literal["none"], Tag("<none>")],
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
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy takes no larger one
Share = Annotated[float, Field(ge=0, le=1)]
Pointwise = Literal["ck", "none"]
Scope = Literal["channel", "layer"]
Then = Literal["fine", "block"]


class Fc(Settings):
    """How linear layers are pruned."""

    method: FcMethod = Field("fine", description="method for linear layers")
    amount: Amount | None = Field(None, description=f"{_AMOUNT}; default: pruning.amount")
    then: Then = Field("fine", description=_THEN)
    block_size: Count = Field(4, description=_BLOCK_SIZE)


class Override(Settings):
    """Other settings for some layers: what is not given is as in pruning, the last match wins."""

    layers: Names = Field(min_length=1, description="module names or globs: one, or a list")
    method: OverrideMethod | None = Field(None, description="method for these layers")
    amount: Amount | None = Field(None, description=_AMOUNT)
    exact_layer_sparsity: bool | None = Field(None, description=_SPREAD)
    max_nonzero: Count | None = Field(None, description=_MAX_NONZERO)
    pointwise: Pointwise | None = Field(None, description=_POINTWISE)
    scope: Scope | None = Field(None, description=_SCOPE)
    group: Count | None = Field(None, description=_GROUP)
    window_fraction: Share | None = Field(None, description=_SHARE)
    then: Then | None = Field(None, description=_THEN)
    block_size: Count | None = Field(None, description=_BLOCK_SIZE)


class Pruning(Settings):
    """What is pruned, how far, and when."""

    method: ConvMethod = Field(description="method for convolutions")
    amount: Amount = Field(description=_AMOUNT)
    era: Annotated[tuple[Epoch, Epoch], BeforeValidator(_era), Field(strict=False)] = Field(
        description="[first, end]: prunes from epoch first to epoch end - 1, 0-based"
    )
    schedule: Literal["linear", "cubic", "cosine"] = Field("linear", description="over the era")
    resolution: float = Field(
        0.0025, ge=0, lt=1, description="rise of a layer's sparsity worth a new mask, in [0, 1)"
    )
    exact_layer_sparsity: bool = Field(False, description=_SPREAD)
    max_nonzero: Count | None = Field(None, description=_MAX_NONZERO)
    pointwise: Pointwise = Field("ck", description=_POINTWISE)
    scope: Scope = Field("channel", description=_SCOPE)
    group: Count = Field(1, description=_GROUP)
    window_fraction: Share = Field(0.5, description=_SHARE)
    ck_fraction_of_era: float = Field(
        0.5, gt=0, lt=1, description="part of the era for ck, in (0, 1) (inter)"
    )
    prune_dead_inputs: bool = Field(
        False, description="true: what only reads zeros goes too, at the end of the era"
    )
    seed: Seed = Field(0, description="seed of random masks, from 0 to 2**32 - 1 (random)")
    include: Names = Field(("*",), min_length=1, description="layers to prune: one glob, or a list")
    exclude: Names = Field((), description="layers of these to leave dense: one glob, or a list")
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = Field(
        (), description="other settings for some layers"
    )
    fc: OrNone[Fc] = Field(default_factory=Fc, description="linear layers; none leaves them dense")

    parts: ClassVar[Mapping[str, type[Settings]]] = {"overrides": Override, "fc": Fc}

    @classmethod
    def problems(cls, pruning: dict[str, Any]) -> Iterator[Problem]:
        """Options that have no effect with the methods they stand beside."""
        places = list(_places(pruning))
        for index, place in enumerate(places):
            given = [key for key, value in place.given.items() if value is not None]
            if index >= 2 and given == ["layers"]:
                yield place.path, "changes nothing; give it a method, an amount or an option"
            for option in OPTION_METHODS:
                # What pruning and fc say holds for the overrides that don't say otherwise.
                heirs = [
                    p for p in places[index + 1 :] if index < 2 and p.given.get(option) is None
                ]
                if option in given and not any(p.uses(option) for p in (place, *heirs)):
                    yield (*place.path, option), _no_effect(option, place)


class _Place(NamedTuple):
    """A place where options are given, and the methods of the layers it speaks of."""

    path: KeyPath
    given: dict[str, Any]
    methods: tuple[Any, ...]
    pointwise: object
    then: object

    def uses(self, option: str) -> bool:
        if any(method not in _METHODS for method in self.methods):
            return True  # the method is refused already
        methods = set(OPTION_METHODS[option]).intersection(self.methods)
        if option in _POINTWISE_OPTIONS and self.pointwise == "none":
            methods.discard("window")
        if option == "block_size" and self.then != "block":
            methods.discard("dead_inputs")
        return bool(methods)


def _places(pruning: dict[str, Any]) -> Iterator[_Place]:
    method, pointwise, fc = (pruning.get(key) for key in ("method", "pointwise", "fc"))
    settings = fc if isinstance(fc, dict) else {}
    then = settings.get("then")
    yield _Place((), pruning, (method,), pointwise, then)
    fc_methods = () if fc == "none" else (settings.get("method", "fine"),)
    yield _Place(("fc",), settings, fc_methods, pointwise, then)
    overrides = pruning.get("overrides")
    for index, given in enumerate(overrides if isinstance(overrides, list) else ()):
        if isinstance(given, dict):
            own = given.get("method")
            methods = (method, *fc_methods) if own is None else (own,)
            options = (given.get("pointwise") or pointwise, given.get("then") or then)
            yield _Place(("overrides", index), given, methods, *options)


def _no_effect(option: str, place: _Place) -> str:
    methods = " or ".join(dict.fromkeys(place.methods))
    if "window" in place.methods and option in _POINTWISE_OPTIONS:
        methods += " and pointwise none"
    if "dead_inputs" in place.methods and option == "block_size":
        methods += " then fine"
    return f"has no effect with method {methods} (used by {', '.join(OPTION_METHODS[option])})"
