"""The settings of a recipe: frozen models that refuse what they don't know.

Each model is a section of the YAML file; its fields' descriptions are also the schema's. Checks
between keys run on plain data, so that they still run where a model was refused.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args

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
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from starfire_prune.data import (
    DATASETS,
    READER_OPTIONS,
    is_policy,
    option_problems,
    reader_of,
)

__all__ = [
    "Data",
    "Ema",
    "Fc",
    "KeyPath",
    "LrSchedule",
    "Model",
    "Optimizer",
    "Override",
    "Problem",
    "Pruning",
    "Recipe",
    "Seed",
    "Settings",
    "SettingsT",
    "Training",
    "cross_problems",
    "got",
    "plain",
]

ConvMethod = Literal["window", "ck", "intra", "inter", "magnitude", "random", "filter"]
FcMethod = Literal["fine", "block", "structure", "magnitude", "random"]
# Not inter: its two halves of the era are the whole network's.
OverrideMethod = Literal[
    "window", "ck", "intra", "magnitude", "random", "filter", "fine", "block", "structure"
]
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
    "then": ("structure",),
    "block_size": ("block", "structure"),
}
_POINTWISE_OPTIONS: Final = ("scope", "group")  # window reads them for its 1x1 kernels alone

# What only timm's readers read, and what is done to photographs but not to digits
_READER_KEYS: Final = ("train_split", "val_split", "options")
_TRANSFORM_KEYS: Final = ("mean", "std", "auto_augment", "random_erasing", "color_jitter", "hflip")

# What options may not hold, and what to do instead
_MODEL_OPTIONS: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"),
        "has a key of its own; use model.pretrained",
    ),
    "num_classes": "has a key of its own; use model.num_classes",
    "features_only": "leaves no classifier to train; remove it",
}
_OPTIMIZER_OPTIONS: Final[Mapping[str, str]] = {
    **{
        key: f"has a key of its own; use optimizer.{key}"
        for key in ("lr", "momentum", "weight_decay", "filter_bias_and_bn")
    },
    "opt": "has a key of its own; use optimizer.name",
    "model_or_params": "is the network that is trained; remove it",
}

_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

_AMOUNT: Final = "share of the weights or kernels that goes, a float in (0, 1]"
_SPREAD: Final = "true: layers reach their amount exactly, not in steps of 1/(R·S) (window)"
_MAX_NONZERO: Final = "most weights left in a kernel (window), or kernels in a locale (ck); from 1"
_POINTWISE: Final = "how 1x1 kernels are pruned; none leaves them dense (window)"
_SCOPE: Final = "where kernels compete (ck, intra, inter, window's 1x1 kernels)"
_GROUP: Final = "output channels that share a kernel mask, from 1 (ck, window's 1x1 kernels)"
_SHARE: Final = "part of the amount that is window's, in [0, 1] (intra, inter)"
_THEN: Final = "how the rest goes behind the columns that read zeros (structure)"
_BLOCK_SIZE: Final = "side of a block in weights, from 1 (block, structure then block)"

KeyPath = tuple[str | int, ...]
Problem = tuple[KeyPath, str]


# Values that pydantic's own types don't describe.


def got(value: object, *, typed: bool = False) -> str:
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
    raise _refusal(f"must be a float above 0 and at most 1 {got(value, typed=True)}; {way_out}")


def _is_era(value: Any) -> bool:
    two = isinstance(value, (list, tuple)) and [type(item) for item in value] == [int, int]
    return two and 0 <= value[0] < value[1]


def _era(value: object) -> object:
    if _is_era(value):
        return value
    raise _refusal(
        f"must be two epochs [first, end] with 0 <= first < end {got(value)}; "
        "[40, 60] prunes in the epochs 40 to 59"
    )


def _rising(milestones: tuple[int, ...]) -> tuple[int, ...]:
    if all(a < b for a, b in itertools.pairwise(milestones)):
        return milestones
    raise _refusal(f"must rise {got(milestones)}; in order: {sorted(set(milestones))}")


def _expanded(root: str, info: ValidationInfo) -> str:
    kept = []

    def value_of(match: re.Match[str]) -> str:
        if value := os.environ.get(match[1]):
            return value
        if info.context and info.context.get("keep_unset"):
            kept.append(match[0])
            return match[0]
        raise _refusal(
            f"the environment variable {match[1]} is not set {got(root)}; "
            f"export {match[1]}=/path/to/the/data, or name the folder itself"
        )

    path = os.path.expanduser(re.sub(r"\$\{(\w+)\}", value_of, root))
    if path.count("${") > len(kept):
        raise _refusal(f"has a ${{ without a name and }} {got(path)}; write ${{NAME}}")
    return path


def _data_name(name: str, info: ValidationInfo) -> str:
    reader, _, rest = name.partition("/")
    if reader_of(name) is not None:
        return f"{reader}/{_expanded(rest, info)}"
    if name in DATASETS:
        return name
    readers = ", ".join(f"{reader}/…" for reader in READER_OPTIONS)
    near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    raise _refusal(
        f"must be one of {', '.join(DATASETS)}, {readers} {got(name)}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _channels(value: object) -> object:
    numbers = isinstance(value, (list, tuple)) and [type(item) in (int, float) for item in value]
    if numbers == [True] * 3:
        return value
    raise _refusal(f"must be three numbers, one a channel {got(value)}")


def _policy(text: str) -> str:
    if is_policy(text):
        return text
    raise _refusal(
        f"is no policy of timm's {got(text)}; such as rand-m9-mstd0.5, augmix-m3, original or 3a"
    )


def _pretrained(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and value:
        return _expanded(value, info)
    if isinstance(value, bool):
        return value
    raise _refusal(f"must be true, false or a safetensors file {got(value, typed=True)}")


def _one_or_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _kind(value: object) -> str:
    return "<none>" if isinstance(value, str) and value == "none" else "<mapping>"


SettingsT = TypeVar("SettingsT", bound="Settings")
OrNone = Annotated[
    Annotated[SettingsT, Tag("<mapping>")] | Annotated[Literal["none"], Tag("<none>")],
    Discriminator(_kind),
]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(_one_or_list, json_schema_input_type=Name | list[Name]),
    Field(strict=False),
]
Options = dict[str, JsonValue]
DataName = Annotated[
    str,
    AfterValidator(_data_name),
    WithJsonSchema(
        {"anyOf": [{"enum": [*DATASETS]}, {"pattern": "^((hfds|torch|torchvision)/.|wds/)"}]}
    ),
]
Pretrained = Annotated[bool | Name, BeforeValidator(_pretrained)]
Tracker = Literal[
    "tensorboard",
    "wandb",
    "comet_ml",
    "aim",
    "mlflow",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
]
Trackers = Annotated[
    tuple[Tracker, ...],
    BeforeValidator(_one_or_list, json_schema_input_type=Tracker | list[Tracker]),
    Field(strict=False),
]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, BeforeValidator(_amount), Field(gt=0, le=1)]
Epoch = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy takes no larger one
Share = Annotated[float, Field(ge=0, le=1)]
Pointwise = Literal["ck", "none"]
Scope = Literal["channel", "layer"]
Then = Literal["fine", "block"]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _cross_checked(self: SettingsT) -> SettingsT:
        problems = [
            InitErrorDetails(type=_refusal(text), loc=path, input=None)
            for path, text in cross_problems(type(self), plain(self))
        ]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self


class Model(Settings):
    """The network: a model of timm's registry, this package's variants among them."""

    name: Name = Field(description="name in timm's registry, such as resnet50")
    num_classes: Count = Field(description="number of classes, from 1")
    pretrained: Pretrained = Field(
        False,
        description="weights to start from: true for timm's of that name, or a safetensors file "
        "with its keys; ~ and ${NAME} are expanded; the classifier of other classes is left out",
    )
    options: Options = Field({}, description="keyword arguments for timm.create_model")


class Data(Settings):
    """The data set, and how its images are read. Batch sizes are per process."""

    name: DataName = Field(
        description="digits, folder, tiny_imagenet, or with a reader of timm's: hfds/NAME (or the "
        "path of a folder), wds/NAME, torch/NAME"
    )
    root: Annotated[str, AfterValidator(_expanded)] | None = Field(
        None,
        description="folder of the images (hfds: of the cache); ~ and ${NAME} are expanded; not "
        "for digits",
    )
    train_split: Name | None = Field(None, description="of a reader; default: train")
    val_split: Name | None = Field(None, description="of a reader; default: validation")
    options: Options = Field(
        {},
        description="of a reader: input_key, target_key, class_map (hfds, wds), shuffle_size (wds),"
        " download (torch)",
    )
    image_size: int = Field(
        224, ge=8, le=4096, description="height and width in pixels, from 8 to 4096"
    )
    batch_size: Count = Field(description="images per training step and process, from 1")
    eval_batch_size: Count | None = Field(None, description="in evaluation; default: batch_size")
    workers: int = Field(
        4, ge=0, le=1024, description="loader processes per process, to 1024; 0: none"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="for resizing")
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="share of the resized side that evaluation keeps, (0, 1]"
    )
    mean: (
        Annotated[tuple[float, float, float], BeforeValidator(_channels), Field(strict=False)]
        | None
    ) = Field(None, description="of the channels, of pixels in [0, 1]; default: ImageNet's")
    std: (
        Annotated[
            tuple[Positive, Positive, Positive], BeforeValidator(_channels), Field(strict=False)
        ]
        | None
    ) = Field(None, description="of the channels, above 0; default: ImageNet's")
    auto_augment: Annotated[str, AfterValidator(_policy)] | None = Field(
        None, description="policy of timm's, such as rand-m9-mstd0.5"
    )
    random_erasing: Probability | None = Field(
        None, description="probability that a rectangle becomes noise, in [0, 1]; default: 0"
    )
    color_jitter: Annotated[float, Field(ge=0)] | None = Field(
        None, description="how far brightness, contrast and saturation vary, from 0; default: 0"
    )
    hflip: Probability | None = Field(
        None, description="probability of a horizontal flip, in [0, 1]; default: 0.5"
    )


class Optimizer(Settings):
    """The optimizer, as timm.optim.create_optimizer_v2 makes it."""

    name: Name = Field(description="name of one of timm's optimizers, such as sgd")
    lr: float = Field(gt=0, description="learning rate, above 0")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, in [0, 1)")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, from 0")
    filter_bias_and_bn: bool = Field(
        False, description="true: no weight decay for biases and normalisation layers"
    )
    options: Options = Field({}, description="keyword arguments for create_optimizer_v2")


class LrSchedule(Settings):
    """The learning rate over the epochs: steps are constant without milestones."""

    name: Literal["step", "cosine"] = Field(
        "step", description="step at milestones, or half a cosine from lr towards 0"
    )
    milestones: Annotated[tuple[Count, ...], Field(strict=False), AfterValidator(_rising)] = Field(
        (), description="epochs, 0-based and rising, that begin with the rate times gamma"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone, in (0, 1]")
    warmup_epochs: Epoch = Field(0, description="epochs over which the rate rises to lr")


class Ema(Settings):
    """The moving average of the weights, timm's ModelEmaV3."""

    decay: float = Field(0.9999, gt=0, lt=1, description="share kept at each update, in (0, 1)")
    warmup: bool = Field(False, description="true: the decay rises to its value with the updates")


