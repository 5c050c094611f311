"""The pruning methods as a table, and helpers, for the tests of `starfire_prune.methods`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as untyped_prune

from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.baselines import (
    FilterStructured,
    MagnitudeUnstructured,
    RandomUnstructured,
    filter_structured,
    magnitude_unstructured,
    random_unstructured,
)
from starfire_prune.methods.conv import (
    CKStructured,
    IntraStructured,
    WindowStructured,
    ck_structured,
    intra_structured,
    window_structured,
)
from starfire_prune.methods.linear import (
    FCBlock,
    FCFine,
    FCStructured,
    fc_block,
    fc_fine,
    fc_structured,
)

prune: Any = untyped_prune

conv = partial(nn.Conv2d, 4, 10, 3)  # 40 kernels, 360 weights
linear = partial(nn.Linear, 20, 16)  # 20 blocks of 4x4, 320 weights


@dataclass(frozen=True)
class Method:
    """A method, a module that it fits, and how many zeros two rising amounts give there."""

    function: Callable[..., Any]
    method: type[MaskMethod]
    module: Callable[..., Any]
    amount: float
    zeros: int
    more: float
    more_zeros: int
    takes_scores: bool = True

    def prune(self, module: nn.Module, **options: Any) -> Any:
        return self.function(module, **{"amount": self.amount, **options})

    def pruned(self, **options: Any) -> Any:
        return self.prune(self.module(), **options)


@wraps(fc_structured)
def fc_after_a_living_layer(module: Any, *args: Any, **options: Any) -> Any:
    return fc_structured(module, *args, **{"previous": nn.Linear(5, 5), **options})


METHODS = [
    Method(window_structured, WindowStructured, conv, 0.3, 120, 0.6, 200),
    Method(ck_structured, CKStructured, conv, 0.3, 108, 0.6, 216),
    Method(intra_structured, IntraStructured, conv, 0.3, 108, 0.6, 216),
    Method(fc_block, FCBlock, linear, 0.3, 96, 0.6, 192),
    Method(fc_fine, FCFine, linear, 0.3, 96, 0.6, 192),
    Method(fc_after_a_living_layer, FCStructured, linear, 0.3, 96, 0.6, 192),
    Method(magnitude_unstructured, MagnitudeUnstructured, conv, 0.3, 108, 0.6, 216),
    Method(random_unstructured, RandomUnstructured, conv, 0.3, 108, 0.6, 216, takes_scores=False),
    Method(filter_structured, FilterStructured, conv, 0.3, 108, 0.6, 216),
]
RANKING = [row for row in METHODS if row.takes_scores]
CONVOLUTIONAL = [row for row in METHODS if row.module is conv]
WINDOW, CK, INTRA, BLOCK, FINE, STRUCTURE, MAGNITUDE, RANDOM, FILTER = METHODS


def parametrize_methods(rows: list[Method]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.function.__name__ for row in rows])


every_method = parametrize_methods(METHODS)
every_ranking_method = parametrize_methods(RANKING)
every_convolutional_method = parametrize_methods(CONVOLUTIONAL)


def leave(row: Method, module: nn.Module) -> Any:
    return module


def prune_by_one(row: Method, module: nn.Module) -> Any:
    return row.prune(module)


def prune_by_another(row: Method, module: nn.Module) -> Any:
    return (MAGNITUDE if row is RANDOM else RANDOM).prune(module, amount=0.1)


def prune_by_two(row: Method, module: nn.Module) -> Any:
    return row.prune(prune_by_another(row, module))


def prune_below_built_in(row: Method, module: nn.Module) -> Any:
    return prune.l1_unstructured(row.prune(module), "weight", amount=0.1)


def prune_on_built_in(row: Method, module: nn.Module) -> Any:
    return row.prune(prune.l1_unstructured(module, "weight", amount=0.1))


# How a weight came to have a mask of the method
CONTAINERS = {
    "two of ours": prune_by_two,
    "built-in on top": prune_below_built_in,
    "built-in below": prune_on_built_in,
}
STACKS = {"alone": prune_by_one, **CONTAINERS}
# What a method may find
STATES = {
    "fresh": leave,
    "the method's hook": prune_by_one,
    "another hook": prune_by_another,
    "a container": prune_below_built_in,
}
every_container = pytest.mark.parametrize("stack", CONTAINERS.values(), ids=CONTAINERS)
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)

BUILT_IN = {
    "l1": partial(prune.l1_unstructured, amount=0.2),
    "ln": partial(prune.ln_structured, amount=0.2, n=2, dim=0),
    "random": partial(prune.random_unstructured, amount=0.2),
    "custom": lambda module, name: prune.custom_from_mask(module, name, checkered(module.weight)),
}
every_built_in = pytest.mark.parametrize("built_in", BUILT_IN.values(), ids=BUILT_IN)


def checkered(weight: Tensor) -> Tensor:
    return torch.arange(weight.numel()).view(weight.shape) % 3 > 0


def inputs_for(module: Any) -> Tensor:
    weight = module._parameters.get("weight_orig", module._parameters.get("weight"))
    assert weight is not None
    generator = torch.Generator().manual_seed(1)
    channels = getattr(module, "groups", 1) * weight.shape[1]
    shape = (2, channels, *[5] * (weight.ndim - 2))
    return torch.randn(shape, generator=generator).to(weight.dtype)


def dense_output(module: Any, inputs: Tensor, weight: Tensor) -> Any:
    """What a module like this one gives with `weight` in its weight's place."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(inputs, weight, module.bias)
    return module._conv_forward(inputs, weight, module.bias)


