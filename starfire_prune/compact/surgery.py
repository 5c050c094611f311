"""Removing coupled channels from a model by the dependency graph of Torch-Pruning."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from starfire_prune.utils.modules import prunable_layers
from starfire_prune.utils.text import first_few

__all__ = ["Surgery"]


class Surgery:
    """Removes the channels that no layer reads, and records why other dead channels are kept.

    Args:
        pruning: The module `torch_pruning`.
        model: The model, which is changed in place; its parameters must require gradients.
        example: The model's arguments.
        required: Layers whose output channels must all be kept, and why.
        unfolded: Layers that still read constants, and why.

    Attributes:
        place: Name of the layer whose coupled channels are looked at, for errors.
    """

    place: str | None = None

    def __init__(
        self,
        pruning: Any,
        model: nn.Module,
        example: tuple[Any, ...],
        required: Mapping[str, str],
        unfolded: Mapping[str, str],
    ) -> None:
        self._types = pruning.ops.OPTYPE
        self._required = required
        self._unfolded = unfolded
        self._layers = prunable_layers(model)
        self._names = {module: name for name, module in self._layers.items()}
        self._pruning = pruning
        self._skipped: set[Any] = set()  # nodes of the dependency graph
        with _skipping_errors(pruning, self._skipped):
            self._graph = pruning.DependencyGraph().build_dependency(
                model, example_inputs=example, output_transform=_traced, verbose=False
            )
        self._reasons: dict[str, str] = {}

    def run(self) -> None:
        """Remove channels until none is left to remove: one removal can make others possible."""
        with _skipping_errors(self._pruning, self._skipped):
            while sum(self._shrink_group(root) for root in self._roots()):
                pass

    def dead_kept(self) -> dict[str, tuple[int, str | None]]:
        """The number of each layer's dead output channels, and why they were kept, if any."""
        numbers = {name: len(_dead(module)) for name, module in self._layers.items()}
        unseen = "it is not in the dependency graph"
        return {
            name: (number, self._reasons.get(name, unseen) if number else None)
            for name, number in numbers.items()
        }

    def _roots(self) -> Iterator[nn.Module]:
        """A layer for each set of coupled channels."""
        covered: set[nn.Module] = set()
        for name, module in self._layers.items():
            if (
                module in covered
                or module not in self._graph.module2node
                or _has_one_output_a_group(module)
            ):
                continue
            if name in self._required:
                self._reasons[name] = self._required[name]
                continue
            self.place = name
            for item in self._group(module, range(len(_weight(module)))).items:
                member = item.dep.target.module
                whole = member in self._names and len(item.idxs) == len(_weight(member))
                if whole and not self._reads(item):
                    covered.add(member)
            yield module

    def _group(self, root: nn.Module, channels: Iterable[int]) -> Any:
        prune = self._graph.get_pruner_of_module(root).prune_out_channels
        return self._graph.get_pruning_group(root, prune, list(channels))

    def _reads(self, item: Any) -> bool:
        """Whether an item stands for the input channels of a layer, not for its output channels."""
        module = item.dep.target.module
        if module not in self._names or _has_one_output_a_group(module):
            return False
        pruner = self._graph.get_pruner_of_module(module)
        return bool(item.dep.handler == pruner.prune_in_channels)

    def _shrink_group(self, root: nn.Module) -> int:
        """Remove unread channels among those coupled with a layer's outputs; returns how many."""
        self.place = self._names[root]
        items = self._group(root, range(len(_weight(root)))).items
        obstacle = self._obstacle(items)
        if obstacle is not None:
            self._record(items, obstacle)
            return 0
        readers = self._readers(items)
        self._explain(items, readers)
        removable = self._balanced(items, set(range(len(_weight(root)))).difference(readers))
        if removable:
            for item in self._group(root, sorted(removable)).items:
                self._cut(item)
        return len(removable)

    def _obstacle(self, items: list[Any]) -> str | None:
        """Why all the coupled channels must be kept, or None."""
        plain = {
            *(self._types.CONV, self._types.DEPTHWISE_CONV, self._types.LINEAR, self._types.BN),
            *(self._types.CONCAT, self._types.ELEMENTWISE, self._types.RESHAPE),
        }
        for item in items:
            module = item.dep.target.module
            name = self._names.get(module)
            if name is not None and name in self._required and not self._reads(item):
                return self._required[name]
            skipped = item.dep.target in self._skipped or item.dep.source in self._skipped
            other = item.dep.target.type not in plain or isinstance(module, _ConvTransposeNd)
            if skipped or other:
                return f"its channels are coupled with {item.dep.target.name.partition('(')[0]}"
            if _has_one_output_a_group(module) and module.in_channels != module.groups:
                return (
                    f"its channels are coupled with {name}, a convolution with one output per group"
                )
        return None

    def _readers(self, items: list[Any]) -> dict[int, set[str]]:
        """The layers whose weights read a channel of the root, by channel, if there are any."""
        readers: dict[int, set[str]] = {}
        for item in items:
            if self._reads(item):
                module = item.dep.target.module
                read = _columns_read(module)
                for index, channel in zip(item.idxs, item.root_idxs, strict=True):
                    if read[index]:
                        readers.setdefault(channel, set()).add(self._names[module])
        return readers

    def _balanced(self, items: list[Any], removable: set[int]) -> set[int]:
        """Fewer removable channels: equally many in each group of a convolution, and never all."""
        while True:
            balanced = removable
            for item in items:
                if _is_grouped(item.dep.target.module):
                    balanced = self._balanced_in(item, balanced)
                elif balanced.issuperset(item.root_idxs):
                    balanced = balanced - set(item.root_idxs[:1])
            if balanced == removable:
                return balanced
            removable = balanced

    def _balanced_in(self, item: Any, removable: set[int]) -> set[int]:
        module = item.dep.target.module
        reads = self._reads(item)
        size = (module.in_channels if reads else module.out_channels) // module.groups
        members: list[list[int]] = [[] for _ in range(module.groups)]
        for index, channel in sorted(zip(item.idxs, item.root_idxs, strict=True)):
            if channel in removable:
                members[index // size].append(channel)
        # With a single output channel per group it would look like a depthwise convolution
        spare = min(size - (1 if reads else 2), *map(len, members))
        covered = set(item.root_idxs)
        chosen = {channel for group in members for channel in group[: max(spare, 0)]}
        return {channel for channel in removable if channel in chosen or channel not in covered}

    def _cut(self, item: Any) -> None:
        module = item.dep.target.module
        if _is_grouped(module) and self._reads(item):
            _cut_grouped_inputs(module, set(item.idxs))
        else:
            item.dep(item.idxs)

    def _sources(self, items: list[Any]) -> Iterator[tuple[str, Any]]:
        """The layers whose outputs are among the coupled channels, and their items."""
        for item in items:
            name = self._names.get(item.dep.target.module)
            if name is not None and not self._reads(item):
                yield name, item

    def _record(self, items: list[Any], obstacle: str) -> None:
        for name, _ in self._sources(items):
            self._reasons[name] = obstacle

    def _explain(self, items: list[Any], readers: dict[int, set[str]]) -> None:
        """Record for each layer with dead outputs why they are kept, in case they are."""
        for name, item in self._sources(items):
            dead = set(_dead(item.dep.target.module))
            pairs = zip(item.idxs, item.root_idxs, strict=True)
            channels = [channel for index, channel in pairs if index in dead]
            names = set().union(*(readers.get(channel, ()) for channel in channels))
            self._reasons[name] = self._read_by(sorted(names))

    def _read_by(self, names: list[str]) -> str:
        if not names:
            return "removal would leave a convolution's groups unequal, or a layer without channels"
        reasons = [self._unfolded[name] for name in names if name in self._unfolded]
        why = f" ({reasons[0]})" if reasons else ""
        return f"read by {first_few(names)}{why}"


@contextmanager
def _skipping_errors(pruning: Any, skipped: set[Any]) -> Iterator[None]:
    """Collect the nodes through which Torch-Pruning fails to follow channels, within the block.

    In some reshapes, for example, it divides by a number of channels that it takes for zero. An
    error at such a node would make the complete model impossible to cut.
    """
    module = getattr(getattr(pruning, "dependency", None), "index_mapping", None)
    functions = {
        name: function
        for name, function in (vars(module) if module is not None else {}).items()
        if re.fullmatch("update_[a-z]+_index_mapping", name)
    }

    def guarded(function: Callable[[Any, Any], None], graph: Any, node: Any) -> None:
        try:
            function(graph, node)
        except Exception:  # it raises errors of every kind
            skipped.add(node)

    try:
        for name, function in functions.items():
            setattr(module, name, functools.partial(guarded, function))
        yield
    finally:
        for name, function in functions.items():
            setattr(module, name, function)


def _traced(output: Any) -> list[Tensor]:
    """The tensors from which the dependency graph can be traced back."""
    leaves = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight.detach()  # type: ignore[no-any-return]


def _dead(module: nn.Module) -> list[int]:
    return (~_weight(module).flatten(1).any(1)).nonzero().flatten().tolist()


def _columns_read(module: nn.Module) -> list[bool]:
    """For each of a layer's input channels, whether a weight reads it."""
    weight = _weight(module)
    kernels = weight.flatten(2).any(2) if weight.ndim > 2 else weight
    groups = kernels.chunk(getattr(module, "groups", 1))
    read: list[bool] = torch.cat([group.any(0) for group in groups]).tolist()
    return read


def _has_one_output_a_group(module: nn.Module) -> bool:
    """Whether Torch-Pruning takes a module for a depthwise convolution."""
    return isinstance(module, _ConvNd) and module.groups == module.out_channels > 1


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and not _has_one_output_a_group(module)


def _cut_grouped_inputs(module: _ConvNd, removed: set[int]) -> None:
    """Remove input channels: equally many in each group, in any places there."""
    size = module.in_channels // module.groups
    kept = [
        [i for i in range(size) if group * size + i not in removed]
        for group in range(module.groups)
    ]
    parts = _weight(module).chunk(module.groups)
    module.weight = nn.Parameter(
        torch.cat([part[:, index] for part, index in zip(parts, kept, strict=True)])
    )
    module.in_channels -= len(removed)