class Training(Settings):
    """How the steps are taken."""

    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="autocast's type")
    gradient_accumulation: Count = Field(1, description="batches per update, from 1")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm, above 0")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing, in [0, 1)")
    mixup: float = Field(0.0, ge=0, description="alpha of timm's mixup, from 0 (none)")
    cutmix: float = Field(0.0, ge=0, description="alpha of timm's cutmix, from 0 (none)")
    ema: Ema | None = Field(
        None, description="also average the weights, and export the average; default: no average"
    )
    channels_last: bool = Field(False, description="true: channels_last weights and images")
    compile: bool = Field(False, description="true: train the model compiled by torch.compile")
    compress_gradients: bool = Field(
        False, description="true: after the era, processes send each other kept gradients alone"
    )
    keep_checkpoints: Annotated[tuple[Count, ...], Field(strict=False), AfterValidator(_rising)] = (
        Field(
            (),
            description="epochs, rising, whose checkpoints stay beside the last two (--fork)",
        )
    )
    trackers: Trackers = Field(
        (), description="Accelerate's trackers that get the metrics too: one, or a list"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="CPU threads of a process, to 1024; default: as launched (accelerate launch: "
        "1)",
    )


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
    spread: bool | None = Field(None, description=_SPREAD)
    max_nonzero: Count | None = Field(None, description=_MAX_NONZERO)
    pointwise: Pointwise | None = Field(None, description=_POINTWISE)
    scope: Scope | None = Field(None, description=_SCOPE)
    group: Count | None = Field(None, description=_GROUP)
    share: Share | None = Field(None, description=_SHARE)
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
    spread: bool = Field(False, description=_SPREAD)
    max_nonzero: Count | None = Field(None, description=_MAX_NONZERO)
    pointwise: Pointwise = Field("ck", description=_POINTWISE)
    scope: Scope = Field("channel", description=_SCOPE)
    group: Count = Field(1, description=_GROUP)
    share: Share = Field(0.5, description=_SHARE)
    split: float = Field(0.5, gt=0, lt=1, description="part of the era for ck, in (0, 1) (inter)")
    free: bool = Field(
        False, description="true: what only reads zeros goes too, at the end of the era"
    )
    seed: Seed = Field(0, description="seed of random masks, from 0 to 2**32 - 1 (random)")
    include: Names = Field(("*",), min_length=1, description="layers to prune: one glob, or a list")
    exclude: Names = Field((), description="layers of these to leave dense: one glob, or a list")
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = Field(
        (), description="other settings for some layers"
    )
    fc: OrNone[Fc] = Field(default_factory=Fc, description="linear layers; none leaves them dense")