def masked_weight(module: Any) -> Any:
    """The weight as `weight_orig` and `weight_mask` have it now."""
    return module.weight_orig.detach() * module.weight_mask.to(module.weight_orig.dtype)


def zeros(module: Any, name: str = "weight") -> int:
    return int((getattr(module, f"{name}_mask") == 0).sum())


def hook_of(module: Any, name: str = "weight") -> Any:
    """The pruning hook of the parameter, which must be the only one of that name."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if hook._tensor_name == name]
    assert len(hooks) == 1
    return hooks[0]


def methods_of(module: Any) -> list[Any]:
    """The methods in the module's single pruning hook, whether it is a container or not."""
    hook = hook_of(module)
    return list(hook) if isinstance(hook, prune.PruningContainer) else [hook]


def train(module: Any, learning_rate: float = 0.1, momentum: float = 0.0) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate, momentum=momentum)
    optimizer.zero_grad()
    module(inputs_for(module)).square().sum().backward()
    optimizer.step()


def redraw(module: Any) -> None:
    """New values for the parameter behind the pruned weight."""
    with torch.no_grad():
        module.weight_orig.uniform_(0.1, 1.0)


def contents(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All that a module's dictionary leads to, in order, submodules left out."""
    yield path, value
    if isinstance(value, prune.BasePruningMethod):
        value = vars(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from contents(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from contents(item, f"{path}/{index}")


class State:
    """What a module holds: which objects, under which keys, in which order, and their values."""

    def __init__(self, module: Any) -> None:
        self.objects = list(contents(vars(module)))
        self.values = [
            value.detach().clone() for _, value in self.objects if isinstance(value, Tensor)
        ]

    def assert_same(self, other: "State") -> None:
        assert [path for path, _ in self.objects] == [path for path, _ in other.objects]
        for (path, ours), (_, theirs) in zip(self.objects, other.objects, strict=True):
            assert ours is theirs, f"{path} is another object"
        for before, after in zip(self.values, other.values, strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def assert_refused(
    module: nn.Module, call: Callable[[nn.Module], object], error: type[Exception], match: str
) -> None:
    """The call raises, and the module is afterwards as it was."""
    before = State(module)
    with pytest.raises(error, match=match):
        call(module)
    before.assert_same(State(module))
