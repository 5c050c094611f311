"""Which layers of a model are pruned, and how: a recipe's settings applied to its modules."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from starfire_prune.engine.settings import Override, Pruning
from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.registry import METHODS, method_class, method_name
from starfire_prune.methods.schedules import Schedule
from starfire_prune.utils.modules import (
    clean_name,
    is_depthwise,
    layer_weight,
    prunable_layers,
    unwrap,
)

__all__ = ["PrunedLayer", "select_layers"]


@dataclasses.dataclass(frozen=True)
class PrunedLayer:
    """A layer that is pruned, and how.

    Attributes:
        name: Name of the module, without prefixes of DDP and `torch.compile`.
        module: The convolution or linear layer; its parameter `weight` is pruned.
        method: The pruning method with its target amount, a share in (0, 1].
        schedule: Function from the progress of the era to the share of the target.
    """

    name: str
    module: nn.Module
    method: MaskMethod
    schedule: Schedule

    @property
    def method_name(self) -> str:
        """The name of the method in recipes."""
        return method_name(type(self.method))

    @property
    def amount(self) -> float:
        """The target, a share in (0, 1]."""
        return self.method.amount

    @property
    def shape(self) -> torch.Size:
        """The shape of the layer's weight."""
        return layer_weight(self.module).shape

    def method_at(self, progress: float) -> MaskMethod:
        """The pruning method with its amount at a progress of the era in [0, 1]."""
        return self.method.at(progress, self.schedule)

    def with_zero_inputs(self, columns: Tensor) -> PrunedLayer:
        """The layer with the input channels that are zero, bool of shape `(C,)`."""
        method = dataclasses.replace(self.method, columns=columns)  # type: ignore[call-arg]
        return dataclasses.replace(self, method=method)

    def check(self) -> None:
        """Raise ValueError if the method doesn't fit the layer, or would prune all its weights."""
        name = self.method_name
        if not isinstance(self.module, self.method.applies_to) and not _stands_for_linear(self):
            fitting = [
                key for key, own in METHODS.items() if isinstance(self.module, own.applies_to)
            ]
            raise ValueError(
                f"layer {self.name} ({type(self.module).__name__}) can't be pruned by "
                f"{name}: give it one of {', '.join(fitting)}"
            )
        if isinstance(self.module, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"layer {self.name} is the output projection of nn.MultiheadAttention, which uses "
                f"its weight without calling it, so that no hook can mask it: leave it out by "
                f"`exclude`"
            )
        try:
            counts = self.method_at(1.0).counts(self.shape)
        except ValueError as error:
            raise ValueError(
                f"layer {self.name} of shape {tuple(self.shape)} can't be pruned by {name}: "
                f"{error}; or leave it out by `exclude`"
            ) from None
        if any(pruned == units for pruned, units in counts):
            raise ValueError(
                f"layer {self.name} of shape {tuple(self.shape)} would lose all its weights by "
                f"{name} at amount {self.amount}: lower its amount by an override, or leave "
                f"it out by `exclude`"
            )


def _stands_for_linear(layer: PrunedLayer) -> bool:
    """Whether a convolution is pruned as the linear layer that it stands for."""
    return bool(getattr(layer.method, "flatten", False))


def select_layers(
    model: nn.Module, pruning: Pruning, connected: Collection[str] = ()
) -> list[PrunedLayer]:
    """The layers of `model` that `pruning` selects, in the model's order.

    These are all convolutions and linear layers that match `include` and not `exclude`. Depthwise
    convolutions are selected only if a pattern of `include` other than `*` matches them; their
    kernels compete in the layer. An override applies to the selected layers that it matches; if
    several match, the last one applies.

    Args:
        model: The model, also wrapped by DDP or `torch.compile`.
        pruning: The settings.
        connected: Names of the convolutions that are pruned as linear layers.

    Raises:
        ValueError: For a pattern that matches no layer (transposed convolutions can't be pruned),
            an override of layers that are not selected, a selected layer that its method can't
            prune or would prune completely, one that shares its weight with another module or has
            no weight of its own, and a selection of no layer at all.
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
    _check_override_options(pruning, layers)
    if not layers:
        raise ValueError(
            "pruning selects no layer: the model has no convolution or linear layer that "
            "`include` matches and that `exclude`, `pointwise` and `fc` don't leave dense"
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
    """The layer with its method, or None if `pointwise: none` leaves it dense."""
    is_linear = connected or isinstance(module, nn.Linear)
    section = pruning.fc if is_linear and pruning.fc != "none" else pruning
    method, amount, options = section.method, section.amount or pruning.amount, section.options
    if override is not None:
        own = {key: value for key, value in override.options.items() if value is not None}
        amount = override.amount or amount
        if override.method is None:
            options |= {key: value for key, value in own.items() if key in options}
        else:
            method, options = override.method, own
    mask_method = method_class(method)(amount, **options).for_layer(name, module)
    if mask_method is None:
        return None
    if connected and mask_method.reads_zero_inputs and hasattr(mask_method, "flatten"):
        mask_method = dataclasses.replace(mask_method, flatten=True)  # type: ignore[call-arg]
    return PrunedLayer(name, module, mask_method, pruning.schedule_function)


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
    """The selected layers except those that the settings, not the override, leave dense."""
    leaves_dense = override.options.get("pointwise") == "none"
    return {
        name: module
        for name, module in selected.items()
        if leaves_dense or _planned(name, module, pruning, override) is not None
    }


def _check_selected(key: str, patterns: Sequence[str], selected: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in selected):
            raise ValueError(
                f"{key}: the pattern {pattern!r} matches only layers that are not selected "
                f"(`exclude`, `fc: none`, `pointwise: none`, or depthwise): select them by "
                f"`include`, or drop it"
            )


def _check_override_options(pruning: Pruning, layers: Sequence[PrunedLayer]) -> None:
    """Raise ValueError for an option of an override that none of its layers' methods has."""
    for index, override in enumerate(pruning.overrides):
        if override.method is not None:
            continue
        matched = [layer for layer in layers if _override_of(layer.name, pruning) is override]
        for option, value in override.options.items():
            if matched and value is not None and not any(_has(layer, option) for layer in matched):
                names = ", ".join(dict.fromkeys(layer.method_name for layer in matched))
                raise ValueError(
                    f"pruning.overrides.{index}.{option} has no effect: the layers that it "
                    f"matches are pruned by {names}; remove it, or give the override a method"
                )


def _has(layer: PrunedLayer, option: str) -> bool:
    """Whether an option has an effect on a layer."""
    # `pointwise` has made window pruning of a 1x1 convolution ck already
    return option in vars(layer.method) or option == "pointwise"


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
