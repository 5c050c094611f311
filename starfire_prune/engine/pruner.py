"""The engine: brings a model through the dense phase, the pruning era and the fixed phase."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from starfire_prune.engine.distributed import (
    compare_across_ranks,
    keep_buffers_from_ddp,
    refuse_sharded,
)
from starfire_prune.engine.gradients import mask_gradient
from starfire_prune.engine.selection import PrunedLayer, amount_at, select_layers
from starfire_prune.engine.sparsity import Sparsity, measure_sparsity
from starfire_prune.engine.state import STATE_VERSION, check_state
from starfire_prune.engine.zero_inputs import prunes_by_structure, reads_any, zero_inputs_of
from starfire_prune.methods.base import MaskMethod, find_hook, make_permanent
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.modules import layer_weight, prunable_layers, unwrap

if TYPE_CHECKING:
    from starfire_prune.engine.settings import Pruning

__all__ = ["Phase", "Pruner"]


Phase = Literal["dense", "era", "fixed"]


class Pruner:
    """Prunes a model while it trains: Algorithm 2 of the paper, with fixed masks after the era.

    - `dense`, before the era: nothing is hooked and nothing is paid.
    - `era`: the selected layers carry the hooks and `weight_mask` buffers of
      `torch.nn.utils.prune`, and every `step()` brings them to the schedule's target_sparsity.
    - `fixed`, after it: the pruning is permanent. Pruned weights are exactly zero at every
      forward pass, and training is as if they did not exist: their gradients are masked where
      they arise, their optimizer state is zeroed, and `step()` masks the weights again.

    The schedule counts the updates that happened. Era `[a, b]` runs from the first update of
    epoch a (0-based) to the last of epoch b - 1; the u-th of its T updates has the target_sparsity
    `amount * schedule(u / T)`, and the last one is exact.

    Args:
        model: also wrapped by DDP or `torch.compile`. Build the optimizer from it first.
        pruning: `recipe.pruning`, or a mapping of the same keys such as
            `{"method": "ck", "amount": 0.6, "era": [2, 8]}`.
        updates_per_epoch: optimizer steps an epoch, `ceil(batches / gradient accumulation)`.
        optimizer: whose state of pruned weights is zeroed at the end of the era. Without it, old
            momentum of pruned weights goes on to take part in norms (LAMB, clipping by state).
        example_input: a small batch such as `torch.zeros(2, 3, 224, 224)`, or the tuple of the
            model's arguments; for `prune_dead_inputs: true` and the method `dead_inputs`, which
            look into the model's graph for channels that are always zero.

    Raises:
        RecipeError: for unknown keys or values in `pruning`.
        ValueError: for patterns that match nothing, layers that can't be pruned as asked or would
            lose all their weights, FSDP-sharded parameters, and a missing `example_input`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Flatten(), nn.Linear(10, 10))
        >>> settings = {"method": "ck", "amount": 0.6, "era": [0, 1]}
        >>> pruner = Pruner(model, settings, updates_per_epoch=1)
        >>> pruner.step()
        >>> pruner.phase, pruner.sparsity().network
        ('fixed', 0.6)
    """

    def __init__(
        self,
        model: nn.Module,
        pruning: Pruning | Mapping[str, object],
        *,
        updates_per_epoch: int,
        optimizer: torch.optim.Optimizer | None = None,
        example_input: Tensor | tuple[Any, ...] | None = None,
    ) -> None:
        from starfire_prune.engine.settings import parse_pruning  # not before: it loads pydantic

        if isinstance(updates_per_epoch, bool) or not isinstance(updates_per_epoch, int):
            raise TypeError(f"`updates_per_epoch` (={updates_per_epoch!r}) must be an int")
        if updates_per_epoch < 1:
            raise ValueError(f"`updates_per_epoch` (={updates_per_epoch}) must be at least 1")
        refuse_sharded(model)
        self.pruning = parse_pruning(pruning)
        self.updates_per_epoch = updates_per_epoch
        self._zero_inputs = zero_inputs_of(model, self.pruning, example_input)
        connected: frozenset[str] = frozenset()
        if self._zero_inputs and prunes_by_structure(self.pruning):
            connected = self._zero_inputs.fully_connected
        self.layers = {layer.name: layer for layer in select_layers(model, self.pruning, connected)}
        self._model = unwrap(model)
        self._optimizer = optimizer
        self._mirrors: list[dict[str, nn.Module]] = []
        self._phase: Phase = "dense"
        self._epoch = 0
        self._epoch_updates = 0
        self._era_updates = 0
        self._applied: dict[str, float] = {}  # progress at which each layer's mask was worked out
        self._dead_input_zeros: dict[str, int] = {}  # weights that only read zeros, by layer
        self._masks: dict[str, Tensor] = {}  # of the fixed phase
        self._gradient_hooks: list[RemovableHandle] = []
        keep_buffers_from_ddp(model, self._modules().values(), "weight_mask")

    def __repr__(self) -> str:
        return (
            f"Pruner({self.pruning.method}, {len(self.layers)} layers, phase={self.phase!r}, "
            f"target_sparsity={self.target_sparsity:.4f})"
        )

    @property
    def phase(self) -> Phase:
        """`"dense"`, `"era"` or `"fixed"`."""
        return self._phase

    @property
    def epoch(self) -> int:
        """The epoch that is under way, 0-based."""
        return self._epoch

    @property
    def target_sparsity(self) -> float:
        """The sparsity wanted at this step, in [0, 1]; overrides and `fc` have their own."""
        if self._phase == "dense":
            return 0.0
        if self._phase == "fixed":
            return self.pruning.amount
        return amount_at(self.pruning, self._progress)

    @property
    def _era_length(self) -> int:
        first, end = self.pruning.era
        return (end - first) * self.updates_per_epoch

    @property
    def _progress(self) -> float:
        return self._era_updates / self._era_length

    def step(self, updated: bool = True) -> None:
        """Call after each `optimizer.step()`, before the next forward pass.

        Args:
            updated: whether the weights really changed: false while gradients accumulate and
                where a gradient scaler skipped the step. The schedule counts updates only.

        Raises:
            ValueError: for weights that are NaN or infinite, with the layer's name.
            RuntimeError: if an epoch has more updates than `updates_per_epoch`.
            PruningError, RanksError: at the end of the era, if a layer has lost all its weights,
                or if the masks of distributed ranks differ.
        """
        if not updated:
            return
        if self._phase == "fixed":
            self._mask_weights()
            return
        self._epoch_updates += 1
        if self._epoch_updates > self.updates_per_epoch:
            raise RuntimeError(
                f"step() has counted {self._epoch_updates} updates in epoch {self._epoch}, and "
                f"`updates_per_epoch` is {self.updates_per_epoch}: it must be ceil(batches / "
                f"gradient accumulation), and end_epoch(epoch) must follow each epoch"
            )
        if self._epoch >= self.pruning.era[0]:
            self._era_updates += 1
            self._tighten(self._progress)
            if self._era_updates == self._era_length:
                self._fix()

    def end_epoch(self, epoch: int) -> None:
        """Call at the end of each epoch, with its 0-based number.

        The era's last epoch ends with the target, also where skipped steps left it short.

        Raises:
            ValueError: if `epoch` is not the one under way.
        """
        if epoch != self._epoch:
            raise ValueError(
                f"`epoch` (={epoch}) is not the one under way, {self._epoch}: call end_epoch once "
                f"an epoch, and load_state_dict when resuming"
            )
        if self._phase != "fixed" and epoch == self.pruning.era[1] - 1:
            self._tighten(1.0)
            self._fix()
        self._epoch += 1
        self._epoch_updates = 0

    def skip_dense(self, epochs: int) -> None:
        """Take that many epochs of the dense phase for done, as where dense weights are loaded.

        Raises:
            ValueError: if the era begins before them.
            RuntimeError: if an epoch has begun already.
        """
        if not 0 <= epochs <= self.pruning.era[0]:
            raise ValueError(
                f"`epochs` (={epochs}) must be in 0..{self.pruning.era[0]}, where the era begins"
            )
        if self._epoch or self._epoch_updates:
            raise RuntimeError("skip_dense() comes before the first step() and end_epoch()")
        self._epoch = epochs

    def masks(self) -> dict[str, Tensor]:
        """The present bool masks by parameter name (`layer1.0.conv1.weight`), True = kept.

        Empty in the dense phase. The tensors are the live ones: clone them to keep them.
        """
        if self._phase == "era":
            return {_key(name): _mask(layer.module).bool() for name, layer in self._items()}
        return {_key(name): mask for name, mask in self._masks.items()}

    def sparsity(self, model: nn.Module | None = None) -> Sparsity:
        """The zeros of each layer, over the pruned layers and over the whole network.

        Args:
            model: a mirrored one, to be measured in the pruned one's place.
        """
        measured = self._model if model is None else model
        return measure_sparsity(
            measured, selected=self.layers, dead_input_zeros=self._dead_input_zeros
        )

    def kept_columns(self) -> dict[str, str]:
        """Why a layer under `dead_inputs` has no column that always reads zero, by its name.

        In a ResNet the classifier's input comes from an addition, so that all its columns stay.
        Call it on every rank.
        """
        structured = [name for name, layer in self._items() if layer.method == "dead_inputs"]
        reasons = self._zero_inputs.reasons() if structured and self._zero_inputs else {}
        return {name: reasons[name] for name in structured if name in reasons}

    def mask_hash(self) -> str:
        """A SHA-256 of all masks, the same on every rank as long as the masks are."""
        digest = hashlib.sha256()
        for name, mask in sorted(self.masks().items()):
            digest.update(name.encode())
            digest.update(np.packbits(mask.contiguous().cpu().numpy()).tobytes())
        return digest.hexdigest()

    def check(self) -> None:
        """Verify that the pruning holds; call it before every save, on every rank.

        Raises:
            PruningError: naming the layer and the count, if a pruned weight is not zero (here or
                in a mirror), or if a hook of the era is gone.
            RanksError: if the masks of ranks differ.
        """
        if self._phase == "era":
            for name, layer in self._items():
                if find_hook(layer.module, "weight")[1] is None:
                    raise PruningError(f"layer {name} has lost its pruning hook within the era")
        self._compare_ranks()  # first: a rank that raised alone would leave the others waiting
        if self._phase == "fixed":
            for modules in [self._modules(), *self._mirrors]:
                _check_zeros(modules, self._masks)

    def mirror(self, model: nn.Module) -> nn.Module:
        """Let a copy of the model, such as a weight average, follow through all phases.

        From now on `model` gets the same hooks, masks and removals, so that its state dict has
        the keys and the order of the pruned model's. Make the copy, mirror it, and update it
        after `step()`: `pruner.mirror(ema.module)`.

        Returns:
            `model`.

        Raises:
            ValueError: if it lacks a pruned layer or has another shape there, and if it is the
                pruned model itself or mirrored already.
        """
        modules = prunable_layers(model)
        for name, layer in self._items():
            shape = layer_weight(layer.module).shape
            if name not in modules or layer_weight(modules[name]).shape != shape:
                raise ValueError(
                    f"the mirrored model has no layer {name} with a weight of shape {tuple(shape)}"
                )
        mirror = {name: modules[name] for name in self.layers}
        known = [module for own in [self._modules(), *self._mirrors] for module in own.values()]
        if any(module is other for module in mirror.values() for other in known):
            raise ValueError(
                "the model is the pruned one itself, or mirrored already: mirror a copy, once"
            )
        self._mirrors.append(mirror)
        if self._phase != "dense":
            self._follow(mirror)
        return model

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the model, as plain numbers, strings and bool tensors."""
        return {
            "version": STATE_VERSION,
            "pruning": self.pruning.model_dump(mode="json"),
            "updates_per_epoch": self.updates_per_epoch,
            "phase": self._phase,
            "epoch": self._epoch,
            "epoch_updates": self._epoch_updates,
            "era_updates": self._era_updates,
            "applied": dict(self._applied),
            "free": dict(self._dead_input_zeros),
            "masks": {name: mask.clone() for name, mask in self.masks().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`'s result; then load the model's own state dict.

        The hooks of the saved phase are put on here, so that the model has the saved names.

        Raises:
            ValueError: if the state is of other settings, another model or another version.
        """
        shapes = {_key(name): layer_weight(layer.module).shape for name, layer in self._items()}
        check_state(state, self.pruning, self.updates_per_epoch, shapes)
        self._to_dense()
        self._phase = state["phase"]
        self._epoch = state["epoch"]
        self._epoch_updates = state["epoch_updates"]
        self._era_updates = state["era_updates"]
        self._applied = dict(state["applied"])
        self._dead_input_zeros = dict(state["free"])
        masks = {
            name: state["masks"][_key(name)].to(layer_weight(layer.module).device)
            for name, layer in self._items()
            if self._phase != "dense"
        }
        if self._phase == "era":
            for name, layer in self._items():
                layer.method_at(0.0).register(layer.module, "weight", masks[name])
        elif self._phase == "fixed":
            self._enter_fixed({name: mask.bool().clone() for name, mask in masks.items()})
        if self._phase != "dense":
            for mirror in self._mirrors:
                self._follow(mirror)

    # --- the era ---------------------------------------------------------------------------------

    def _tighten(self, progress: float) -> None:
        """Bring every layer whose counts have risen enough to its amount at `progress`."""
        self._phase = "era"
        layers = list(self.layers.values())
        changed = [
            layer.name
            for layer in layers
            if layer.method != "dead_inputs" and self._tighten_layer(layer, progress)
        ]
        structured = [layer for layer in layers if layer.method == "dead_inputs"]
        if structured:  # after the layers whose channels die
            changed += self._tighten_structured(structured, progress, bool(changed))
        for mirror in self._mirrors:
            self._follow(mirror, changed)

    def _tighten_structured(
        self, layers: list[PrunedLayer], progress: float, others_changed: bool
    ) -> list[str]:
        """The names of the layers under `dead_inputs` whose masks have changed."""
        is_first = any(layer.name not in self._applied for layer in layers)
        may_be_new = others_changed or is_first or progress == 1.0
        found = self._zero_inputs.find() if self._zero_inputs and may_be_new else {}
        changed = []
        for layer in layers:
            zeros = found.get(layer.name)
            if zeros is not None:
                layer = layer.reading_zeros_in(zeros)
            if self._tighten_layer(layer, progress, due=reads_any(layer.module, zeros)):
                changed.append(layer.name)
        return changed

    def _tighten_layer(self, layer: PrunedLayer, progress: float, due: bool = False) -> bool:
        method = layer.method_at(progress)
        if not due and not self._is_due(layer, method, progress):
            return False
        try:
            if find_hook(layer.module, "weight")[1] is None:
                method.register(layer.module, "weight")
            for stage in layer.methods_between(self._applied.get(layer.name, 0.0), progress):
                stage.tighten(layer.module, "weight")
        except ValueError as error:
            raise ValueError(f"layer {layer.name}: {error}") from None
        self._applied[layer.name] = progress
        return True

    def _is_due(self, layer: PrunedLayer, method: MaskMethod, progress: float) -> bool:
        """Masks are monotone: between two rises of a count the present mask is still exact."""
        if layer.name not in self._applied or progress == 1.0:
            return True
        applied = layer.method_at(self._applied[layer.name])
        if type(method) is not type(applied):
            return True
        shape = layer_weight(layer.module).shape
        risen = [
            (now - then) / units
            for (now, units), (then, _) in zip(
                method.counts(shape), applied.counts(shape), strict=True
            )
        ]
        return max(risen) > 0 and max(risen) >= self.pruning.resolution

    def _fix(self) -> None:
        if self.pruning.prune_dead_inputs and self._zero_inputs:
            masks = {name: _mask(layer.module) for name, layer in self._items()}
            self._dead_input_zeros = self._zero_inputs.take_readers(masks)
            for mirror in self._mirrors:
                self._follow(mirror)
        self._compare_ranks()
        masks = {name: _mask(layer.module).bool().clone() for name, layer in self._items()}
        for name, mask in masks.items():
            if not bool(mask.any()):
                raise PruningError(f"layer {name} has lost all its weights: lower its amount")
        for modules in [self._modules(), *self._mirrors]:
            for module in modules.values():
                make_permanent(module, "weight")
        self._phase = "fixed"
        self._enter_fixed(masks)

    # --- the fixed phase ----------------------------------------------------------------------

    def _enter_fixed(self, masks: dict[str, Tensor]) -> None:
        self._masks = masks
        self._mask_weights()
        for name, layer in self._items():
            weight = layer_weight(layer.module)
            self._mask_optimizer_state(weight, masks[name])
            self._gradient_hooks.append(mask_gradient(weight, masks[name]))

    @torch.no_grad()
    def _mask_optimizer_state(self, weight: Tensor, mask: Tensor) -> None:
        if self._optimizer is not None:
            for value in self._optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.mul_(mask)

    @torch.no_grad()
    def _mask_weights(self) -> None:
        weights: list[Tensor] = [layer_weight(layer.module) for _, layer in self._items()]
        masks: list[Tensor] = list(self._masks.values())
        torch._foreach_mul_(weights, masks)

    # --- mirrors, ranks, state ------------------------------------------------------------------

    def _compare_ranks(self) -> None:
        device = layer_weight(next(iter(self.layers.values())).module).device
        reason = "the ranks' weights have drifted apart"
        compare_across_ranks(self.mask_hash, "pruning masks", device, reason)

    @torch.no_grad()
    def _follow(self, mirror: Mapping[str, nn.Module], names: list[str] | None = None) -> None:
        """Bring a mirror's layers to the masks of the model's."""
        masks = self.masks()
        for name in self.layers if names is None else names:
            module, mask = mirror[name], masks[_key(name)]
            _, hook = find_hook(module, "weight")
            if self._phase == "fixed":
                if hook is not None:
                    make_permanent(module, "weight")
                layer_weight(module).mul_(mask.to(layer_weight(module).device))
            elif hook is None:
                method = self.layers[name].method_at(0.0)
                method.register(module, "weight", mask.to(layer_weight(module).device))
            else:
                _mask(module).copy_(mask)

    def _to_dense(self) -> None:
        """Take off all hooks and masks; weights that were pruned are left zero."""
        for handle in self._gradient_hooks:
            handle.remove()
        self._gradient_hooks, self._masks = [], {}
        for modules in [self._modules(), *self._mirrors]:
            for module in modules.values():
                if find_hook(module, "weight")[1] is not None:
                    make_permanent(module, "weight")

    def _items(self) -> Iterator[tuple[str, PrunedLayer]]:
        return iter(self.layers.items())

    def _modules(self) -> dict[str, nn.Module]:
        return {name: layer.module for name, layer in self._items()}


def _key(name: str) -> str:
    """The name of a layer's weight; the layer may be the model itself."""
    return f"{name}.weight" if name else "weight"


def _mask(module: nn.Module) -> Tensor:
    mask: Tensor = module.get_buffer("weight_mask")
    return mask


def _check_zeros(modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        weight = layer_weight(module).detach()
        alive = int(((weight != 0) & ~masks[name].to(weight.device)).sum())
        if alive:
            raise PruningError(
                f"layer {name}: {alive} pruned weights are not zero; "
                f"step() must follow each optimizer step, and nothing else may write to them"
            )
