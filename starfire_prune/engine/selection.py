"""Which layers of a model are pruned, and how: a recipe's settings applied to its modules."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.engine.calls import read_without_call
from starfire_prune.engine.obstacles import (
    Obstacle,
    amount_obstacle,
    sharing_modules,
    weight_obstacle,
)
from starfire_prune.engine.settings import Override, Pruning
from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.registry import METHODS, method_class, method_name
from starfire_prune.methods.schedules import Schedule
from starfire_prune.utils.modules import is_depthwise, layer_weight, prunable_layers

__all__ = ["PrunedLayer", "Selection", "select_layers"]


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


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a recipe's settings come to in a model.

    Attributes:
        layers: The layers that are pruned, in the model's order.
        left_out: The layers that only `*` selects and that can't be pruned, each with the reason.
        calls_are_known: Whether a forward pass has shown which layers the model calls.
    """

    layers: tuple[PrunedLayer, ...]
    left_out: Mapping[str, str]
    calls_are_known: bool


def _stands_for_linear(layer: PrunedLayer) -> bool:
    """Whether a convolution is pruned as the linear layer that it stands for."""
    return bool(getattr(layer.method, "flatten", False))


def select_layers(
    model: nn.Module,
    pruning: Pruning,
    connected: Collection[str] = (),
    example_input: Tensor | tuple[Any, ...] | None = None,
) -> Selection:
    """The layers of `model` that `pruning` selects, in the model's order.

    These are all convolutions and linear layers that match `include` and not `exclude`. Depthwise
    convolutions are selected only if a pattern of `include` other than `*` matches them; their
    kernels compete in the layer. An override applies to the selected layers that it matches; if
    several match, the last one applies.

    A layer that can't be pruned as asked is an error if a pattern other than `*`, of `include` or
    of an override, matches it. If only `*` selects it, it is left out, and so is a frozen layer.

    Args:
        model: The model, also wrapped by DDP or `torch.compile`.
        pruning: The settings.
        connected: Names of the convolutions that are pruned as linear layers.
        example_input: A small batch, or the tuple of the model's arguments, to see which layers
            the model calls.

    Raises:
        ValueError: For a pattern that matches no layer (transposed convolutions can't be pruned),
            an override of layers that are not selected or of another kind than its method, a
            selection of no layer at all, and, in one error, all layers that patterns name and that
            can't be pruned: their method would prune them completely or doesn't fit their shape,
            or a mask would not hold in what the model computes.
    """
    candidates = prunable_layers(model)
    for key in ("include", "exclude"):
        _check_patterns(f"pruning.{key}", getattr(pruning, key), candidates)
    selected = _selected(candidates, pruning)
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
    for layer in layers:
        _check_kind(layer)
    uncalled = _uncalled(model, layers, example_input)
    obstacles = _obstacles(model, pruning, layers, uncalled or ())
    chosen = tuple(layer for layer in layers if layer.name not in obstacles)
    _check_obstacles(obstacles, pruning, is_empty=not chosen)
    left_out = {name: obstacle.reason for name, obstacle in obstacles.items()}
    return Selection(chosen, left_out, calls_are_known=uncalled is not None)


def _selected(candidates: Mapping[str, nn.Module], pruning: Pruning) -> dict[str, nn.Module]:
    """The layers that `include`, `exclude` and `fc` select."""
    named = [pattern for pattern in pruning.include if pattern != "*"]
    return {
        name: module
        for name, module in candidates.items()
        if _matches(name, pruning.include)
        and not _matches(name, pruning.exclude)
        and not (isinstance(module, nn.Linear) and pruning.fc == "none")
        and (not is_depthwise(module) or _matches(name, named))
    }


def _uncalled(
    model: nn.Module,
    layers: Iterable[PrunedLayer],
    example_input: Tensor | tuple[Any, ...] | None,
) -> Collection[str] | None:
    """The layers whose weights are read without a call; None if no forward pass can show it."""
    if example_input is None:
        return None
    return read_without_call(model, [layer.name for layer in layers], example_input)


def _obstacles(
    model: nn.Module, pruning: Pruning, layers: Iterable[PrunedLayer], uncalled: Collection[str]
) -> dict[str, Obstacle]:
    """What keeps layers from being pruned, by the layer's name."""
    users = sharing_modules(model)
    found = {}
    for layer in layers:
        named = _is_named(layer.name, pruning)
        obstacle = weight_obstacle(layer, users, uncalled, named=named) or amount_obstacle(layer)
        if obstacle is not None:
            found[layer.name] = obstacle
    return found


def _check_obstacles(
    obstacles: Mapping[str, Obstacle], pruning: Pruning, *, is_empty: bool
) -> None:
    """Raise ValueError for what patterns name, for all if no layer is left, and for no layer."""
    errors = [
        obstacle.error
        for name, obstacle in obstacles.items()
        if is_empty or _is_named(name, pruning)
    ]
    if errors:
        raise ValueError("\n".join(errors))
    if is_empty:
        raise ValueError(
            "pruning selects no layer: the model has no convolution or linear layer that "
            "`include` matches and that `exclude`, `pointwise` and `fc` don't leave dense"
        )


def _is_named(name: str, pruning: Pruning) -> bool:
    """Whether a pattern other than `*`, of `include` or of an override, matches a layer."""
    patterns = (pruning.include, *(override.layers for override in pruning.overrides))
    return any(_matches(name, [pattern]) for own in patterns for pattern in own if pattern != "*")


def _check_kind(layer: PrunedLayer) -> None:
    """Raise ValueError if the method is not one for this kind of layer."""
    module = layer.module
    if isinstance(module, layer.method.applies_to) or _stands_for_linear(layer):
        return
    fitting = [key for key, own in METHODS.items() if isinstance(module, own.applies_to)]
    raise ValueError(
        f"layer {layer.name} ({type(module).__name__}) can't be pruned by "
        f"{layer.method_name}: give it one of {', '.join(fitting)}"
    )


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
