"""The base of the pruning methods: a mask that repeated calls tighten in place.

What differs from `torch.nn.utils.prune`'s own methods, whose hooks, buffers and containers these
share:

- amounts are absolute: 0.3 and then 0.6 gives 0.6;
- a repeated call updates the bool mask in place: the same buffer, the same single hook;
- weights are ranked by `weight_orig`, never by the stale, masked `weight`;
- `copy.deepcopy` of a pruned module works at any time;
- the order of the module's parameters stays as it was;
- a call that is refused changes nothing.
"""

import copy
import weakref
from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import prune

__all__ = ["MaskMethod", "find_hook", "make_permanent", "masked_parameter"]


class MaskMethod(prune.BasePruningMethod):
    """A pruning method whose mask is tightened in place. Subclasses give `compute_mask`."""

    # "global" hands `compute_mask` the whole tensor; "structured" slices it, "unstructured"
    # flattens it from the second application on.
    PRUNING_TYPE = "global"

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self._module: weakref.ref[nn.Module] | None = None

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **options: Any,
    ) -> prune.BasePruningMethod:
        """Prune `module`'s parameter `name`, or tighten the mask that it already has.

        Modifies module in place by 1) adding a bool buffer `name + "_mask"` of the parameter's
        shape, 2) replacing the parameter by its masked version, the parameter itself becoming
        `name + "_orig"` in the same place of the module's order, and 3) adding one forward
        pre-hook. If this method has been applied before, only the buffer's values change; on top
        of another method both share a `PruningContainer`.

        Args:
            module: holds the parameter; not a transposed convolution.
            name: of the parameter.
            args: handed to the method's constructor, as are `options`.
            importance_scores: ranked by magnitude in the parameter's place, of its shape.

        Returns:
            The hook: this method, or the container it is in.

        Raises:
            AttributeError: if the module has no parameter of that name.
            TypeError, ValueError: for bad scores, and as the method's mask function. Nothing has
                changed then.
        """
        parameter = _parameter(module, name)
        _check_scores(importance_scores, parameter)
        scores = parameter if importance_scores is None else importance_scores
        _, hook = find_hook(module, name)
        try:
            method = cls(*args, **options)
            if hook is None:
                return method.register(module, name, method.compute_mask(scores, None))
            hook = method.tighten(module, name, scores)
        except (TypeError, ValueError) as error:
            error.args = (f"{type(module).__name__}.{name}: {error}",)
            raise
        setattr(module, name, hook.apply_mask(module))  # type: ignore[no-untyped-call]
        return hook

    def register(self, module: nn.Module, name: str, mask: Tensor | None = None) -> "MaskMethod":
        """Put this method's hook and a mask, all ones by default, on a parameter that has none."""
        for taken in (f"{name}_orig", f"{name}_mask"):
            if hasattr(module, taken):
                raise ValueError(f"the module has a `{taken}` already, which pruning `{name}` adds")
        original: nn.Parameter = getattr(module, name)
        buffer = torch.ones_like(original, dtype=torch.bool, requires_grad=False)  # its strides
        if mask is not None:
            buffer.copy_(mask)
        masked = original * buffer  # what can fail has been done before the module changes
        order = list(module._parameters)
        del module._parameters[name]
        module.register_parameter(f"{name}_orig", original)
        _restore_order(module, order, name)
        module.register_buffer(f"{name}_mask", buffer)
        self._tensor_name, self._module = name, weakref.ref(module)
        setattr(module, name, masked)
        module.register_forward_pre_hook(self)
        return self

    def tighten(
        self, module: nn.Module, name: str, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Tighten the mask of a pruned parameter, and leave the stale `module.weight` alone.

        `apply` without the refreshed `module.<name>`, which every forward pass works out again.

        Returns:
            The hook: this method, the one of the same class that was there, or their container.

        Raises:
            TypeError, ValueError: as the mask function. Nothing has changed then.
        """
        mask: Tensor = getattr(module, f"{name}_mask")
        scores = getattr(module, f"{name}_orig") if importance_scores is None else importance_scores
        mask.copy_(self.compute_mask(scores, default_mask=mask))
        self._tensor_name, self._module = name, weakref.ref(module)
        key, hook = find_hook(module, name)
        if type(hook) is type(self):
            hook.__dict__.update(self.__dict__)
        else:
            hook = module._forward_pre_hooks[key] = self._container_with(hook)
        return hook

    def _container_with(self, hook: prune.BasePruningMethod | None) -> prune.PruningContainer:
        if not isinstance(hook, prune.PruningContainer):
            hook = MaskContainer(hook)
        others = tuple(method for method in hook if type(method) is not type(self))
        hook._pruning_methods = (*others, self)
        return hook

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The parameter with its mask applied; the bool mask is all that backward has to keep."""
        mask: Tensor = getattr(module, f"{self._tensor_name}_mask")
        original: Tensor = getattr(module, f"{self._tensor_name}_orig")
        return original * mask

    @abstractmethod
    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """The mask of `t`, of its shape and bool, given the earlier one."""

    @abstractmethod
    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        """What the amount comes to for a weight of this shape: `(units that go, units)` pairs.

        As long as none of these numbers rises, an earlier mask of this method stays the answer.
        Where the two of a pair are equal, the whole weight goes.

        Raises:
            TypeError, ValueError: for an amount or options that don't fit the shape.
        """

    def locales(self, shape: torch.Size) -> int:
        """In how many locales the units of a weight of this shape compete: one, the layer."""
        return 1

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent, as `prune.remove` does, in the parameter's own memory."""
        name = self._tensor_name
        order = list(module._parameters)
        mask: Tensor = getattr(module, f"{name}_mask")
        original: nn.Parameter = getattr(module, f"{name}_orig")
        with torch.no_grad():
            original.masked_fill_(mask.logical_not(), 0.0)
        delattr(module, name)
        del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        setattr(module, name, original)
        _restore_order(module, order, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MaskMethod":
        # The module's stale weight is not a leaf, which deepcopy refuses. A module's hooks are
        # copied before it, so a detached copy in the memo is what deepcopy then takes.
        module = None if self._module is None else self._module()
        stale = None if module is None else module.__dict__.get(self._tensor_name)
        if isinstance(stale, Tensor):
            memo[id(stale)] = stale.detach().clone()
        clone = memo[id(self)] = type(self).__new__(type(self))
        state = {key: value for key, value in self.__dict__.items() if key != "_module"}
        clone.__dict__.update(copy.deepcopy(state, memo))
        copied_module = memo.get(id(module))
        clone._module = None if copied_module is None else weakref.ref(copied_module)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None if self._module is None else self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state.pop("_module")
        self.__dict__.update(state)
        self._module = None if module is None else weakref.ref(module)


class MaskContainer(prune.PruningContainer):
    """The container that this package makes: it applies and removes masks as `MaskMethod` does."""

    apply_mask = MaskMethod.apply_mask
    remove = MaskMethod.remove


def find_hook(module: nn.Module, name: str) -> tuple[int, prune.BasePruningMethod | None]:
    """The pruning hook of a module's parameter and its key, or `(-1, None)`."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return key, hook
    return -1, None


def masked_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as a forward pass uses it: masked where a hook prunes it, and never stale."""
    parameter = _parameter(module, name).detach()
    mask = module._buffers.get(f"{name}_mask")
    return parameter if mask is None else parameter * mask


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name, which pruning may have renamed to `name + "_orig"`."""
    if not isinstance(name, str):
        raise TypeError(f"`name` (={name!r}) must be a str; the amount goes into amount=...")
    if isinstance(module, _ConvTransposeNd):
        raise TypeError(
            f"{type(module).__name__} is a transposed convolution, whose weight has its channels "
            f"the other way round: these methods don't take it"
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
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"`{name}` of {type(module).__name__} has no values yet: run a forward pass first"
        )
    return parameter


def _check_scores(importance_scores: Tensor | None, parameter: nn.Parameter) -> None:
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


def _restore_order(module: nn.Module, order: list[str], name: str) -> None:
    """Put the module's parameters back into an earlier order, before `name` was renamed."""
    renamed = {f"{name}_orig": name}
    place = {renamed.get(key, key): index for index, key in enumerate(order)}
    ordered = sorted(
        module._parameters.items(), key=lambda item: place[renamed.get(item[0], item[0])]
    )
    module._parameters.clear()
    module._parameters.update(ordered)


def make_permanent(module: nn.Module, name: str) -> None:
    """`prune.remove`, whatever method the hook is of, with the parameters' order kept."""
    order = list(module._parameters)
    prune.remove(module, name)  # type: ignore[no-untyped-call]
    _restore_order(module, order, name)


ModuleT = TypeVar("ModuleT", bound=nn.Module)
