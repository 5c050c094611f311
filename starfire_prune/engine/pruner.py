"""The engine: brings a model through the dense phase, the pruning era and the fixed phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.engine.attached import Attached
from starfire_prune.engine.calls import CallWatch
from starfire_prune.engine.computed import check_computed
from starfire_prune.engine.distributed import (
    compare_across_ranks,
    hash_of_masks,
    keep_buffers_from_ddp,
    refuse_sharded,
)
from starfire_prune.engine.earlier import EarlierPruning
from starfire_prune.engine.era import Era
from starfire_prune.engine.fixed import FixedMasks, check_zeros
from starfire_prune.engine.mirrors import mirror_of, sync_mirror
from starfire_prune.engine.not_finite import not_finite_text
from starfire_prune.engine.obstacles import log_left_out
from starfire_prune.engine.optimizers import WithOptimizer
from starfire_prune.engine.parts import names_within
from starfire_prune.engine.plain_keys import add_plain_keys, remove_plain_keys
from starfire_prune.engine.progress import Progress
from starfire_prune.engine.scheduled import Scheduled
from starfire_prune.engine.selection import PrunedLayer, select_layers
from starfire_prune.engine.settings import Pruning, parse_pruning
from starfire_prune.engine.sparsity import Sparsity, measure_sparsity
from starfire_prune.engine.state import PrunerState
from starfire_prune.engine.zero_inputs import prunes_dead_inputs, zero_inputs_of
from starfire_prune.methods.base import find_hook, make_permanent
from starfire_prune.utils.errors import PruningError
from starfire_prune.utils.marks import mark_layers, unmark
from starfire_prune.utils.modules import layer_weight, unwrap, weight_key

__all__ = ["Pruner"]


class Pruner(Scheduled, WithOptimizer):
    """Prunes a model while it trains: Algorithm 2 of the paper, with fixed masks after the era.

    - `dense`, before the era: the model has no hooks after the first update, and `step()` only
      counts updates.
    - `era`: the selected layers carry the hooks and `weight_mask` buffers of
      `torch.nn.utils.prune`, and every `step()` brings them to the schedule's target sparsity.
    - `fixed`, after it: the pruning is permanent and the masks are frozen. Pruned weights are
      exactly zero at every forward pass, and training is as if they did not exist: their gradients
      are masked before anything reads them, their optimizer state is zeroed, and `step()` masks
      the weights again.

    The schedule counts the updates that happened. Era `[a, b]` runs from the first update of
    epoch a (0-based) to the last of epoch b - 1, and `era_updates: [a, b]` from update a to update
    b - 1 of the run; the u-th of its T updates has the target sparsity `amount * schedule(u / T)`,
    and the last one is exact.

    Args:
        model: The model, also wrapped by DDP or `torch.compile`. Build the optimizer from it first.
        pruning: `recipe.pruning`, or a mapping of the same keys such as
            `{"method": "ck", "amount": 0.6, "era": [2, 8]}`. `method` may also be a class that
            derives from `MaskMethod`, and `schedule` a function.
        updates_per_epoch: Optimizer steps of an epoch, `ceil(batches / gradient accumulation)`;
            unnecessary with `era_updates`. An epoch may have fewer or more: the schedule then waits
            for the next epoch, or rises to the target at the end of the last one.
        optimizer: The optimizer whose state of pruned weights is zeroed at the end of the era. It
            can be set later, or exchanged: `pruner.optimizer = optimizer`. Without it, old momentum
            of pruned weights is still part of norms (LAMB, clipping by state).
        example_input: A small batch such as `torch.zeros(2, 3, 224, 224)`, or the tuple of the
            model's arguments. `prune_dead_inputs: true` and the method `dead_inputs` need it to
            look for channels that are always zero in the model's graph. It also shows at once
            whether the model reads a weight without calling its layer, which hooks note during the
            first update otherwise (a compiled model is compiled again when they are removed).
        prune_again: Whether the model may carry an earlier pruning, an error at the first update
            otherwise: a resumed run needs the pruner's state.

    Attributes:
        layers: The layers that are pruned, by name.
        left_out: The layers that only `*` selects and that can't be pruned, with the logged reason.

    Raises:
        RecipeError: For unknown keys or values in `pruning`.
        ValueError: For patterns that match nothing, layers that patterns name and that can't be
            pruned as asked or would lose all their weights, FSDP-sharded parameters, and a missing
            `example_input`.
        PruningError: If another pruner of one of the layers has not finished.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Flatten(), nn.Linear(10, 10))
        >>> pruner = Pruner(model, {"method": "ck", "amount": 0.6, "era_updates": [0, 1]})
        >>> pruner.step()
        >>> pruner.phase, pruner.sparsity().network
        ('fixed', 0.6)
    """

    def __init__(
        self,
        model: nn.Module,
        pruning: Pruning | Mapping[str, object],
        *,
        updates_per_epoch: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        example_input: Tensor | tuple[Any, ...] | None = None,
        prune_again: bool = False,
    ) -> None:
        refuse_sharded(model)
        self.pruning = parse_pruning(pruning)
        self._progress = Progress(self.pruning, updates_per_epoch)
        self._zero_inputs = zero_inputs_of(model, self.pruning, example_input)
        connected: frozenset[str] = frozenset()
        if self._zero_inputs and prunes_dead_inputs(self.pruning):
            connected = self._zero_inputs.fully_connected
        selection = select_layers(model, self.pruning, connected, example_input)
        self.layers = {layer.name: layer for layer in selection.layers}
        self.left_out = dict(selection.left_out)
        log_left_out(self.left_out)
        self._model = unwrap(model)
        self._fixed: FixedMasks | None = None
        self.optimizer = optimizer
        self._attached = Attached(self._model, self._modules(), self._progress)
        self._mirrors: list[dict[str, nn.Module]] = []
        self._era = Era(self.layers.values(), self.pruning.resolution, self._zero_inputs)
        keep_buffers_from_ddp(model, self._modules().values(), "weight_mask")
        self._calls = None if selection.calls_are_known else CallWatch(self._modules())
        self._earlier = EarlierPruning(() if prune_again else selection.layers)
        self._mark_layers()

    def __repr__(self) -> str:
        return (
            f"Pruner({self.pruning.method}, {len(self.layers)} layers, phase={self.phase!r}, "
            f"target_sparsity={self.target_sparsity:.4f})"
        )

    def step(self, updated: bool = True) -> None:
        """Call after each `optimizer.step()`, before the next forward pass.

        Args:
            updated: Whether the weights really changed: False while gradients accumulate, and if a
                gradient scaler skipped the step. The schedule counts updates only.

        Raises:
            ValueError: For weights that are NaN or infinite, with the layer's name.
            PruningError: At the first update, if the model reads a weight without calling its layer
                or carries an earlier pruning; at the end of the era, if a layer has lost all its
                weights; in the fixed phase, if parameters were replaced or not trained; in
                inference mode, or if a layer got a parametrization.
            RanksError: At the end of the era, if the masks of distributed ranks differ.
        """
        if not updated:
            return
        self._attached.check_update()
        if self._calls is not None:
            self._calls.finish()
            self._calls = None
        self._earlier.finish()
        if self._fixed is not None:
            self._fixed.mask_weights()
            return
        if self._progress.count_update():
            self._update_masks(self._progress.share)
            if self._progress.ends_era:
                self._freeze()

    def end_epoch(self, epoch: int) -> None:
        """Call at the end of each epoch, with its 0-based number; optional with `era_updates`.

        The era's last epoch ends with the target, also if skipped steps left it short.

        Raises:
            ValueError: If `epoch` is not the current one.
        """
        self._attached.check()
        if self._progress.end_epoch(epoch):
            self._update_masks(1.0)
            self._freeze()
        self._progress.set(epoch=epoch + 1, epoch_updates=0)

    def masks(self) -> dict[str, Tensor]:
        """The present bool masks by parameter name (`layer1.0.conv1.weight`), True = kept.

        Empty in the dense phase. The tensors are the live ones: clone them to keep them.
        """
        self._progress.check_attached()
        if self._fixed is not None:
            return {weight_key(name): mask for name, mask in self._fixed.masks.items()}
        if self.phase == "dense":
            return {}
        return {weight_key(name): _mask(layer.module).bool() for name, layer in self._items()}

    def sparsity(self, model: nn.Module | None = None) -> Sparsity:
        """The zeros of each layer, over the pruned layers and over the whole network.

        Args:
            model: A mirrored model that is measured instead of the pruned one, or a part of either
                that holds all pruned layers.
        """
        model = self._model if model is None else model
        names, zeros = self.names_in(model), self._progress.state.dead_input_zeros
        return measure_sparsity(
            model,
            selected=names.values(),
            dead_input_zeros={names[name]: count for name, count in zeros.items()},
        )

    def names_in(self, model: nn.Module) -> dict[str, str]:
        """The names of the pruned layers within a mirror or a part of the model, by their names.

        Raises:
            ValueError: If the model lacks a pruned layer, or has another shape there.
        """
        shapes = {name: layer.shape for name, layer in self._items()}
        return names_within(model, [self._modules(), *self._mirrors], shapes)

    def kept_columns(self) -> dict[str, str]:
        """Why a layer under `dead_inputs` has no column that always reads zero, by its name.

        In a ResNet the classifier's input comes from an addition, so that all its columns are kept.
        Call it on every rank.
        """
        readers = [name for name, layer in self._items() if layer.method.reads_zero_inputs]
        reasons = self._zero_inputs.reasons() if readers and self._zero_inputs else {}
        return {name: reasons[name] for name in readers if name in reasons}

    def mask_hash(self) -> str:
        """A SHA-256 of all masks, the same on every rank as long as the masks are."""
        return hash_of_masks(self.masks())

    def check(self) -> None:
        """Verify that the pruning holds; call it before every save, on every rank.

        Raises:
            PruningError: With the layer and the count, if a pruned weight is not zero (here or in
                a mirror), or not in what the layer computes, or if a hook of the era is missing.
            RanksError: If the masks of ranks differ.
        """
        self._progress.check_attached()
        if self.phase == "era":
            for name, layer in self._items():
                if find_hook(layer.module, "weight")[1] is None:
                    raise PruningError(f"layer {name} has lost its pruning hook within the era")
        self._attached.check()
        self._compare_ranks()  # first: a rank that raised by itself would leave the others waiting
        if self._fixed is not None:
            for modules in [self._modules(), *self._mirrors]:
                check_zeros(modules, self._fixed.masks)
                check_computed(modules)

    def mirror(self, model: nn.Module) -> nn.Module:
        """Let a copy of the model, such as a weight average, follow through all phases.

        From now on `model` gets the same hooks, masks and removals, so that its state dict has
        the keys and the order of the pruned model's. Make the copy, mirror it, and update it
        after `step()`: `pruner.mirror(ema.module)`.

        Returns: `model`.

        Raises:
            ValueError: If it lacks a pruned layer or has another shape there, and if it is the
                pruned model itself or mirrored already.
        """
        self._progress.check_attached()
        known = [module for own in [self._modules(), *self._mirrors] for module in own.values()]
        mirror = mirror_of(model, self.layers, known)
        self._mirrors.append(mirror)
        self._sync_mirrors([mirror])
        self._mark_layers()
        return model

    def remove(self) -> None:
        """Make permanent what is reached, in any phase, and detach from the model and its mirrors.

        Afterwards they are plain models, as after `torch.nn.utils.prune.remove`: pruned weights are
        zero, but no longer kept so in training, and the model counts as finished. The pruner can't
        be used any more. Call it before functions that replace weights, such as `fuse()`, if
        training ended within the era.
        """
        self._remove_hooks()
        self._progress.detach()
        for modules in [self._modules(), *self._mirrors]:
            unmark(modules.values())

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the model, as plain numbers, strings and bool tensors."""
        masks = {name: mask.clone() for name, mask in self.masks().items()}
        state, applied = self._progress.state, dict(self._era.applied)
        return dataclasses.replace(state, masks=masks, applied=applied).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict()`, before or after the model's own state dict.

        Raises:
            ValueError: If the state is of other settings, another model or another version.
        """
        self._progress.check_attached()
        shapes = {weight_key(name): layer.shape for name, layer in self._items()}
        loaded = PrunerState.from_dict(state)
        loaded.check_fits(self.pruning, self._progress.updates_per_epoch, shapes)
        self._earlier.dismiss()
        self._remove_hooks()
        self._era.applied = dict(loaded.applied)
        self._progress.load(loaded)
        if self.phase == "dense":
            self._mark_layers()
            return
        masks = {
            name: loaded.masks[weight_key(name)].to(layer_weight(layer.module).device)
            for name, layer in self._items()
        }
        if self.phase == "era":
            for name, layer in self._items():
                layer.method_at(0.0).register(layer.module, "weight", masks[name])
                add_plain_keys(layer.module)
        else:
            self._fixed = FixedMasks(self._modules(), masks, self._optimizer)
        self._sync_mirrors(self._mirrors)
        self._mark_layers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._fixed is not None:
            self._fixed.set_optimizer(self._optimizer)  # copies of frozen masks have none
        self._mark_layers()  # pickles of layers have no marks

    def _update_masks(self, progress: float) -> None:
        """Bring the masks, and those of the mirrors, to the amounts at `progress`."""
        self._progress.set(phase="era")
        self._attached.begin_era()
        try:
            changed = self._era.update_masks(progress)
        except ValueError as error:
            cause = not_finite_text(self._model, self._progress.state.updates)
            raise ValueError(f"{error}{cause}") from None
        self._sync_mirrors(self._mirrors, changed)

    def _freeze(self) -> None:
        """End the era: make the pruning permanent and begin the fixed phase."""
        if self.pruning.prune_dead_inputs and self._zero_inputs:
            masks = {name: _mask(layer.module) for name, layer in self._items()}
            self._progress.set(dead_input_zeros=self._zero_inputs.prune_readers(masks))
            self._sync_mirrors(self._mirrors)
        self._compare_ranks()
        masks = {name: _mask(layer.module) for name, layer in self._items()}
        for name, mask in masks.items():
            if not bool(mask.any()):
                raise PruningError(f"layer {name} has lost all its weights: lower its amount")
        self._attached.end_era(self._progress.state.era_updates)
        self._make_permanent()
        self._progress.set(phase="fixed")
        self._fixed = FixedMasks(self._modules(), masks, self._optimizer)
        self._mark_layers()

    def _mark_layers(self) -> None:
        """Mark the layers as pruned, by which saves and exports ask whether they are finished."""
        masks = {} if self._fixed is None else self._fixed.masks
        for modules in [self._modules(), *self._mirrors]:
            mark_layers(modules.items(), self._progress, masks)

    def _remove_hooks(self) -> None:
        """Go back to plain modules without hooks; pruned weights are left zero."""
        if self._fixed is not None:
            self._fixed.remove()
            self._fixed = None
        self._make_permanent()

    def _make_permanent(self) -> None:
        for modules in [self._modules(), *self._mirrors]:
            for module in modules.values():
                if find_hook(module, "weight")[1] is not None:
                    make_permanent(module, "weight")
                    remove_plain_keys(module)

    def _compare_ranks(self) -> None:
        device = layer_weight(next(iter(self.layers.values())).module).device
        reason = "the ranks' weights have drifted apart"
        compare_across_ranks(self.mask_hash, "pruning masks", device, reason)

    def _sync_mirrors(
        self, mirrors: list[dict[str, nn.Module]], names: Iterable[str] | None = None
    ) -> None:
        """Bring mirrors to the masks of the model, all of them or those of some layers."""
        if not mirrors or self.phase == "dense":
            return
        masks = self.masks()
        layers = {name: self.layers[name] for name in (self.layers if names is None else names)}
        for mirror in mirrors:
            sync_mirror(mirror, layers, masks, self.phase)

    def _items(self) -> Iterable[tuple[str, PrunedLayer]]:
        return self.layers.items()

    def _modules(self) -> dict[str, nn.Module]:
        return {name: layer.module for name, layer in self._items()}


def _mask(module: nn.Module) -> Tensor:
    return module.get_buffer("weight_mask")
