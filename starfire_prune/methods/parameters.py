"""The parameters that the methods can prune, and errors for the others."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from starfire_prune.utils.modules import effective_weight

__all__ = ["CONVOLUTIONS", "check_kernels", "check_scores", "masked_parameter", "parameter_of"]

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def masked_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as a forward pass uses it, if the methods can prune it."""
    parameter_of(module, name)
    return effective_weight(module, name)


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name, which pruning may have renamed to `name + "_orig"`."""
    if not isinstance(name, str):
        raise TypeError(f"`name` (={name!r}) must be a str; the amount is the argument `amount`")
    if isinstance(module, _ConvTransposeNd):
        raise TypeError(
            f"{type(module).__name__} is a transposed convolution, whose weight has its channels "
            f"the other way round: these methods can't prune it"
        )
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{type(module).__name__} is the output projection of nn.MultiheadAttention, which "
            f"uses its weight without calling it, so that no hook can mask it"
        )
    parameter = module._parameters.get(f"{name}_orig", module._parameters.get(name))
    if parameter is None:
        names = [
            key.removesuffix("_orig")
            for key, value in module._parameters.items()
            if value is not None
        ]
        raise AttributeError(
            f"{type(module).__name__} has no parameter `{name}`; it has: "
            f"{', '.join(names) or 'none of its own'}"
        )
    if _is_computed(module, name):
        raise ValueError(
            f"{type(module).__name__} computes `{name}` from `{name}_orig`, as spectral_norm does, "
            f"so that zeros would not hold: remove that first"
        )
    if parameter.is_complex():
        raise TypeError(
            f"`{name}` of {type(module).__name__} has dtype {parameter.dtype}, and only real "
            f"weights are ranked"
        )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"`{name}` of {type(module).__name__} has no values yet: run a forward pass first"
        )
    return parameter


def _is_computed(module: nn.Module, name: str) -> bool:
    """Whether another hook than one of pruning computes a parameter from `name + "_orig"`."""
    names = module._parameters.keys()
    return f"{name}_orig" in names and name not in names and f"{name}_mask" not in module._buffers


def check_kernels(module: nn.Module, name: str, weight: Tensor) -> None:
    """Raise TypeError for PyTorch's layers whose weight has dimensions, but no kernels."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modu")]
    is_layer = any(kind is not nn.Module for kind in kinds)
    if is_layer and weight.ndim > 2 and not isinstance(module, CONVOLUTIONS):
        raise TypeError(
            f"{type(module).__name__} is not a convolution, and its `{name}` has no kernels: "
            f"magnitude_unstructured prunes single weights"
        )


def check_scores(importance_scores: Tensor | None, parameter: nn.Parameter) -> None:
    """Raise TypeError or ValueError for scores that are not a tensor of the parameter's shape."""
    if importance_scores is None:
        return
    value: object = importance_scores
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`importance_scores` must be a tensor of the parameter's shape, "
            f"{tuple(parameter.shape)}; received {type(value).__name__}"
        )
    if importance_scores.shape != parameter.shape:
        raise ValueError(
            f"`importance_scores` of shape {tuple(importance_scores.shape)} must have the shape "
            f"of the parameter, {tuple(parameter.shape)}"
        )
