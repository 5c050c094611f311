"""The sections of a recipe other than `pruning`, and the recipe itself.

A field's description is also what the JSON Schema says about the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from starfire_prune.data import option_problems, reader_of
from starfire_prune.engine.settings import Epoch, Name, OrNone, Pruning, is_era
from starfire_prune.methods.options import Count, Seed
from starfire_prune.recipe.values import (
    ChannelMeans,
    ChannelScales,
    CropScale,
    DataName,
    Milestones,
    Options,
    Policy,
    Pretrained,
    Probability,
    Root,
    Trackers,
)
from starfire_prune.utils.settings import Problem, Settings, got

__all__ = [
    "Data",
    "Ema",
    "LrSchedule",
    "Model",
    "Optimizer",
    "Quantization",
    "Recipe",
    "Training",
]


# What only timm's readers read, and what is done to photographs but not to digits
_READER_KEYS: Final = ("train_split", "val_split", "options")
_TRANSFORM_KEYS: Final = (
    *("mean", "std", "crop_scale", "auto_augment", "random_erasing", "color_jitter", "hflip"),
)
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

    @classmethod
    def problems(cls, model: dict[str, Any]) -> Iterator[Problem]:
        """Options that are not allowed because they have a key of their own."""
        return _options_problems(model, _MODEL_OPTIONS)


class Data(Settings):
    """The data set, and how its images are read. Batch sizes are per process."""

    name: DataName = Field(
        description="digits, folder, tiny_imagenet, or with a reader of timm's: hfds/NAME (or the "
        "path of a folder), wds/NAME, torch/NAME"
    )
    root: Root | None = Field(
        None,
        description="folder of the images (hfds: of the cache); ~ and ${NAME} are expanded; not "
        "for digits",
    )
    train_split: Name | None = Field(None, description="training split of a reader; default: train")
    val_split: Name | None = Field(
        None, description="validation split of a reader; default: validation"
    )
    options: Options = Field(
        {},
        description="options of a reader: input_key, target_key, class_map (hfds, wds), "
        "shuffle_size (wds), download (torch)",
    )
    image_size: int = Field(
        224, ge=8, le=4096, description="height and width in pixels, from 8 to 4096"
    )
    batch_size: Count = Field(description="images per training step and process, from 1")
    eval_batch_size: Count | None = Field(
        None, description="images per batch of an evaluation; default: batch_size"
    )
    workers: int = Field(
        4, ge=0, le=1024, description="loader processes per process, to 1024; 0: none"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="interpolation of resizing"
    )
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="share of the resized side that evaluation keeps, (0, 1]"
    )
    mean: ChannelMeans | None = Field(
        None, description="mean of each channel, of pixels in [0, 1]; default: ImageNet's"
    )
    std: ChannelScales | None = Field(
        None, description="standard deviation of each channel, above 0; default: ImageNet's"
    )
    crop_scale: CropScale | None = Field(
        None,
        description="least and largest area of random crops, in (0, 1]; default: timm's [0.08, 1]",
    )
    auto_augment: Policy | None = Field(
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

    @classmethod
    def problems(cls, data: dict[str, Any]) -> Iterator[Problem]:
        """Problems between the keys: options that have no effect, and a missing `root`."""
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
        if (kind in ("folder", "tiny_imagenet") or reader in ("wds", "torch")) and not data.get(
            "root"
        ):
            yield ("root",), f"is required with data {kind} (the folder of the images)"
        if data.get("color_jitter") and isinstance(policy, str) and "3a" not in policy:
            text = (
                f"has no effect with auto_augment {policy} {got(data['color_jitter'])}; remove it"
            )
            yield ("color_jitter",), text
        options = data.get("options")
        if reader and isinstance(options, dict):
            for key, problem in option_problems(reader, options):
                yield ("options", key), f"{problem} {got(options[key])}"


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

    @classmethod
    def problems(cls, optimizer: dict[str, Any]) -> Iterator[Problem]:
        """Options that are not allowed because they have a key of their own."""
        return _options_problems(optimizer, _OPTIMIZER_OPTIONS)


class LrSchedule(Settings):
    """The learning rate over the epochs: steps are constant without milestones."""

    name: Literal["step", "cosine"] = Field(
        "step", description="step at milestones, or half a cosine from lr towards 0"
    )
    milestones: Milestones = Field(
        (), description="epochs, 0-based and rising, that begin with the rate times gamma"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone, in (0, 1]")
    warmup_epochs: Epoch = Field(0, description="epochs over which the rate rises to lr")


class Ema(Settings):
    """The moving average of the weights, timm's ModelEmaV3."""

    decay: float = Field(0.9999, gt=0, lt=1, description="share kept at each update, in (0, 1)")
    warmup: bool = Field(False, description="true: the decay rises to its value with the updates")


