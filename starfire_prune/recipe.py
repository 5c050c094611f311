"""Recipes: a training run written down as strict data.

A recipe is a YAML file read into frozen models. Unknown keys, wrong types, values out of range and
options without effect are refused, all of them in one `RecipeError`.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

__all__ = [
    "Data",
    "Fc",
    "LrSchedule",
    "Model",
    "Optimizer",
    "Override",
    "Pruning",
    "Recipe",
    "RecipeError",
    "Training",
    "differing_keys",
    "dump_recipe",
    "load_recipe",
    "parse_pruning",
    "recipe_schema",
    "write_schema",
]

ConvMethod = Literal["window", "ck", "intra", "inter", "magnitude", "random", "filter"]
FcMethod = Literal["fine", "block", "magnitude", "random"]
# Not inter: its two halves of the era are the whole network's.
OverrideMethod = Literal["window", "ck", "intra", "magnitude", "random", "filter", "fine", "block"]
_METHODS: Final = (*get_args(ConvMethod), *get_args(FcMethod))

# The methods that read an option; giving it to any other is an error.
OPTION_METHODS: Final[Mapping[str, tuple[str, ...]]] = {
    "spread": ("window",),
    "max_nonzero": ("window", "ck"),
    "pointwise": ("window",),
    "scope": ("ck", "intra", "inter", "window"),
    "group": ("ck", "window"),
    "share": ("intra", "inter"),
    "split": ("inter",),
    "seed": ("random",),
    "block_size": ("block",),
}
_POINTWISE_OPTIONS: Final = ("scope", "group")  # window reads them for its 1x1 kernels alone

_NUMBER: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

_AMOUNT: Final = "share of the weights or kernels that goes, a float in (0, 1]"
_SPREAD: Final = "true: layers reach their amount exactly, not in steps of 1/(R·S) (window)"
_MAX_NONZERO: Final = "most weights left in a kernel (window), or kernels in a locale (ck); from 1"
_POINTWISE: Final = "how 1x1 kernels are pruned; none leaves them dense (window)"
_SCOPE: Final = "where kernels compete (ck, intra, inter, window's 1x1 kernels)"
_GROUP: Final = "output channels that share a kernel mask, from 1 (ck, window's 1x1 kernels)"
_SHARE: Final = "part of the amount that is window's, in [0, 1] (intra, inter)"
_BLOCK_SIZE: Final = "side of a block in weights, from 1 (block)"

_Path = tuple[str | int, ...]
_Problem = tuple[_Path, str]


class RecipeError(ValueError):
    """All that is wrong with a recipe, a line each: `source: key: what (value); the way out`."""


# Values that pydantic's own types don't describe.


def _got(value: object, *, typed: bool = False) -> str:
    """`(got 60)` or `(got 60, an int)`."""
    if value is None:
        return "(got nothing)"
    name = {"dict": "mapping", "tuple": "list"}.get(type(value).__name__, type(value).__name__)
    shown = _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    article = "an" if name[0] in "aeiou" else "a"
    return f"(got {shown}, {article} {name})" if typed else f"(got {shown})"


def _refusal(text: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{text}", {"text": text})


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
    raise _refusal(f"must be a float above 0 and at most 1 {_got(value, typed=True)}; {way_out}")


def _is_era(value: Any) -> bool:
    two = isinstance(value, (list, tuple)) and [type(item) for item in value] == [int, int]
    return two and 0 <= value[0] < value[1]


def _era(value: object) -> object:
    if _is_era(value):
        return value
    raise _refusal(
        f"must be two epochs [first, end] with 0 <= first < end {_got(value)}; "
        "[40, 60] prunes in the epochs 40 to 59"
    )


def _rising(milestones: tuple[int, ...]) -> tuple[int, ...]:
    if all(a < b for a, b in itertools.pairwise(milestones)):
        return milestones
    raise _refusal(f"must rise {_got(milestones)}; in order: {sorted(set(milestones))}")


def _expanded(root: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        if value := os.environ.get(match[1]):
            return value
        raise _refusal(
            f"the environment variable {match[1]} is not set {_got(root)}; "
            f"export {match[1]}=/path/to/the/data, or name the folder itself"
        )

    path = os.path.expanduser(re.sub(r"\$\{(\w+)\}", value_of, root))
    if "${" in path:
        raise _refusal(f"has a ${{ without a name and }} {_got(path)}; write ${{NAME}}")
    return path


def _kind(value: object) -> str:
    return "<none>" if isinstance(value, str) and value == "none" else "<mapping>"


Section = TypeVar("Section", bound="_Section")
OrNone = Annotated[
    Annotated[Section, Tag("<mapping>")] | Annotated[Literal["none"], Tag("<none>")],
    Discriminator(_kind),
]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value,
        json_schema_input_type=Name | list[Name],
    ),
    Field(strict=False),
]
Options = dict[str, JsonValue]
Amount = Annotated[float, BeforeValidator(_amount), Field(gt=0, le=1)]
Epoch = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Pointwise = Literal["ck", "none"]
Scope = Literal["channel", "layer"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _cross_checked(self: Section) -> Section:
        problems = [
            InitErrorDetails(type=_refusal(text), loc=path, input=None)
            for path, text in _cross_problems(type(self), _plain(self))
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self


class Model(_Section):
    """The network: a model of timm's registry, this package's variants among them."""

    name: Name = Field(description="name in timm's registry, such as resnet50")
    num_classes: Count = Field(description="number of classes, from 1")
    options: Options = Field({}, description="keyword arguments for timm.create_model")


class Data(_Section):
    """The data set, and how its images are read. Batch sizes are per process."""

    name: Literal["digits", "folder", "tiny_imagenet"] = Field(description="kind of data set")
    root: Annotated[str, AfterValidator(_expanded)] | None = Field(
        None, description="folder of the images; ~ and ${NAME} are expanded; not for digits"
    )
    image_size: int = Field(224, ge=8, description="height and width in pixels, from 8")
    batch_size: Count = Field(description="images per training step and process, from 1")
    eval_batch_size: Count | None = Field(None, description="in evaluation; default: batch_size")
    workers: int = Field(4, ge=0, description="loader processes per process; 0: none")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="for resizing")
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="share of the resized side that evaluation keeps, (0, 1]"
    )


class Optimizer(_Section):
    """The optimizer, as timm.optim.create_optimizer_v2 makes it."""

    name: Name = Field(description="name of one of timm's optimizers, such as sgd")
    lr: float = Field(gt=0, description="learning rate, above 0")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, in [0, 1)")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, from 0")
    filter_bias_and_bn: bool = Field(
        False, description="true: no weight decay for biases and normalisation layers"
    )
    options: Options = Field({}, description="keyword arguments for create_optimizer_v2")


class LrSchedule(_Section):
    """The learning rate over the epochs: constant without milestones."""

    milestones: Annotated[tuple[Count, ...], Field(strict=False), AfterValidator(_rising)] = Field(
        (), description="epochs, 0-based and rising, that begin with the rate times gamma"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone, in (0, 1]")
    warmup_epochs: Epoch = Field(0, description="epochs over which the rate rises to lr")


class Training(_Section):
    """How the steps are taken."""

    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="autocast's type")
    gradient_accumulation: Count = Field(1, description="batches per update, from 1")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm, above 0")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing, in [0, 1)")
    channels_last: bool = Field(False, description="true: channels_last weights and images")
    threads: Count | None = Field(
        None, description="CPU threads of a process; default: as launched (accelerate launch: 1)"
    )


class Fc(_Section):
    """How linear layers are pruned."""

    method: FcMethod = Field("fine", description="method for linear layers")
    amount: Amount | None = Field(None, description=f"{_AMOUNT}; default: pruning.amount")
    block_size: Count = Field(4, description=_BLOCK_SIZE)


class Override(_Section):
    """Other settings for some layers: what is not given is as in pruning, the last match wins."""

    layers: Names = Field(min_length=1, description="module names or globs: one, or a list")
    method: OverrideMethod | None = Field(None, description="method for these layers")
    amount: Amount | None = Field(None, description=_AMOUNT)
    spread: bool | None = Field(None, description=_SPREAD)
    max_nonzero: Count | None = Field(None, description=_MAX_NONZERO)
    pointwise: Pointwise | None = Field(None, description=_POINTWISE)
    scope: Scope | None = Field(None, description=_SCOPE)
    group: Count | None = Field(None, description=_GROUP)
    share: Share | None = Field(None, description=_SHARE)
    block_size: Count | None = Field(None, description=_BLOCK_SIZE)


class Pruning(_Section):
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
    spread: bool = Field(False, description=_SPREAD)
    max_nonzero: Count | None = Field(None, description=_MAX_NONZERO)
    pointwise: Pointwise = Field("ck", description=_POINTWISE)
    scope: Scope = Field("channel", description=_SCOPE)
    group: Count = Field(1, description=_GROUP)
    share: Share = Field(0.5, description=_SHARE)
    split: float = Field(0.5, gt=0, lt=1, description="part of the era for ck, in (0, 1) (inter)")
    seed: int = Field(0, ge=0, description="seed of random masks, from 0 (random)")
    include: Names = Field(("*",), min_length=1, description="layers to prune: one glob, or a list")
    exclude: Names = Field((), description="layers of these to leave dense: one glob, or a list")
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = Field(
        (), description="other settings for some layers"
    )
    fc: OrNone[Fc] = Field(default_factory=Fc, description="linear layers; none leaves them dense")


class Recipe(_Section):
    """A training run."""

    model: Model = Field(description="the network")
    data: Data = Field(description="the data set")
    optimizer: Optimizer = Field(description="the optimizer")
    lr_schedule: LrSchedule = Field(
        default_factory=LrSchedule, description="the learning rate over the epochs"
    )
    epochs: Count = Field(description="epochs to train, from 1")
    seed: int = Field(0, ge=0, description="seed of the run, from 0")
    training: Training = Field(default_factory=Training, description="how the steps are taken")
    pruning: OrNone[Pruning] = Field(description="how to prune; none for dense training")


# Checks between keys: on plain data, so that they also run where a model was refused.


def _plain(value: Any) -> Any:
    """Mappings and models (what was set in them) as dicts, sequences as lists."""
    if isinstance(value, BaseModel):
        value = {key: item for key, item in value if key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _cross_problems(root: type[_Section], tree: Any, *, deep: bool = False) -> Iterator[_Problem]:
    """The problems between the keys of a section; `deep` adds those within its parts."""
    if not isinstance(tree, dict):
        return
    if root is Data:
        yield from _data_problems(tree)
    elif root is Pruning:
        yield from _pruning_problems(tree)
    elif root is Recipe:
        yield from _recipe_problems(tree)
        for name, part in (("data", Data), ("pruning", Pruning)) if deep else ():
            for path, text in _cross_problems(part, tree.get(name)):
                yield (name, *path), text


def _data_problems(data: dict[str, Any]) -> Iterator[_Problem]:
    kind, root = data.get("name"), data.get("root")
    if kind == "digits" and root is not None:
        yield ("root",), f"has no effect with data digits {_got(root)}; remove it"
    if kind in ("folder", "tiny_imagenet") and root is None:
        yield ("root",), f"is required with data {kind} (the folder of the images)"


def _recipe_problems(recipe: dict[str, Any]) -> Iterator[_Problem]:
    def at(section: str, key: str) -> Any:
        return recipe[section].get(key) if isinstance(recipe.get(section), dict) else None

    epochs, era = recipe.get("epochs"), at("pruning", "era")
    if type(epochs) is not int or epochs < 1:
        return
    if _is_era(era) and era[1] > epochs:
        text = f"ends after the run {_got(era)}; its end is at most epochs = {epochs}"
        yield ("pruning", "era"), text
    milestones = at("lr_schedule", "milestones")
    for index, epoch in enumerate(milestones if isinstance(milestones, list) else ()):
        if type(epoch) is int and epoch >= epochs:
            text = f"must be below epochs = {epochs} {_got(epoch)}"
            yield ("lr_schedule", "milestones", index), text
    warmup = at("lr_schedule", "warmup_epochs")
    if type(warmup) is int and warmup >= epochs:
        yield ("lr_schedule", "warmup_epochs"), f"must be below epochs = {epochs} {_got(warmup)}"


class _Place(NamedTuple):
    """A place where options are given, and the methods of the layers it speaks of."""

    path: _Path
    given: dict[str, Any]
    methods: tuple[Any, ...]
    pointwise: object

    def uses(self, option: str) -> bool:
        if any(method not in _METHODS for method in self.methods):
            return True  # the method is refused already
        methods = set(OPTION_METHODS[option]).intersection(self.methods)
        if option in _POINTWISE_OPTIONS and self.pointwise == "none":
            methods.discard("window")
        return bool(methods)


def _places(pruning: dict[str, Any]) -> Iterator[_Place]:
    method, pointwise, fc = (pruning.get(key) for key in ("method", "pointwise", "fc"))
    yield _Place((), pruning, (method,), pointwise)
    settings = fc if isinstance(fc, dict) else {}
    fc_methods = () if fc == "none" else (settings.get("method", "fine"),)
    yield _Place(("fc",), settings, fc_methods, pointwise)
    overrides = pruning.get("overrides")
    for index, given in enumerate(overrides if isinstance(overrides, list) else ()):
        if isinstance(given, dict):
            own = given.get("method")
            methods = (method, *fc_methods) if own is None else (own,)
            yield _Place(("overrides", index), given, methods, given.get("pointwise") or pointwise)


def _pruning_problems(pruning: dict[str, Any]) -> Iterator[_Problem]:
    places = list(_places(pruning))
    for index, place in enumerate(places):
        given = [key for key, value in place.given.items() if value is not None]
        if index >= 2 and given == ["layers"]:
            yield place.path, "changes nothing; give it a method, an amount or an option"
        for option in OPTION_METHODS:
            # What pruning and fc say holds for the overrides that don't say otherwise.
            heirs = [p for p in places[index + 1 :] if index < 2 and p.given.get(option) is None]
            if option in given and not any(p.uses(option) for p in (place, *heirs)):
                yield (*place.path, option), _no_effect(option, place)


def _no_effect(option: str, place: _Place) -> str:
    methods = " or ".join(dict.fromkeys(place.methods))
    if "window" in place.methods and option in _POINTWISE_OPTIONS:
        methods += " and pointwise none"
    return f"has no effect with method {methods} (used by {', '.join(OPTION_METHODS[option])})"


# Messages.

_PARTS: Final[Mapping[str, type[_Section]]] = {
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "lr_schedule": LrSchedule,
    "training": Training,
    "pruning": Pruning,
    "overrides": Override,
    "fc": Fc,
}
_EXPECTED: Final = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "string_too_short": "at least a character long",
    "too_short": "a list of at least one",
}


def _line(source: str, path: _Path, text: str) -> str:
    return ": ".join(part for part in (source, ".".join(map(str, path)), text) if part)


def _validated(root: type[Section], tree: Any) -> tuple[Section | None, list[_Problem]]:
    try:
        return root.model_validate(tree), []
    except ValidationError as error:
        problems = [_problem(root, detail) for detail in error.errors(include_url=False)]
    return None, list(dict.fromkeys((*problems, *_cross_problems(root, tree, deep=True))))


def _problem(root: type[_Section], detail: ErrorDetails) -> _Problem:
    path = tuple(key for key in detail["loc"] if key not in ("<mapping>", "<none>", "[key]"))
    if "options" in path:
        path = path[: path.index("options") + 2]
    parents = [key for key in path[:-1] if isinstance(key, str)]
    section = _PARTS.get(parents[-1], root) if parents else root
    if detail["type"] == "recipe":
        return path, detail["msg"]
    if detail["type"] == "missing":
        return path, f"is required ({section.model_fields[str(path[-1])].description})"
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        names = list(section.model_fields)
        way_out = _nearest(path[-1], names) or f"; the keys here are {', '.join(names)}"
        return path, f"unknown key {_got(detail['input'])}{way_out}"
    return path, _wrong_value(path, detail)


def _wrong_value(path: _Path, detail: ErrorDetails) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        return f"must be one of {', '.join(names)} {_got(value)}{_nearest(value, names)}"
    if kind not in _EXPECTED:
        return f"{detail['msg'].replace('Input should', 'must')} {_got(value)}"
    expected = _EXPECTED[kind].format(**context)
    if kind == "model_type" and path[-1:] in (("pruning",), ("fc",)):
        expected += " of settings, or none"
    quoted = kind in ("int_type", "float_type") and isinstance(value, str) and _NUMBER.match(value)
    way_out = f"; without quotes: {value}" if quoted else ""
    return f"must be {expected} {_got(value, typed=kind.endswith('_type'))}{way_out}"


def _nearest(value: object, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


# Reading and writing.


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a YAML file.

    Args:
        path: the file, in UTF-8.
        overrides: settings that replace the file's, each `"KEY=VALUE"`: a dotted key (items of a
            list by index, from 0) and a value in YAML. Of two for the same key the later wins.

    Raises:
        RecipeError: all that is wrong, a line each: the source (the file, or `--set` for what an
            override brought), the dotted key, what is wrong with which value, and the way out.

    Example:
        >>> recipe = load_recipe("recipes/quickstart.yaml", ["pruning.amount=0.7"])
        >>> recipe.pruning.amount
        0.7
    """
    tree, keys_set, lines = _overridden(_read(Path(path)), overrides)
    recipe, problems = _validated(Recipe, tree)
    for at, text in problems:
        from_set = any(
            all(str(a) == key for a, key in zip(at, keys, strict=False)) for keys in keys_set
        )
        lines.append(_line("--set" if from_set else os.fspath(path), at, text))
    if recipe is None or lines:
        raise RecipeError("\n".join(lines))
    return recipe


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
    pruning, problems = _validated(Pruning, _plain(settings))
    if pruning is None:
        raise RecipeError("\n".join(_line("pruning", *problem) for problem in problems))
    return pruning


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe in YAML: defaults written out, variables expanded.

    Options without effect are left out, and `load_recipe` reads it back to an equal recipe.

    Example:
        >>> print(dump_recipe(load_recipe("recipes/quickstart.yaml")).splitlines()[-1])
          fc: {method: fine}
    """
    tree = recipe.model_dump(exclude_none=True)
    for (*parents, option), _ in list(_cross_problems(Pruning, _plain(tree["pruning"]))):
        section = tree["pruning"]
        for parent in parents:
            section = section[parent]
        del section[option]
    return yaml.dump(
        tree,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )


def differing_keys(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    """Where two recipes differ: dotted key to the values in `a` and in `b`; empty if nowhere.

    Example:
        >>> a = load_recipe("recipes/quickstart.yaml")
        >>> differing_keys(a, load_recipe("recipes/quickstart.yaml", ["pruning.amount=0.7"]))
        {'pruning.amount': (0.6, 0.7)}
    """
    return dict(_differences(a.model_dump(), b.model_dump(), ()))


def _differences(a: Any, b: Any, at: _Path) -> Iterator[tuple[str, tuple[object, object]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from _differences(a.get(key), b.get(key), (*at, key))
    elif a != b:
        yield ".".join(map(str, at)), (a, b)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe: keys, types and ranges, not the cross checks.

    Example:
        >>> sorted(recipe_schema()["required"])
        ['data', 'epochs', 'model', 'optimizer', 'pruning']
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def write_schema(path: str | os.PathLike[str]) -> None:
    """Writes `recipe_schema()` to the file `path`.

    Example:
        >>> write_schema("recipes/recipe.schema.json")
    """
    Path(path).write_text(_schema_text(), encoding="utf-8")


def _schema_text() -> str:
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Prints the schema."""
    sys.stdout.write(_schema_text())