class Recipe(Settings):
    """A training run."""

    model: Model = Field(description="the network")
    data: Data = Field(description="the data set")
    optimizer: Optimizer = Field(description="the optimizer")
    lr_schedule: LrSchedule = Field(
        default_factory=LrSchedule, description="the learning rate over the epochs"
    )
    epochs: int = Field(ge=1, le=100_000, description="epochs to train, from 1 to 100000")
    seed: Seed = Field(0, description="seed of the run, from 0 to 2**32 - 1")
    training: Training = Field(default_factory=Training, description="how the steps are taken")
    pruning: OrNone[Pruning] = Field(description="how to prune; none for dense training")


# Checks between keys: on plain data, so that they also run where a model was refused.

_CHECKED: Final[Mapping[str, type[Settings]]] = {
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "pruning": Pruning,
}


def plain(value: Any) -> Any:
    """Mappings and models (what was set in them) as dicts, sequences as lists."""
    if isinstance(value, BaseModel):
        value = {key: item for key, item in value if key in value.model_fields_set}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def cross_problems(root: type[Settings], tree: Any, *, deep: bool = False) -> Iterator[Problem]:
    """The problems between the keys of a section; `deep` adds those within its parts."""
    if not isinstance(tree, dict):
        return
    if root is Model:
        yield from _options_problems(tree, _MODEL_OPTIONS)
    elif root is Optimizer:
        yield from _options_problems(tree, _OPTIMIZER_OPTIONS)
    elif root is Data:
        yield from _data_problems(tree)
    elif root is Pruning:
        yield from _pruning_problems(tree)
    elif root is Recipe:
        yield from _recipe_problems(tree)
        for name, part in _CHECKED.items() if deep else ():
            for path, text in cross_problems(part, tree.get(name)):
                yield (name, *path), text


