"""Which layers of a model are pruned, and how: a recipe's settings applied to its modules."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from starfire_prune.masks.conv import intra_shares
from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.conv import CKStructured, WindowStructured
from starfire_prune.methods.registry import METHODS
from starfire_prune.methods.schedules import SCHEDULES
from starfire_prune.utils.modules import (
    clean_name,
    is_depthwise,
    layer_weight,
    prunable_layers,
    unwrap,
)

if TYPE_CHECKING:
    from starfire_prune.engine.settings import Override, Pruning

__all__ = ["PrunedLayer", "amount_at", "select_layers"]


# The keywords that each method's class takes from the settings of the same names.
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "window": ("exact_layer_sparsity",),
    "ck": ("group", "scope"),
    "intra": ("window_fraction", "scope"),
    "block": ("block_size",),
    "dead_inputs": ("then", "block_size"),
}
_CONV_METHODS = ("window", "ck", "intra", "inter", "magnitude", "random", "filter")
_LINEAR_METHODS = ("fine", "block", "dead_inputs", "magnitude", "random")


@dataclasses.dataclass(frozen=True)
class PrunedLayer:
    """A layer that is pruned, and the settings that hold for it.

    Attributes:
        name: of the module, without prefixes of DDP and `torch.compile`.
        module: the convolution or linear layer; its parameter `weight` is pruned.
        method: a key of `METHODS`, or `"inter"`.
        amount: the target share in (0, 1].
        schedule: a key of `SCHEDULES`.
        ck_fraction_of_era: the share of the era that `"inter"` spends on CK.
        share: the share of the amount that `"inter"` leaves to window pruning.
        options: keywords of the method's class.
        max_nonzero: applied with the target, for the methods that have it.
    """

    name: str
    module: nn.Module
    method: str
    amount: float
    schedule: str = "linear"
    ck_fraction_of_era: float = 0.5
    window_fraction: float = 0.5
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_nonzero: int | None = None

    def method_at(self, progress: float) -> MaskMethod:
        """The pruning method, with its amount, at a progress of the era in [0, 1]."""
        amount = amount_at(self, progress)
        if self.method == "inter":
            if progress > self.ck_fraction_of_era:
                return WindowStructured(amount, exact_layer_sparsity=True)
            return CKStructured(amount, **self.options)
        options = dict(self.options)
        if progress == 1.0 and self.max_nonzero is not None:
            options["max_nonzero"] = self.max_nonzero
        return METHODS[self.method](amount, **options)

    def reading_zeros_in(self, columns: Tensor) -> PrunedLayer:
        """The same layer under `dead_inputs`, told which input channels are zero, bool `(C,)`."""
        return dataclasses.replace(self, options={**self.options, "columns": columns})

    def methods_between(self, applied: float, progress: float) -> list[MaskMethod]:
        """The methods that bring a mask from one progress of the era to a later one.

        `inter` completes its first half, CK, before it goes on with window pruning, wherever the
        updates fall.
        """
        method = self.method_at(progress)
        if self.method == "inter" and applied < self.ck_fraction_of_era < progress:
            return [self.method_at(self.ck_fraction_of_era), method]
        return [method]

    def check(self) -> None:
        """Raise ValueError if the settings don't fit the layer, or would take all its weights."""
        shape = layer_weight(self.module).shape
        fitting = _LINEAR_METHODS if isinstance(self.module, nn.Linear) else _CONV_METHODS
        if self.method not in fitting and "flatten" not in self.options:
            raise ValueError(
                f"layer {self.name} ({type(self.module).__name__}) can't be pruned by "
                f"{self.method}: give it one of {', '.join(fitting)}"
            )
        if isinstance(self.module, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"layer {self.name} is the output projection of nn.MultiheadAttention, which uses "
                f"its weight without calling it, so that no hook can mask it: leave it out by "
                f"`exclude`"
            )
        try:
            steps = [self.method_at(progress) for progress in (self.ck_fraction_of_era, 1.0)]
            emptied = any(gone == units for step in steps for gone, units in step.counts(shape))
        except ValueError as error:
            raise ValueError(
                f"layer {self.name} of shape {tuple(shape)} can't be pruned by {self.method}: "
                f"{error}; or leave it out by `exclude`"
            ) from None
        if emptied:
            raise ValueError(
                f"layer {self.name} of shape {tuple(shape)} would lose all its weights by "
                f"{self.method} at amount {self.amount}: lower its amount by an override, or leave "
                f"it out by `exclude`"
            )