def _overridden(
    tree: Any, overrides: Sequence[str]
) -> tuple[Any, list[tuple[str, ...]], list[str]]:
    """The tree with the overrides, the keys they set, and a line for each that could not be set."""
    keys_set, lines = [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        keys = tuple(part.strip() for part in key.split("."))
        if not (equals and all(keys)):
            text = f"must be KEY=VALUE {_got(override)}, such as pruning.amount=0.7"
            lines.append(_line("--set", (), text))
            continue
        try:
            tree = _with_value(tree, keys, _parse_yaml(value))
            keys_set.append(keys)
        except ValueError as error:
            lines.append(_line("--set", keys, str(error)))
    return tree, keys_set, lines


def _with_value(node: Any, keys: Sequence[str], value: object) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node, list):
        if not (key.isdecimal() and int(key) < len(node)):
            raise ValueError(f"no item {key} in a list of {len(node)}; the first is 0")
        index = int(key)
        return [*node[:index], _with_value(node[index], rest, value), *node[index + 1 :]]
    if node is None or isinstance(node, dict):
        node = node or {}
        return {**node, key: _with_value(node.get(key), rest, value)}
    raise ValueError(f"has no key {key} to set {_got(node)}; set the whole value instead")


def _read(path: Path) -> dict[Any, Any]:
    try:
        tree = _parse_yaml(path.read_bytes().decode("utf-8-sig"))
        if isinstance(tree, dict):
            return tree
        received = "is empty" if tree is None else f"must be a mapping {_got(tree, typed=True)}"
        fault = f"{received}; a recipe has the keys {', '.join(Recipe.model_fields)}"
    except FileNotFoundError:
        fault = f"no such file{_near_files(path.parent, path.name)}"
    except IsADirectoryError:
        fault = f"is a folder, not a recipe{_near_files(path, 'recipe.yaml')}"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except ValueError as error:
        fault = str(error)
    raise RecipeError(_line(os.fspath(path), (), fault))


