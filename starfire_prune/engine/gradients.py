"""Masking of gradients before anything else reads them.

A hook of a tensor returns the gradient that replaces its gradient. Computing it out of place
allocates memory for each weight again; in place it would change whatever shares the gradient's
memory, such as the gradient of the other operand of an addition. So a gradient is masked in place
if nothing else refers to its memory, according to torch's reference counts. These are not public:
where a version of torch lacks them or counts differently, all gradients are masked out of place.

The public `register_post_accumulate_grad_hook` can't replace this: if the operands of an addition
are views, the gradient that it gets shares its memory with that of the other operand.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

__all__ = ["mask_gradient"]


Counts = tuple[int, int, int]
Hook = Callable[[Tensor], Tensor]


def mask_gradient(
    weight: Tensor, mask: Tensor, notify: Callable[[], None] | None = None
) -> RemovableHandle:
    """Mask a weight's gradients from now on, also those of `torch.autograd.grad`.

    The gradient that has been accumulated so far is masked at once.

    Args:
        weight: A leaf; the gradients of a frozen weight are masked once it requires gradients.
        mask: Bool tensor of the weight's shape on its device, True = kept.
        notify: Function that is called for each gradient, except in compiled backward passes.

    Returns:
        A handle that removes the hook.
    """
    _counts_alone()  # counted now, as this can't be done in a backward pass
    if weight.grad is not None:
        weight.grad.mul_(mask)
    hook = functools.partial(_masked, mask, notify)
    requires_grad = weight.requires_grad
    weight.requires_grad_(True)  # without it torch refuses the hook, which stays when it is reset
    if weight._backward_hooks is not None:  # torch.utils.swap_tensors has left them without effect
        weight._backward_hooks = weight._backward_hooks
    handle: RemovableHandle = weight.register_hook(hook)  # type: ignore[no-untyped-call]
    weight.requires_grad_(requires_grad)
    return handle


def _masked(mask: Tensor, notify: Callable[[], None] | None, gradient: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return gradient * mask
    if notify is not None:
        notify()
    counts = _counts(gradient)
    is_alone = counts is not None and counts == _counts_alone()
    return gradient.mul_(mask) if is_alone else gradient * mask


def _counts(gradient: Tensor) -> Counts | None:
    """Numbers of references to a gradient's memory, to its tensor and to its Python object."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or type(gradient) is not Tensor or not hasattr(gradient, "_use_count"):
        return None
    memory = count(gradient.untyped_storage()._cdata)
    return memory, gradient._use_count(), sys.getrefcount(gradient)


def counts_in_hook(wrap: Callable[[Hook], Hook] = lambda hook: hook) -> Counts | None:
    """The counts in a hook for a gradient that nothing else refers to; None if unknown.

    Args:
        wrap: Wrapper around the hooks, for example to time them, which holds references too.
    """
    seen: list[Counts | None] = []

    def count(_: Tensor, gradient: Tensor) -> Tensor:
        seen.append(_counts(gradient))
        return gradient

    with torch.enable_grad(), torch.inference_mode(False):
        weight = nn.Parameter(torch.ones(1, 1, 1, 1, device="cpu"))  # takes no random numbers
        hook = wrap(functools.partial(count, torch.ones(1)))
        weight.register_hook(hook)  # type: ignore[no-untyped-call]
        total: Any = functional.conv2d(torch.ones(1, 1, 1, 1, device="cpu"), weight).sum()
        total.backward()
    return seen[0]


_counts_alone = functools.cache(counts_in_hook)
