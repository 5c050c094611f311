"""Whether a model calls its layers, or reads their weights without a call, past all hooks."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.engine.computed import kept_random_state
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import copied_module, layer_weight, prunable_layers, unwrap
from starfire_prune.utils.text import first_few

__all__ = ["CallWatch", "read_without_call"]


def read_without_call(
    model: nn.Module, names: Iterable[str], example_input: Tensor | tuple[Any, ...]
) -> frozenset[str] | None:
    """The layers whose weights a forward pass reads without a call, whether it also calls them.

    A copy of the model runs in eval and in training mode: the model, and the state of the random
    generators, are not changed.

    Args:
        model: The model, also wrapped by DDP or `torch.compile`.
        names: Names of the layers to look at.
        example_input: A small batch, or the tuple of the model's arguments.

    Returns:
        Their names, or None if the copy can't run: then the first update shows it.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    inner = unwrap(model)
    found: set[str] = set()
    try:
        with kept_random_state(inner), _uncompiled(inner):
            for training in (False, True):
                other = copied_module(inner).train(training)
                layers = {name: prunable_layers(other)[name] for name in names}
                found.update(_read_without_call(other, layers, inputs))
    except Exception:  # of any type: it comes from the model's own code
        return None
    return frozenset(found)


class CallWatch:
    """Watches a model's first passes for layers whose weights are read without a call.

    Hooks note which layers are called and which weights get a gradient, until `finish`. Copies of
    the model lose the hooks again, unpickled ones at their first call.

    Args:
        layers: The layers by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self._called: set[str] = set()
        self._used: set[str] = set()
        self._handles: list[Any] = []
        for name, module in layers.items():
            hook = _CallHook(partial(self._called.add, name), module)
            self._handles.append(module.register_forward_pre_hook(hook))
            weight = layer_weight(module)
            if weight.requires_grad:
                used = partial(self._use, name)
                self._handles.append(weight.register_hook(used))  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {"_layers": self._layers}  # copies watch the layers that are copied with them

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_layers"])  # type: ignore[misc]

    def _use(self, name: str, gradient: Tensor) -> None:
        del gradient
        self._used.add(name)

    def finish(self) -> None:
        """Remove all hooks, and raise an error for weights that were read without a call.

        Raises:
            PruningError: With the names of the layers.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        names = sorted(self._used - self._called)
        if names:
            raise PruningError(
                f"the model reads the weight of {first_few(names, 10)} without calling the layer, "
                f"so that no hook can mask it: leave {'it' if len(names) == 1 else 'them'} out by "
                f"`exclude`"
            )


class _CallHook:
    """A forward pre-hook that notes a call, also while `torch.compile` traces it."""

    only_observes = True
    __name__ = "note_call"  # as functions have one, which tools read of any hook

    def __init__(
        self, note: Callable[[], None] | None = None, module: nn.Module | None = None
    ) -> None:
        self._note: Callable[[], None] | None = None
        self._module = None if module is None else weakref.ref(module)
        if note is not None:

            def noted() -> None:
                note()

            # As torch.compiler.assume_constant_result does, which would load the compiler:
            # it is called once, while the graph is traced, and costs nothing later.
            noted._dynamo_marked_constant = True  # type: ignore[attr-defined]
            self._note = noted

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del args
        if self._note is not None:
            self._note()
            return
        _remove(self, module._forward_pre_hooks)

    @property
    def __globals__(self) -> dict[str, Any]:
        """What scripting reads first of a hook."""
        raise PruningError(
            "torch.jit.script can't compile the hooks that watch the first update: script the "
            "model after the first step(), or build the pruner with an `example_input`"
        )

    def _hooks(self) -> object:
        """The dictionary of hooks that holds this one."""
        module = None if self._module is None else self._module()
        return None if module is None else module._forward_pre_hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallHook:
        hook = _CallHook()
        copied_hooks = memo.get(id(self._hooks()))
        if copied_hooks is not None:  # they get this hook now, and lose it when the copy is done
            memo.setdefault(id(memo), []).append(_Removal(hook, copied_hooks))
        return hook

    def __reduce__(self) -> tuple[type[_CallHook], tuple[()]]:
        return _CallHook, ()


class _Removal:
    """Removes a hook from the copy of a dictionary of hooks when `copy.deepcopy` has ended."""

    def __init__(self, hook: _CallHook, hooks: MutableMapping[int, object]) -> None:
        self._hook, self._hooks = hook, hooks

    def __del__(self) -> None:
        _remove(self._hook, self._hooks)


def _remove(hook: _CallHook, hooks: MutableMapping[int, Any]) -> None:
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run compiled parts of a model as they are; without any, the compiler needn't be loaded."""
    is_compiled = any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


@torch.no_grad()
def _read_without_call(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: tuple[Any, ...]
) -> set[str]:
    """The layers whose own weights still act after copies of them have answered all calls.

    The weights are filled with NaN, first all of them, and each by itself if that shows.
    """
    if not _is_finite(model(*inputs)):
        return set()
    weights = {}
    for name, layer in layers.items():
        twin: Any = copied_module(layer)
        layer.forward = partial(twin.__call__)
        weights[name] = layer_weight(layer)
    kept = {name: weight.clone() for name, weight in weights.items()}

    def acts(names: Iterable[str]) -> bool:
        for name in names:
            weights[name].fill_(torch.nan)
        try:
            return not _is_finite(model(*inputs))
        finally:
            for name in names:
                weights[name].copy_(kept[name])

    return {name for name in layers if acts([name])} if acts(list(layers)) else set()


def _is_finite(output: object) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(output))


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (list, tuple)):
        yield from (tensor for value in output for tensor in _tensors(value))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from _tensors(vars(output))
