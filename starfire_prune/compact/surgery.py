"""Cutting channels out of a model along the dependency graph of Torch-Pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from starfire_prune.utils.modules import prunable_layers

__all__ = ["Surgery"]


class Surgery:
    """Removes the channels that no layer reads, and remembers why others stay.

    Args:
        pruning: the module `torch_pruning`.
        model: is cut in place; its parameters must require gradients.
        example: the model's arguments.
        pinned: layers whose output channels all stay, and why.
        unfolded: layers that go on reading constants, and why.
    """

    def __init__(
        self,
        pruning: Any,
        model: nn.Module,
        example: tuple[Any, ...],
        pinned: Mapping[str, str],
        unfolded: Mapping[str, str],
    ) -> None:
        self._types = pruning.ops.OPTYPE
        self._pinned = pinned
        self._unfolded = unfolded
        self._layers = prunable_layers(model)
        self._names = {module: name for name, module in self._layers.items()}
        self._graph = pruning.DependencyGraph().build_dependency(
            model, example_inputs=example, output_transform=_traced, verbose=False
        )
        self._reasons: dict[str, str] = {}

    def run(self) -> None:
        """Remove channels until nothing more can go: what a removed channel read may go next."""
        while sum(self._shrink_group(root) for root in self._roots()):
            pass

    def stayed(self) -> dict[str, tuple[int, str | None]]:
        """How many output channels of each layer have no weight; why, where there are any."""
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
            if module in covered or module not in self._graph.module2node or _is_depthwise(module):
                continue
            if name in self._pinned:
                self._reasons[name] = self._pinned[name]
                continue
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
        """Whether it is the inputs of a layer that the item is about."""
        module = item.dep.target.module
        if module not in self._names or _is_depthwise(module):
            return False
        pruner = self._graph.get_pruner_of_module(module)
        return bool(item.dep.handler == pruner.prune_in_channels)

    def _shrink_group(self, root: nn.Module) -> int:
        """Remove what can go of the channels coupled with a layer's outputs; how many did."""
        items = self._group(root, range(len(_weight(root)))).items
        obstacle = self._obstacle(items)
        if obstacle is not None:
            self._note(items, obstacle)
            return 0
        readers = self._readers(items)
        self._explain(items, readers)
        free = self._balanced(items, set(range(len(_weight(root)))).difference(readers))
        if free:
            for item in self._group(root, sorted(free)).items:
                self._cut(item)
        return len(free)

    def _obstacle(self, items: list[Any]) -> str | None:
        """Why none of the coupled channels can go, if so."""
        plain = {
            *(self._types.CONV, self._types.DEPTHWISE_CONV, self._types.LINEAR, self._types.BN),
            *(self._types.CONCAT, self._types.ELEMENTWISE, self._types.RESHAPE),
        }
        for item in items:
            module = item.dep.target.module
            name = self._names.get(module)
            if name is not None and name in self._pinned and not self._reads(item):
                return self._pinned[name]
            if item.dep.target.type not in plain or isinstance(module, _ConvTransposeNd):
                return f"its channels are coupled with {item.dep.target.name.partition('(')[0]}"
            if _is_depthwise(module) and module.in_channels != module.groups:
                return f"its channels are coupled with {name}, a convolution of one output a group"
        return None

    def _readers(self, items: list[Any]) -> dict[int, set[str]]:
        """The layers whose weights read each channel of the root, where there are any."""
        readers: dict[int, set[str]] = {}
        for item in items:
            if self._reads(item):
                module = item.dep.target.module
                read = _columns_read(module)
                for index, channel in zip(item.idxs, item.root_idxs, strict=True):
                    if read[index]:
                        readers.setdefault(channel, set()).add(self._names[module])
        return readers

    def _balanced(self, items: list[Any], free: set[int]) -> set[int]:
        """Of the channels that can go, as many in each group of grouped convolutions; not all."""
        while True:
            balanced = free
            for item in items:
                if _is_grouped(item.dep.target.module):
                    balanced = self._balanced_in(item, balanced)
                elif balanced.issuperset(item.root_idxs):
                    balanced = balanced - set(item.root_idxs[:1])
            if balanced == free:
                return balanced
            free = balanced

    def _balanced_in(self, item: Any, free: set[int]) -> set[int]:
        module = item.dep.target.module
        reads = self._reads(item)
        size = (module.in_channels if reads else module.out_channels) // module.groups
        members: list[list[int]] = [[] for _ in range(module.groups)]
        for index, channel in sorted(zip(item.idxs, item.root_idxs, strict=True)):
            if channel in free:
                members[index // size].append(channel)
        # A single output channel a group would look like a depthwise convolution
        spare = min(size - (1 if reads else 2), *map(len, members))
        covered = set(item.root_idxs)
        kept = {channel for group in members for channel in group[: max(spare, 0)]}
        return {channel for channel in free if channel in kept or channel not in covered}

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

    def _note(self, items: list[Any], obstacle: str) -> None:
        for name, _ in self._sources(items):
            self._reasons[name] = obstacle

    def _explain(self, items: list[Any], readers: dict[int, set[str]]) -> None:
        """Note for each layer with dead outputs why they stay, should they stay."""
        for name, item in self._sources(items):
            dead = set(_dead(item.dep.target.module))
            pairs = zip(item.idxs, item.root_idxs, strict=True)
            channels = [channel for index, channel in pairs if index in dead]
            names = set().union(*(readers.get(channel, ()) for channel in channels))
            self._reasons[name] = self._read_by(sorted(names))

    def _read_by(self, names: list[str]) -> str:
        if not names:
            return "the groups of a convolution can't spare equally many, or a layer would be empty"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        reasons = [self._unfolded[name] for name in names if name in self._unfolded]
        why = f" ({reasons[0]})" if reasons else ""
        return f"read by {', '.join(names[:3])}{more}{why}"


def _traced(output: Any) -> list[Tensor]:
    """The tensors that the dependency graph can be followed back from."""
    leaves = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight.detach()  # type: ignore[no-any-return]


def _dead(module: nn.Module) -> list[int]:
    return (~_weight(module).flatten(1).any(1)).nonzero().flatten().tolist()


def _columns_read(module: nn.Module) -> list[bool]:
    """Whether a weight reads it, for each of a layer's input channels."""
    weight = _weight(module)
    kernels = weight.flatten(2).any(2) if weight.ndim > 2 else weight
    groups = kernels.chunk(getattr(module, "groups", 1))
    read: list[bool] = torch.cat([group.any(0) for group in groups]).tolist()
    return read


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.out_channels > 1


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and not _is_depthwise(module)


def _cut_grouped_inputs(module: _ConvNd, gone: set[int]) -> None:
    """Remove input channels, equally many of each group but not at the same places."""
    size = module.in_channels // module.groups
    kept = [
        [i for i in range(size) if group * size + i not in gone] for group in range(module.groups)
    ]
    parts = _weight(module).chunk(module.groups)
    module.weight = nn.Parameter(
        torch.cat([part[:, index] for part, index in zip(parts, kept, strict=True)])
    )
    module.in_channels -= len(gone)
