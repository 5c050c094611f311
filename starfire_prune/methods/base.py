"""The base of the pruning methods: a mask that repeated calls tighten in place.

The methods share the hooks, buffers and containers of `torch.nn.utils.prune`. They differ from its
own methods in this:

- amounts are absolute: 0.3 and then 0.6 gives 0.6;
- a repeated call updates the bool mask in place: the same buffer, the same single hook;
- weights are ranked by `weight_orig`, never by the stale, masked `weight`;
- `copy.deepcopy` of a pruned module works at any time;
- the order of the module's parameters is kept;
- a call that is refused changes nothing.
"""

import copy
import dataclasses
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from starfire_prune.masks.counts import Units, weight_units
from starfire_prune.methods.parameters import (
    CONVOLUTIONS,
    check_kernels,
    check_scores,
    parameter_of,
)
from starfire_prune.methods.schedules import Schedule

__all__ = [
    "CONVOLUTIONS",
    "LINEAR",
    "MaskMethod",
    "ModuleT",
    "find_hook",
    "make_permanent",
    "of_layer",
]

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear,)

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ValueT = TypeVar("ValueT")


def of_layer(default: ValueT) -> ValueT:
    """A field that `MaskMethod.for_layer` fills in: it is not an option of recipes."""
    field: ValueT = dataclasses.field(default=default, metadata={"of_layer": True})
    return field


@dataclasses.dataclass(eq=False)
class MaskMethod(prune.BasePruningMethod):
    """A pruning method whose mask is tightened in place.

    A subclass is a dataclass: its fields are the method's options, in Python and in recipes. It
    gives `compute_mask`, and `units` where its units are not the layer's single weights. See
    `starfire_prune.methods.registry.register_method` for an example.

    Attributes:
        amount: Share in [0, 1] of the units of each scope that is zero afterwards, or their number.
        applies_to: Classes of the modules that the method prunes.
        reads_zero_inputs: Whether the method has a field `columns` that the engine fills in with
            the input channels that are always zero, a bool tensor of shape `(C,)`.
    """

    # "global" hands `compute_mask` the whole tensor; "structured" slices it, "unstructured"
    # flattens it from the second application on.
    PRUNING_TYPE: ClassVar[str] = "global"
    applies_to: ClassVar[tuple[type[nn.Module], ...]] = (*CONVOLUTIONS, *LINEAR)
    reads_zero_inputs: ClassVar[bool] = False

    amount: float
    _module: "weakref.ref[nn.Module] | None" = dataclasses.field(
        default=None, init=False, repr=False
    )

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **options: Any,
    ) -> prune.BasePruningMethod:
        """Prune the parameter `name` of `module`, or tighten the mask that it already has.

        Modifies module in place by 1) adding a bool buffer `name + "_mask"` of the parameter's
        shape, 2) replacing the parameter by its masked version, while the parameter itself becomes
        `name + "_orig"` in the same place of the module's order, and 3) adding one forward
        pre-hook. If this method has been applied before, only the buffer's values change; on top
        of another method both share a `PruningContainer`.

        The amount is that of the method's own units, and what is zero already counts towards it. A
        kernel, block or channel counts once all its weights are zero, so that after a method of
        smaller units the share of zeros is larger than the amount: 0.3 by
        `prune.l1_unstructured` and then 0.6 by `ck_structured` give about 70 %.

        Args:
            module: Module that holds the parameter; not a transposed convolution.
            name: Name of the parameter.
            args: Arguments of the method's constructor, as are `options`.
            importance_scores: Tensor of the parameter's shape that is ranked by magnitude in its
                place.

        Returns:
            The hook: this method, or the container that holds it.

        Raises:
            AttributeError: If the module has no parameter of that name.
            TypeError, ValueError: For bad scores, and as the method's mask function. Nothing has
                changed then.
        """
        parameter = parameter_of(module, name)
        if cls.applies_to == CONVOLUTIONS:
            check_kernels(module, name, parameter)
        check_scores(importance_scores, parameter)
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
        """Add this method's hook and a mask, all ones by default, to an unpruned parameter."""
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
        """Tighten the mask of a pruned parameter; weights that it prunes already remain pruned.

        Unlike `apply` it leaves `module.<name>` stale: every forward pass computes it again.

        Returns:
            The hook: this method, the one of the same class that was there, or their container.

        Raises:
            TypeError, ValueError: As the mask function. Nothing has changed then.
        """
        mask: Tensor = getattr(module, f"{name}_mask")
        scores = getattr(module, f"{name}_orig") if importance_scores is None else importance_scores
        mask.mul_(self.compute_mask(scores, default_mask=mask))
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
        """The masked parameter; backward only has to keep the bool mask."""
        mask: Tensor = getattr(module, f"{self._tensor_name}_mask")
        original: Tensor = getattr(module, f"{self._tensor_name}_orig")
        return original * mask

    @abstractmethod
    def compute_mask(self, t: Tensor, default_mask: Tensor | None) -> Tensor:
        """Compute the mask of a weight.

        Args:
            t: The weight, or the importance scores in its place.
            default_mask: The earlier mask, of `t`'s shape, or None.

        Returns:
            A tensor of `t`'s shape, True where the weight is kept.

        Raises:
            TypeError, ValueError: For an amount, options or values that don't fit.
        """

    def units(self, shape: torch.Size) -> Units:
        """The units of a weight of this shape: by default its single weights, in one scope.

        Raises:
            TypeError, ValueError: For options that don't fit the shape.
        """
        return weight_units(shape)

    def counts(self, shape: torch.Size) -> tuple[tuple[int, int], ...]:
        """What the amount comes to for a weight of this shape: pairs `(pruned units, units)`.

        An option such as `max_nonzero` may prune more at the era's last update.
        As long as none of the first numbers rises, an earlier mask of this method is still exact.
        Where the two numbers of a pair are equal, all of the weight is pruned.

        Raises:
            TypeError, ValueError: For an amount or options that don't fit the shape.
        """
        units = self.units(shape)
        return ((units.pruned(self.amount), units.size),)

    def detail(self, shape: torch.Size) -> str:
        """What the plan of a run says of the units of a weight of this shape, or nothing."""
        del shape
        return ""

    def for_layer(self, name: str, module: nn.Module) -> "MaskMethod | None":
        """The method with what depends on the layer filled in; None leaves the layer dense.

        Args:
            name: Name of the layer in the model.
            module: The layer.
        """
        del name, module
        return self

    def amount_at(self, progress: float, schedule: Schedule) -> float:
        """The amount at a progress of the era in [0, 1], where `self.amount` is the target."""
        return self.amount * schedule(progress)

    def at(self, progress: float, schedule: Schedule) -> "MaskMethod":
        """The method with its amount at a progress of the era in [0, 1]."""
        return dataclasses.replace(self, amount=self.amount_at(progress, schedule))

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Options of a recipe that have no effect beside the others: pairs `(option, reason)`."""
        del options
        yield from ()

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
        # copied before it, so deepcopy uses a detached copy from the memo.
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
    """A container of this package: it applies and removes masks as `MaskMethod` does."""

    apply_mask = MaskMethod.apply_mask
    remove = MaskMethod.remove


def find_hook(module: nn.Module, name: str) -> tuple[int, prune.BasePruningMethod | None]:
    """The pruning hook of a module's parameter and its key, or `(-1, None)`."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            return key, hook
    return -1, None


def _restore_order(module: nn.Module, order: list[str], name: str) -> None:
    """Restore the order that the module's parameters had before `name` was renamed."""
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
