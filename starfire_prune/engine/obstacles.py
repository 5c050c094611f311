"""Why a layer can't be pruned as its settings ask."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from starfire_prune.engine.computed import zeros_problem
from starfire_prune.utils.modules import clean_name, layer_weight, unwrap
from starfire_prune.utils.text import first_few

if TYPE_CHECKING:
    from starfire_prune.engine.selection import PrunedLayer

__all__ = ["Obstacle", "amount_obstacle", "log_left_out", "sharing_modules", "weight_obstacle"]

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Why a layer can't be pruned.

    Attributes:
        reason: A clause, in which `it` is the layer.
        error: The complete sentence of an error, with the layer's name and what to do.
    """

    reason: str
    error: str


def weight_obstacle(
    layer: PrunedLayer,
    users: Mapping[int, list[str]],
    uncalled: Collection[str],
    *,
    named: bool,
) -> Obstacle | None:
    """What about a layer's weight rules out that a mask holds in what the model computes.

    Args:
        layer: The layer.
        users: The modules that hold a parameter, by the parameter's id.
        uncalled: Names of the layers whose weights are read without a call.
        named: Whether the settings name the layer, so that it is pruned also if it is frozen.

    Raises:
        ValueError: For a lazy layer that has no weight yet.
    """
    name, module = layer.name, layer.module
    try:
        weight = layer_weight(module)
    except ValueError as error:  # it is computed, as by weight_norm
        return Obstacle(
            "its weight is computed from other parameters",
            f"layer {name}: {error}; leave it out by `exclude`",
        )
    if isinstance(weight, UninitializedParameter):
        raise ValueError(f"layer {name} has no values yet: run a forward pass first")
    if isinstance(module, NonDynamicallyQuantizableLinear) or name in uncalled:
        return _uncalled(name, module)
    if weight.is_complex() or not weight.is_floating_point():
        return Obstacle(
            f"its weight has dtype {weight.dtype}",
            f"layer {name} has a weight of dtype {weight.dtype}, and only real floating-point "
            f"weights are ranked: leave it out by `exclude`",
        )
    if not weight.requires_grad and not named:
        return Obstacle(
            "its weight is frozen",
            f"layer {name} has a frozen weight (requires_grad=False): name it in `include` to "
            f"prune it all the same",
        )
    others = [other for other in users[id(weight)] if other != name]
    if others:
        return Obstacle(
            "its weight is shared with another module",
            f"layer {name} shares its weight with {', '.join(others)}, where its mask "
            f"would not hold: leave them out by `exclude`",
        )
    problem = zeros_problem(module)
    if problem is None:
        return None
    return Obstacle(
        f"it {problem}",
        f"layer {name} ({type(module).__name__}) {problem}: leave it out by `exclude`",
    )


def amount_obstacle(layer: PrunedLayer) -> Obstacle | None:
    """Why the method can't prune a layer of this shape, or would prune all of it."""
    name, method, shape = layer.name, layer.method_name, tuple(layer.shape)
    try:
        counts = layer.method_at(1.0).counts(layer.shape)
    except ValueError as error:
        return Obstacle(
            f"{method} can't prune a weight of its shape",
            f"layer {name} of shape {shape} can't be pruned by {method}: {error}; or leave it out "
            f"by `exclude`",
        )
    if not any(pruned == units for pruned, units in counts):
        return None
    return Obstacle(
        f"it would lose all its weights by {method} at amount {layer.amount}",
        f"layer {name} of shape {shape} would lose all its weights by {method} at amount "
        f"{layer.amount}: lower its amount by an override, or leave it out by `exclude`",
    )


def sharing_modules(model: nn.Module) -> Mapping[int, list[str]]:
    """The names of the modules that hold each parameter, by the parameter's id."""
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in unwrap(model).named_modules():
        for parameter in module._parameters.values():
            users[id(parameter)].append(clean_name(name))
    return users


def log_left_out(left_out: Mapping[str, str]) -> None:
    """Warn of the layers that are left out, in a line for each reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_out.items():
        names[reason].append(name)
    for reason, layers in names.items():
        _LOGGER.warning("%s: not pruned, because %s", first_few(layers), reason)


def _uncalled(name: str, module: nn.Module) -> Obstacle:
    what = "has its weight read by the model without being called"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        what = (
            "is the output projection of nn.MultiheadAttention, which uses its weight without "
            "calling it"
        )
    return Obstacle(
        "its weight is read without calling it",
        f"layer {name} {what}, so that no hook can mask it: leave it out by `exclude`",
    )
