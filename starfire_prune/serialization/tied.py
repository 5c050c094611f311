"""Tensors of a model that share their memory, and contents that would not fit in it together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["check_tied"]


def check_tied(targets: Mapping[str, Tensor], content: Callable[[str], Tensor]) -> None:
    """Refuse contents that tensors of one memory can't have, such as two masks of a tied weight.

    Args:
        targets: a model's own tensors, by name; nothing is written to them.
        content: what a tensor of that name shall hold, of its shape; asked for where tensors share
            their memory.

    Raises:
        ValueError: naming two tensors, if the later one's content would overwrite the earlier's.
    """
    for names in _sharing(targets):
        held = {name: content(name) for name in names}
        scratch = _scratch([targets[name] for name in names])
        views = dict(zip(names, scratch, strict=True))
        for name in names:
            views[name].copy_(held[name])
        wrong = [name for name in names if not _same_bits(views[name], held[name])]
        if wrong:
            raise ValueError(
                f"tensors {wrong[0]!r} and {names[-1]!r} differ, and share their memory in the "
                f"model: one of them was pruned alone; load it into a model that does not share "
                f"them"
            )


def _sharing(targets: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """The names of tensors that lie in one memory, where there are several."""
    by_memory: dict[tuple[torch.device, int], list[str]] = {}
    for name, tensor in targets.items():
        if tensor.numel():
            memory = tensor.device, tensor.untyped_storage().data_ptr()
            by_memory.setdefault(memory, []).append(name)
    return (names for names in by_memory.values() if len(names) > 1)


def _scratch(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors on the CPU that share a memory of their own as these do theirs."""
    size = tensors[0].untyped_storage().nbytes()
    memory = torch.empty(size, dtype=torch.uint8)
    return [
        memory[: size // each.element_size() * each.element_size()]
        .view(each.dtype)
        .as_strided(each.shape, each.stride(), each.storage_offset())
        for each in tensors
    ]


def _same_bits(view: Tensor, content: Tensor) -> bool:
    """Whether a tensor holds a content, in its own dtype."""
    wanted = content.to(view.dtype).contiguous()
    return torch.equal(view.contiguous().view(torch.uint8), wanted.view(torch.uint8))