def _options_problems(section: dict[str, Any], refused: Mapping[str, str]) -> Iterator[Problem]:
    options = section.get("options")
    for key, value in options.items() if isinstance(options, dict) else ():
        if key in refused:
            fault, _, way_out = refused[key].partition("; ")
            yield ("options", key), f"{fault} {got(value)}; {way_out}"


def _data_problems(data: dict[str, Any]) -> Iterator[Problem]:
    kind, policy = data.get("name"), data.get("auto_augment")
    if not isinstance(kind, str):
        return
    reader = reader_of(kind)
    unused: tuple[str, ...] = () if reader else _READER_KEYS
    if kind == "digits":
        unused = ("root", *_READER_KEYS, *_TRANSFORM_KEYS)
    for key in unused:
        if data.get(key) not in (None, {}):
            yield (key,), f"has no effect with data {kind} {got(data[key])}; remove it"
    if (kind in ("folder", "tiny_imagenet") or reader in ("wds", "torch")) and not data.get("root"):
        yield ("root",), f"is required with data {kind} (the folder of the images)"
    if data.get("color_jitter") and isinstance(policy, str) and "3a" not in policy:
        text = f"has no effect with auto_augment {policy} {got(data['color_jitter'])}; remove it"
        yield ("color_jitter",), text
    options = data.get("options")
    if reader and isinstance(options, dict):
        for key, problem in option_problems(reader, options):
            yield ("options", key), f"{problem} {got(options[key])}"


def _recipe_problems(recipe: dict[str, Any]) -> Iterator[Problem]:
    def at(section: str, key: str) -> Any:
        return recipe[section].get(key) if isinstance(recipe.get(section), dict) else None

    epochs, era = recipe.get("epochs"), at("pruning", "era")
    if type(epochs) is not int or epochs < 1:
        return
    if _is_era(era) and era[1] > epochs:
        text = f"ends after the run {got(era)}; its end is at most epochs = {epochs}"
        yield ("pruning", "era"), text
    milestones = at("lr_schedule", "milestones")
    if milestones and at("lr_schedule", "name") == "cosine":
        text = f"has no effect with lr_schedule cosine {got(milestones)}; remove it"
        yield ("lr_schedule", "milestones"), text
    for index, epoch in enumerate(milestones if isinstance(milestones, list) else ()):
        if type(epoch) is int and epoch >= epochs:
            text = f"must be below epochs = {epochs} {got(epoch)}"
            yield ("lr_schedule", "milestones", index), text
    warmup = at("lr_schedule", "warmup_epochs")
    if type(warmup) is int and warmup >= epochs:
        yield (
            ("lr_schedule", "warmup_epochs"),
            f"must be below epochs = {epochs} {got(warmup)}",
        )


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
            methods.discard("structure")
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


def _pruning_problems(pruning: dict[str, Any]) -> Iterator[Problem]:
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
    if "structure" in place.methods and option == "block_size":
        methods += " then fine"
    return f"has no effect with method {methods} (used by {', '.join(OPTION_METHODS[option])})"
