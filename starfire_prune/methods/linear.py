"""Pruning methods for linear layers, and the functions of the same names."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from starfire_prune import masks
from starfire_prune.masks import Units
from starfire_prune.methods.base import LINEAR, MaskMethod, ModuleT, of_layer
from starfire_prune.methods.options import BlockSize, Then
from starfire_prune.methods.parameters import masked_parameter
from starfire_prune.methods.registry import register_method

__all__ = ["FCBlock", "FCFine", "FCStructured", "fc_block", "fc_fine", "fc_structured"]

_BLOCK_SIZE = "[out, in]: neighbouring output and input features that are pruned together"


@register_method("fine")
@dataclasses.dataclass(eq=False, kw_only=True)
class FCFine(MaskMethod):
    """Prune single weights of a linear weight; see `masks.fc_fine_mask`."""

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = LINEAR

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.fc_fine_mask(t, self.amount, mask=default_mask)

    def units(self, shape: torch.Size) -> Units:
        return masks.fc_fine_units(shape)


@register_method("block")
@dataclasses.dataclass(eq=False, kw_only=True)
class FCBlock(MaskMethod):
    """Prune blocks of a linear weight; see `masks.fc_block_mask`."""

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = LINEAR

    block_size: Annotated[BlockSize, Field(description=_BLOCK_SIZE)] = (4, 4)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        return masks.fc_block_mask(t, self.amount, mask=default_mask, block_size=self.block_size)

    def units(self, shape: torch.Size) -> Units:
        return masks.fc_block_units(shape, block_size=self.block_size)

    def detail(self, shape: torch.Size) -> str:
        return f"{list(self.block_size)}"


@register_method("dead_inputs")
@dataclasses.dataclass(eq=False, kw_only=True)
class FCStructured(MaskMethod):
    """Prune the columns of a linear weight that read zeros; see `masks.fc_structure_mask`.

    A convolution that reads its whole input at once is pruned as the linear layer that it stands
    for: then `flatten` is true, and each input channel has as many columns as a kernel has weights.
    """

    applies_to: ClassVar[tuple[type[nn.Module], ...]] = LINEAR
    reads_zero_inputs: ClassVar[bool] = True

    then: Annotated[
        Then, Field(description="how weights are pruned beyond the columns that read zeros")
    ] = "fine"
    block_size: Annotated[BlockSize, Field(description=f"with then: block: {_BLOCK_SIZE}")] = (4, 4)
    columns: Tensor | None = dataclasses.field(
        default=None, repr=False, metadata={"of_layer": True}
    )
    flatten: bool = of_layer(False)

    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        if not self.flatten:
            return self._mask(t, self.columns, default_mask)
        size = math.prod(t.shape[2:])
        columns = None if self.columns is None else self.columns.repeat_interleave(size)
        mask = None if default_mask is None else default_mask.flatten(1)
        return self._mask(t.flatten(1), columns, mask).view(t.shape)

    def _mask(self, weight: Tensor, columns: Tensor | None, mask: Tensor | None) -> Tensor:
        return masks.fc_structure_mask(
            weight,
            self.amount,
            columns,
            mask=mask,
            then=self.then,
            block_size=self.block_size,
        )

    def units(self, shape: torch.Size) -> Units:
        return masks.fc_fine_units(shape)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        weights = self.units(shape)
        in_columns = 0 if self.columns is None else shape[0] * int(self.columns.sum())
        return (*super().counts(shape), (weights.pruned(in_columns), weights.size))

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if "block_size" in options and options.get("then", "fine") != "block":
            yield "block_size", "has no effect with then fine"


def fc_block(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
    block_size: tuple[int, int] = (4, 4),
) -> ModuleT:
    """Prune blocks of a linear layer by their sum of magnitudes (Figure 2d).

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes. The best
    block of each row of blocks is protected, and the largest weight of an output neuron whose
    protected block an earlier method has emptied, so the total may stay below the count.

    Args:
        module: A linear layer.
        name: Name of the parameter, of shape `(out_features, in_features)`.
        amount: Total share in [0, 1], or number, of the layer's blocks that is zero afterwards. A
            block of which an earlier method has pruned single weights only doesn't count.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.
        block_size: Numbers of neighbouring `(output, input)` features of a block.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> linear = fc_block(nn.Linear(16, 8), amount=0.5)
        >>> int(linear.weight_mask.sum())
        64
    """
    FCBlock.apply(module, name, amount, importance_scores=importance_scores, block_size=block_size)
    return module


def fc_fine(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    importance_scores: Tensor | None = None,
) -> ModuleT:
    """Prune single weights of a linear layer (Figure 2c).

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes. The largest
    weight of each output neuron is protected, so the total may stay below the count.

    Args:
        module: A linear layer.
        name: Name of the parameter, of shape `(out_features, in_features)`.
        amount: Total share in [0, 1], or number, of the layer's weights that is zero
            afterwards. Zeros of earlier methods count.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`; nothing has changed then.

    Example:
        >>> linear = fc_fine(nn.Linear(16, 8), amount=0.75)
        >>> int(linear.weight_mask.sum())
        32
    """
    FCFine.apply(module, name, amount, importance_scores=importance_scores)
    return module


def fc_structured(
    module: ModuleT,
    name: str = "weight",
    amount: float | None = None,
    *,
    previous: nn.Module,
    importance_scores: Tensor | None = None,
    then: Then = "fine",
    block_size: tuple[int, int] = (4, 4),
) -> ModuleT:
    """Prune what a linear layer reads from dead channels, then single weights or blocks (Figure 3).

    The columns that read an output channel of `previous` whose weights are all zero are pruned
    first, and count towards the amount. The caller has to make sure that such a channel is zero
    where the linear layer reads it: `previous` must have no bias, or be followed by an operation
    that maps it to zero, and a batch norm in between gives a constant of its own, which a ReLU maps
    to zero only if it is negative. `ChannelAnalysis.zero_inputs` checks that for a whole model.

    Modifies module in place (and also returns it) as `MaskMethod.apply` describes. Every output
    neuron keeps a weight, so the total may stay below the count.

    Args:
        module: A linear layer.
        name: Name of the parameter, of shape `(out_features, in_features)`.
        amount: Total share in [0, 1], or number, of the layer's weights that is zero
            afterwards. Zeros of earlier methods count.
        previous: The layer whose output it reads, possibly flattened: `in_features` must be a
            multiple of its output channels.
        importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
            place.
        then: `"fine"` or `"block"`: how further weights are pruned.
        block_size: Numbers of neighbouring `(output, input)` features of a block.

    Raises:
        AttributeError, TypeError, ValueError: As `MaskMethod.apply`, and if the layers don't fit;
            nothing has changed then.

    Example:
        >>> conv = nn.Conv2d(3, 4, 3, bias=False)
        >>> with torch.no_grad():
        ...     conv.weight[1] = 0
        >>> linear = fc_structured(nn.Linear(36, 8), amount=0.5, previous=conv)
        >>> int(linear.weight_mask[:, 9:18].sum()), int(linear.weight_mask.sum())
        (0, 144)
    """
    FCStructured.apply(
        module,
        name,
        amount,
        importance_scores=importance_scores,
        columns=_dead_columns(module, name, previous),
        then=then,
        block_size=block_size,
    )
    return module


def _dead_columns(module: nn.Module, name: str, previous: nn.Module) -> Tensor | None:
    """The columns of a linear weight that read output channels without a weight."""
    weight = module._parameters.get(f"{name}_orig", module._parameters.get(name))
    if weight is None or weight.ndim != 2:
        return None  # `apply` raises the error
    dead = ~masked_parameter(previous, "weight").flatten(1).any(1)
    if weight.shape[1] % len(dead):
        raise ValueError(
            f"`in_features` (={weight.shape[1]}) must be a multiple of the output channels of "
            f"`previous` (={len(dead)}): each feeds as many columns, as after flattening"
        )
    return dead.repeat_interleave(weight.shape[1] // len(dead))