class Training(Settings):
    """How the network is trained."""

    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="autocast's type")
    gradient_accumulation: Count = Field(1, description="batches per update, from 1")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm, above 0")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing, in [0, 1)")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup, from 0 (none)")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix, from 0 (none)")
    ema: Ema | None = Field(
        None, description="also average the weights, and export the average; default: no average"
    )
    channels_last: bool = Field(False, description="true: channels_last weights and images")
    compile: bool = Field(False, description="true: train the model compiled by torch.compile")
    compress_gradients: bool = Field(
        False, description="true: after the era, processes only send gradients of kept weights"
    )
    keep_checkpoints: Milestones = Field(
        (), description="epochs, rising, whose checkpoints are kept beside the last two (--fork)"
    )
    trackers: Trackers = Field(
        (), description="Accelerate's trackers that get the metrics too: one, or a list"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="CPU threads of a process, to 1024; default: as launched (accelerate launch: "
        "1)",
    )

    parts: ClassVar[Mapping[str, type[Settings]]] = {"ema": Ema}


class Quantization(Settings):
    """The last phase of a run: after `epochs` it trains with the rounding of int8, masks fixed."""

    epochs: Count = Field(
        description="epochs of the phase, from 1; they follow the recipe's epochs"
    )
    lr: float | None = Field(
        None, gt=0, description="its constant learning rate; default: a hundredth of optimizer.lr"
    )
    frozen_epochs: int = Field(
        0,
        ge=0,
        description="the last epochs of it that change neither the statistics of batch norms nor "
        "the ranges of activations and weights, from 0 to its epochs",
    )
    reduced_range: bool = Field(
        False, description="true: activations of 7 bits, for CPUs with AVX2 but without VNNI"
    )

    @classmethod
    def problems(cls, quantization: dict[str, Any]) -> Iterator[Problem]:
        """More frozen epochs than epochs."""
        epochs, frozen = quantization.get("epochs"), quantization.get("frozen_epochs")
        if type(epochs) is int and type(frozen) is int and frozen > epochs > 0:
            text = f"must be at most quantization.epochs = {epochs} {got(frozen)}"
            yield ("frozen_epochs",), text


class Recipe(Settings):
    """A training run."""

    model: Model = Field(description="the network")
    data: Data = Field(description="the data set")
    optimizer: Optimizer = Field(description="the optimizer")
    lr_schedule: LrSchedule = Field(
        default_factory=LrSchedule, description="the learning rate over the epochs"
    )
    epochs: int = Field(
        ge=1,
        le=100_000,
        description="epochs to train, from 1 to 100000; those of quantization follow",
    )
    seed: Seed = Field(0, description="seed of the run, from 0 to 2**32 - 1")
    training: Training = Field(default_factory=Training, description="how the network is trained")
    quantization: Quantization | None = Field(
        None,
        description="the last phase, which trains for int8 (it needs the extra quantize); "
        "default: no such phase",
    )
    pruning: OrNone[Pruning] = Field(description="how to prune; none for dense training")

    parts: ClassVar[Mapping[str, type[Settings]]] = {
        "model": Model,
        "data": Data,
        "optimizer": Optimizer,
        "lr_schedule": LrSchedule,
        "training": Training,
        "quantization": Quantization,
        "pruning": Pruning,
    }

    @property
    def total_epochs(self) -> int:
        """The number of epochs with those of the quantization phase."""
        return self.epochs + (0 if self.quantization is None else self.quantization.epochs)

    @classmethod
    def problems(cls, recipe: dict[str, Any]) -> Iterator[Problem]:
        """Problems between sections: epochs that lie outside of the run."""

        def at(section: str, key: str) -> Any:
            return recipe[section].get(key) if isinstance(recipe.get(section), dict) else None

        if isinstance(recipe.get("quantization"), dict) and at("training", "ema") is not None:
            text = "can't be combined with quantization, which trains the weights themselves; "
            yield ("training", "ema"), f"{text}remove one of them"
        epochs, era = recipe.get("epochs"), at("pruning", "era")
        if type(epochs) is not int or epochs < 1:
            return
        if is_era(era) and era[1] > epochs:
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


def _options_problems(section: dict[str, Any], refused: Mapping[str, str]) -> Iterator[Problem]:
    options = section.get("options")
    for key, value in options.items() if isinstance(options, dict) else ():
        if key in refused:
            fault, _, way_out = refused[key].partition("; ")
            yield ("options", key), f"{fault} {got(value)}; {way_out}"
