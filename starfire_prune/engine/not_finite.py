"""Where values that are not finite come from, for the error of a failed mask update."""

from __future__ import annotations

from torch import nn

from starfire_prune.utils.modules import clean_name
from starfire_prune.utils.text import first_few

__all__ = ["not_finite_text"]


def not_finite_text(model: nn.Module, updates: int) -> str:
    """The end of an error: the update, and which of its gradients are not finite.

    It names gradients in the order of the model: a layer whose gradient is the only one has most
    likely computed it wrongly, and with all of them the loss was not finite.

    Args:
        model: The model after an update, before its gradients are set to zero.
        updates: Number of updates so far.

    Returns:
        The text; empty if all weights are finite, so that the error has another cause.
    """
    if all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        return ""
    grads = {
        clean_name(name).removesuffix("_orig"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    wrong = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
    gradients = f"{len(wrong)} of {len(grads)} gradients are not finite"
    named = f": {first_few(wrong)}" if wrong else ""
    return f", after update {updates}; {gradients}{named}" if grads else f", after update {updates}"
