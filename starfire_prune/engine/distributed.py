"""Pruning on several ranks: equal masks, buffers without broadcasts, sharded parameters."""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from starfire_prune.utils.errors import RanksError
from starfire_prune.utils.modules import unwrap

__all__ = [
    "broadcast_from_first",
    "compare_across_ranks",
    "hash_of_masks",
    "keep_buffers_from_ddp",
    "refuse_sharded",
]


def compare_across_ranks(
    digest: Callable[[], str], what: str, device: torch.device, reason: str
) -> None:
    """Raise on every rank if `digest()`, a hexadecimal hash, is not the same on all of them.

    Args:
        digest: Function that hashes what has to be equal; it isn't called in a single process.
        what: Name of what is compared, in the plural, for the error.
        device: Device of the tensors that the process group sends.
        reason: The cause of such a difference, or what to do about it.

    Raises:
        RanksError: With the ranks that differ from rank 0.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    own = torch.tensor(list(bytes.fromhex(digest())), dtype=torch.uint8, device=device)
    digests = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(digests, own)
    differing = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if differing:
        raise RanksError(
            f"the {what} of rank(s) {', '.join(map(str, differing))} differ from those of rank 0: "
            f"{reason}"
        )


def hash_of_masks(masks: Mapping[str, Tensor]) -> str:
    """A SHA-256 of bool masks by parameter name, on any device."""
    digest = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        digest.update(name.encode())
        digest.update(np.packbits(mask.contiguous().cpu().numpy()).tobytes())
    return digest.hexdigest()


def broadcast_from_first(bools: Iterable[Tensor], device: torch.device) -> None:
    """Overwrite bool tensors by those of rank 0, in one broadcast.

    Args:
        bools: Tensors of the same shapes on every rank.
        device: Device of the tensors that the process group sends.
    """
    bools = list(bools)
    if not bools or not distributed.is_available() or not distributed.is_initialized():
        return
    sent = torch.cat([own.flatten() for own in bools]).to(device, torch.uint8)
    distributed.broadcast(sent, src=0)
    for own, first in zip(bools, torch.split(sent, [own.numel() for own in bools]), strict=True):
        own.copy_(first.view(own.shape))


def keep_buffers_from_ddp(model: nn.Module, layers: Iterable[nn.Module], buffer: str) -> None:
    """Exclude a buffer of these layers from DDP's broadcasts, before or after DDP wraps the model.

    DDP broadcasts all buffers at each forward pass, and identifies them by their names in the
    module that it wraps, which may be a compiled one.
    """
    module = unwrap(model)
    chosen = {id(layer) for layer in layers}
    names = [
        f"{prefix}{name}.{buffer}" if name else f"{prefix}{buffer}"
        for name, part in module.named_modules()
        if id(part) in chosen
        for prefix in ("", "_orig_mod.")
    ]
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    module._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment]
    if isinstance(model, DistributedDataParallel):
        model.parameters_to_ignore.update(names)


def refuse_sharded(model: nn.Module) -> None:
    """Raise an error for a model under FSDP.

    Raises:
        ValueError: If it is wrapped by FSDP or has sharded parameters.
    """
    sharded = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if sharded or any(hasattr(weight, "_local_tensor") for weight in model.parameters()):
        raise ValueError(
            "the model's parameters are sharded (FSDP): a rank sees a part of each weight and "
            "can't rank it; train it under DistributedDataParallel"
        )