def _near_files(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(name, names) or names
    return f"; in that folder: {', '.join(near[:5])}" if near else "; no YAML file in that folder"


# YAML as version 1.2 reads it: only true and false are booleans, so that `mixed_precision: no` and
# `fc: none` are words, and 1e-4 is a number.


def _parse_yaml(text: str) -> Any:
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _yaml_fault(event.start_mark, "a recipe has no aliases")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if node is None else _value_of(node)
    except yaml.MarkedYAMLError as error:
        raise _yaml_fault(error.problem_mark, error.problem) from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None


def _yaml_fault(mark: Any, problem: str | None) -> ValueError:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return ValueError(f"{where}not valid YAML: {problem}")


def _value_of(node: Any) -> Any:
    if node.tag not in [f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")]:
        raise _yaml_fault(node.start_mark, f"a recipe has no tags such as {node.tag}")
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return node.value if node.style else _scalar(node.value)
    mapping: dict[Any, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _yaml_fault(key.start_mark, "a key must be a single word")
        name = _value_of(key)
        if name in mapping:
            raise _yaml_fault(key.start_mark, f"duplicate key {name}")
        mapping[name] = _value_of(value)
    return mapping


def _scalar(text: str) -> object:
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if _NUMBER.match(text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


# What _scalar takes for a number and YAML 1.1 does not, so that such a string is quoted.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


if __name__ == "__main__":
    main()
