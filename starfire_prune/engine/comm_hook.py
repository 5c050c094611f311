"""A DDP communication hook that all-reduces only the gradients of unpruned weights.

In the fixed phase every rank has the same masks, and the gradients of pruned weights are zero. So
only values are sent, without their positions, and the average is exact.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.futures import Future

from starfire_prune.engine.pruner import Pruner
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight

__all__ = ["MaskedAllreduceState", "masked_allreduce_hook"]


# Some builds of torch have no distributed package. DDP compares the annotation itself.
_GradBucket: Any = getattr(distributed, "GradBucket", object)
_INT32_POSITIONS = 2**31


class MaskedAllreduceState:
    """The state of `masked_allreduce_hook`: the pruner, whose phase decides what is sent.

    Args:
        pruner: Pruner of the model that DDP wraps.
        process_group: Process group that averages: DDP's own if it has one; None is the default
            group.

    Example:
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> def wrapped(model, pruner):
        ...     ddp = DistributedDataParallel(model)
        ...     ddp.register_comm_hook(MaskedAllreduceState(pruner), masked_allreduce_hook)
        ...     return ddp
    """

    def __init__(
        self, pruner: Pruner, process_group: "distributed.ProcessGroup | None" = None
    ) -> None:
        self.pruner = pruner
        self.process_group = process_group
        self._indices: dict[tuple[int, ...], _Index] = {}

    @property
    def index_bytes(self) -> int:
        """Memory of the positions of kept gradients, four bytes each; 0 until the fixed phase."""
        return sum(index.kept.nbytes for index in self._indices.values() if index.kept is not None)

    def kept_in(self, bucket: _GradBucket) -> Tensor | None:
        """The positions of a bucket's kept gradients in its buffer, `(kept,)`; None for all.

        They are computed once for the same parameters in the same order, and checked at their
        first use.

        Raises:
            PruningError: With the parameter's name, if a gradient that would be dropped is not
                zero.
        """
        if self.pruner.phase != "fixed":
            self._indices.clear()
            return None
        parameters = bucket.parameters()
        masks = self._masks_of(parameters)
        key = tuple(map(id, parameters))
        index = self._indices.get(key)
        if index is None or not index.is_of(masks):
            index = self._indexed(key, parameters, masks)
        if index.kept is not None and not index.is_checked:
            dropped = bucket.buffer().index_fill(0, index.kept.long(), 0.0)
            index.is_checked = self._check_dropped(index, dropped)
        return index.kept

    def _masks_of(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        masks = self.pruner.masks().values()
        layers = self.pruner.layers.values()
        by_weight = {
            id(layer_weight(layer.module)): mask for layer, mask in zip(layers, masks, strict=True)
        }
        return [by_weight.get(id(parameter)) for parameter in parameters]

    def _indexed(
        self, key: tuple[int, ...], parameters: list[Tensor], masks: list[Tensor | None]
    ) -> "_Index":
        """A new index; it replaces those of the buckets that its parameters were in before."""
        index = _Index(parameters, masks, _kept_positions(parameters, masks))
        others = [known for known in self._indices.items() if not set(key).intersection(known[0])]
        self._indices = {**dict(others), key: index}
        return index

    def _check_dropped(self, index: "_Index", dropped: Tensor) -> bool:
        """Whether all dropped gradients are zero, and none is NaN.

        Masking turns an infinite gradient, which a scaled loss may have, into NaN, so that it can't
        be told from a gradient of a pruned weight that should be zero.
        """
        unknown = dropped.isnan()
        wrong = dropped.ne(0.0) & ~unknown
        if bool(wrong.any()):
            raise PruningError(self._message(index, wrong))
        return not bool(unknown.any())

    def _message(self, index: "_Index", wrong: Tensor) -> str:
        parts = torch.split(wrong, [parameter.numel() for parameter in index.parameters])
        place = next(number for number, part in enumerate(parts) if part.any())
        name = next(key for key, mask in self.pruner.masks().items() if mask is index.masks[place])
        return (
            f"{name} has {int(parts[place].sum())} gradients of pruned weights that are not zero, "
            f"which the masked all-reduce would drop: zero the gradients after each update, and "
            f"let nothing but the backward pass write to them"
        )


def masked_allreduce_hook(
    state: MaskedAllreduceState,
    bucket: _GradBucket,
) -> Future[Tensor]:
    """Average a bucket of gradients over all ranks; in the fixed phase, send only kept ones.

    A communication hook of DDP, registered once: in the dense phase and the era it sends all
    gradients, as DDP does without a hook. Compose it with
    `torch.distributed.algorithms.ddp_comm_hooks.default_hooks.bf16_compress_wrapper`.

    Args:
        state: The state, made of the model's pruner.
        bucket: Bucket that DDP passes; its buffer has shape `(gradients,)`, with the gradients of
            each parameter in the memory order of the parameter.

    Returns:
        A future of the buffer, averaged in place; gradients of pruned weights are zero in it.

    Raises:
        PruningError: With the parameter's name, if a gradient that would be dropped is not zero.

    Example:
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> def wrapped(model, pruner):
        ...     ddp = DistributedDataParallel(model)
        ...     ddp.register_comm_hook(MaskedAllreduceState(pruner), masked_allreduce_hook)
        ...     return ddp
    """
    buffer: Tensor = bucket.buffer()
    kept = state.kept_in(bucket)
    if kept is None:
        return _averaged(buffer, state.process_group)

    def filled(values: Future[Tensor]) -> Tensor:
        return _scatter(buffer, kept, values.value())

    return _averaged(_gather(buffer, kept), state.process_group).then(filled)


def _gather(buffer: Tensor, kept: Tensor) -> Tensor:
    return buffer.index_select(0, kept)


def _scatter(buffer: Tensor, kept: Tensor, values: Tensor) -> Tensor:
    """Write the averages to their places and zero elsewhere, where a rank may have NaN."""
    return buffer.zero_().index_add_(0, kept, values)  # index_copy_ only takes int64


def _averaged(values: Tensor, group: "distributed.ProcessGroup | None") -> Future[Tensor]:
    """The mean of `values` over the ranks, in place, by the same operations as DDP."""
    values.mul_(1.0 / distributed.get_world_size(group))
    work = distributed.all_reduce(values, group=group, async_op=True)
    future: Future[list[Tensor]] = work.get_future()
    return future.then(_first)


def _first(tensors: Future[list[Tensor]]) -> Tensor:
    return tensors.value()[0]


# --- the positions of kept gradients ---------------------------------------------------------


@dataclasses.dataclass
class _Index:
    """The positions of the kept gradients of a bucket.

    Attributes:
        parameters: Parameters of the bucket, held so that no other ones get their ids.
        masks: Mask of each parameter, None if it is not pruned.
        kept: Positions in the buffer, `(kept,)`, int32 if they fit; None if nothing is pruned.
        is_checked: Whether the gradients that it drops were found to be zero.
    """

    parameters: list[Tensor]
    masks: list[Tensor | None]
    kept: Tensor | None
    is_checked: bool = False

    def is_of(self, masks: Sequence[Tensor | None]) -> bool:
        """Whether it was made from these masks."""
        return all(own is other for own, other in zip(self.masks, masks, strict=True))


def _kept_positions(parameters: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    flat = torch.cat(list(itertools.starmap(_in_memory_order, zip(parameters, masks, strict=True))))
    dtype = torch.int32 if flat.numel() < _INT32_POSITIONS else torch.int64
    return flat.nonzero().flatten().to(dtype)


def _in_memory_order(parameter: Tensor, mask: Tensor | None) -> Tensor:
    """A mask in the order that the gradient has in DDP's buffer, bool `(numel,)`.

    The buffer keeps the parameter's strides if the parameter is dense in memory, and is row-major
    otherwise. Without a mask all entries are ones.
    """
    if mask is None:
        return parameter.new_ones(parameter.numel(), dtype=torch.bool)
    laid = torch.empty_like(parameter, dtype=torch.bool)  # dense, with its strides if it is dense
    if laid.stride() != parameter.stride():
        laid = laid.contiguous()
    return laid.copy_(mask).as_strided((laid.numel(),), (1,))