class _Schedule(Protocol):
    """What a layer's settings and the whole network's have in common."""

    @property
    def method(self) -> str: ...
    @property
    def amount(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def ck_fraction_of_era(self) -> float: ...
    @property
    def window_fraction(self) -> float: ...


def amount_at(settings: _Schedule, progress: float) -> float:
    """The amount in [0, 1] that a layer, or `pruning` as a whole, stands at in the era.

    `inter` (appendix 7.1) is CK up to the kernel amount of intra during the first
    `ck_fraction_of_era`, then window pruning spread over the surviving kernels up to the total.
    """
    rise = SCHEDULES[settings.schedule]
    if settings.method != "inter":
        return settings.amount * rise(progress)
    _, kernel_amount = intra_shares(settings.amount, settings.window_fraction)
    if progress <= settings.ck_fraction_of_era:
        return kernel_amount * rise(progress / settings.ck_fraction_of_era)
    if progress == 1.0:
        return settings.amount
    rest = rise((progress - settings.ck_fraction_of_era) / (1.0 - settings.ck_fraction_of_era))
    return kernel_amount + (settings.amount - kernel_amount) * rest


def select_layers(
    model: nn.Module, pruning: Pruning, connected: Collection[str] = ()
) -> list[PrunedLayer]:
    """The layers of `model` that `pruning` selects, in the model's order.

    All convolutions and linear layers that match `include` and not `exclude`; depthwise
    convolutions only where an `include` other than `*` matches them, and then with the layer as
    the locale of kernels. An override applies to the selected layers it matches; where several
    match, the last one does. Convolutions named in `connected` are pruned as linear layers are.

    Raises:
        ValueError: for a pattern that matches no layer (transposed convolutions are none here),
            an override of layers that are not selected, a selected layer that its method can't
            prune or would empty, one that shares its weight with another module or has none of
            its own, and a selection of no layer at all.
    """
    candidates = prunable_layers(model)
    for key in ("include", "exclude"):
        _check_patterns(f"pruning.{key}", getattr(pruning, key), candidates)
    named = [pattern for pattern in pruning.include if pattern != "*"]
    selected = {
        name: module
        for name, module in candidates.items()
        if _matches(name, pruning.include)
        and not _matches(name, pruning.exclude)
        and not (isinstance(module, nn.Linear) and pruning.fc == "none")
        and (not is_depthwise(module) or _matches(name, named))
    }
    for name, module in selected.items():
        _check_weight(name, module)
    for index, override in enumerate(pruning.overrides):
        key = f"pruning.overrides.{index}.layers"
        _check_patterns(key, override.layers, candidates)
        _check_selected(key, override.layers, _overridable(selected, pruning, override))
    planned = (
        _planned(name, module, pruning, _override_of(name, pruning), name in connected)
        for name, module in selected.items()
    )
    layers = [layer for layer in planned if layer is not None]
    if not layers:
        raise ValueError(
            "pruning selects no layer: the model has no convolution or linear layer that "
            "`include` matches and `exclude`, `pointwise` and `fc` leave"
        )
    _check_unshared(model, layers)
    for layer in layers:
        layer.check()
    return layers


def _planned(
    name: str,
    module: nn.Module,
    pruning: Pruning,
    override: Override | None,
    connected: bool = False,
) -> PrunedLayer | None:
    """The layer's settings, or None where `pointwise: none` leaves it dense."""
    own = override.model_dump(exclude_none=True) if override is not None else {}
    settings = {**pruning.model_dump(exclude={"fc", "overrides"}), **own}
    if connected or isinstance(module, nn.Linear):
        fc = {} if pruning.fc == "none" else pruning.fc.model_dump(exclude_none=True)
        settings |= {**fc, **own}
    method = settings["method"]
    if method != pruning.method and "max_nonzero" not in own:
        settings["max_nonzero"] = None  # window counts weights of a kernel by it, ck kernels
    if isinstance(module, _ConvNd):
        pointwise = layer_weight(module)[0, 0].numel() == 1
        if method == "window" and pointwise:
            method = settings["pointwise"]
            settings["max_nonzero"] = None  # counts the weights of a kernel
        elif method == "inter" and pointwise:
            method = "ck"
        if method == "none":
            return None
        if is_depthwise(module):
            settings["scope"] = "layer"
    # A convolution has no block_size; `PrunedLayer.check` refuses its block method.
    options = {key: settings[key] for key in _OPTIONS.get(method, ()) if key in settings}
    if method in ("ck", "intra", "inter") and isinstance(module, _ConvNd):
        options["groups"] = module.groups
    if method == "dead_inputs" and connected:
        options["flatten"] = True
    if method == "inter":
        options["scope"] = settings["scope"]
    if method == "random":  # an order of its own for each layer
        options["seed"] = settings["seed"] ^ zlib.crc32(name.encode())
    return PrunedLayer(
        name=name,
        module=module,
        method=method,
        amount=settings["amount"],
        schedule=settings["schedule"],
        ck_fraction_of_era=settings["ck_fraction_of_era"],
        window_fraction=settings["window_fraction"],
        options=options,
        max_nonzero=settings["max_nonzero"] if method in ("window", "ck") else None,
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _override_of(name: str, pruning: Pruning) -> Override | None:
    matching = [override for override in pruning.overrides if _matches(name, override.layers)]
    return matching[-1] if matching else None


def _check_patterns(key: str, patterns: Sequence[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"{key}: the pattern {pattern!r} matches no convolution (transposed ones can't be "
                f"pruned) or linear layer of the model; nearest: "
                f"{', '.join(nearest) or 'it has none'}"
            )


def _overridable(
    selected: Mapping[str, nn.Module], pruning: Pruning, override: Override
) -> dict[str, nn.Module]:
    """The selected layers but for those that stay dense under the override, unasked by it."""
    return {
        name: module
        for name, module in selected.items()
        if override.pointwise == "none" or _planned(name, module, pruning, override) is not None
    }


def _check_selected(key: str, patterns: Sequence[str], selected: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in selected):
            raise ValueError(
                f"{key}: the pattern {pattern!r} matches only layers that are not selected "
                f"(`exclude`, `fc: none`, `pointwise: none`, or depthwise): select them by "
                f"`include`, or drop it"
            )


def _check_weight(name: str, module: nn.Module) -> None:
    try:
        weight = layer_weight(module)
    except ValueError as error:  # it is computed, as by weight_norm
        raise ValueError(f"layer {name}: {error}; leave it out by `exclude`") from None
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"layer {name} has no values yet: run a forward pass first")


def _check_unshared(model: nn.Module, layers: Sequence[PrunedLayer]) -> None:
    """A mask on one of two modules would not hold in the other."""
    users: dict[int, list[str]] = {}
    for name, module in unwrap(model).named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(clean_name(name))
    for layer in layers:
        others = [name for name in users[id(layer_weight(layer.module))] if name != layer.name]
        if others:
            raise ValueError(
                f"layer {layer.name} shares its weight with {', '.join(others)}, where its mask "
                f"would not hold: leave them out by `exclude`"
            )
