"""Quantization-aware training: a model learns with the rounding that int8 will bring."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import Tensor, fx, nn

from starfire_prune.quantization import torchao
from starfire_prune.quantization.assembling import assemble
from starfire_prune.quantization.checks import check_masks, check_model
from starfire_prune.quantization.exporting import exported_module
from starfire_prune.quantization.origin import Origin, model_on_meta, pruned_weights, set_origin
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.quantization.trained_graph import (
    batch_norm_settings,
    fold_batch_norms,
    lift_zero_scales,
    refuse_random_numbers,
    restore_batch_norms,
    set_fake_quantization,
    set_mode,
)
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import PruningError, QuantizationError
from starfire_prune.utils.marks import check_finished
from starfire_prune.utils.modules import unwrap

__all__ = ["QuantizedTraining"]


class QuantizedTraining:
    """Trains a model whose pruning is finished as it will compute in int8.

    Train through `module`, which rounds weights and activations to the steps of int8 in each
    forward pass. It shares the model's parameters and buffers: an optimizer of the model and its
    pruner go on as they are, and pruned weights stay zero. `finished` gives the int8 model.

    Args:
        model: The model, in float32 on the CPU, with masks that a `Pruner` has frozen. Scales of
            batch norms that are exactly 0 are set to 1e-8.
        images: A batch of training images (N, C, H, W); only its shape matters.
        reduced_range: As in `quantize`.
        masks: Masks of the pruned weights by parameter name, bool, True = kept; by default the
            weights that are zero now are pruned.

    Attributes:
        module: The model to train, in training mode. `module.train()` and `module.eval()` switch
            batch norms, dropout, and the observers that follow the ranges of weights and
            activations: an evaluation changes none of them.

    Raises:
        PruningError: If the pruning is not finished.
        QuantizationError: If the model is not in float32 on the CPU, contains NaN, carries masks of
            `torch.nn.utils.prune`, draws random numbers other than dropout's, or torchao copies its
            parameters.
        TraceError: If `torch.export` can't trace the model for batches of any size.
        ModuleNotFoundError: If torchao is not installed (the extra `quantize`).

    Example:
        >>> training = QuantizedTraining(model, images)  # doctest: +SKIP
        >>> for images, labels in loader:  # doctest: +SKIP
        ...     optimizer.zero_grad()
        ...     criterion(training.module(images), labels).backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> quantized = training.finished()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        reduced_range: bool = False,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_finished(model)
        pt2e = torchao.package()
        self._model = unwrap(model)
        check_model(self._model)
        _refuse_masks(self._model)
        self._masks = dict(pruned_weights(self._model) if masks is None else masks)
        self._example = images[:1].detach().clone()
        self._frozen = False
        lift_zero_scales(self._model)
        graph = exported_module(self._model.train(), self._example)
        refuse_random_numbers(graph)
        settings = batch_norm_settings(graph)
        torchao.mark_sources(graph)
        quantizer = torchao.quantizer(trains=True, reduced_range=reduced_range)
        self.module: fx.GraphModule = pt2e.prepare_qat_pt2e(graph, quantizer)
        _check_shared(self._model, self.module)
        restore_batch_norms(self.module, settings)
        self._set_modes()
        self._check_answers()

    def __repr__(self) -> str:
        return f"QuantizedTraining({type(self._model).__name__}, {len(self._masks)} pruned weights)"

    def freeze(self) -> None:
        """Fix the statistics of batch norms and the ranges of weights and activations.

        The rest goes on training: `module.train()` no longer changes them.
        """
        self._frozen = True
        self.module.train(self.module.training)

    def state(self) -> dict[str, Tensor]:
        """The tensors that the training needs beside those of the model: the ranges so far."""
        own, state = self._model.state_dict(), self.module.state_dict()
        return {
            name: tensor.clone()
            for name, tensor in state.items()
            if name not in own and not name.endswith("_enabled")  # which follow the mode
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            QuantizationError: If it is the state of another model's training.
        """
        own = self.state().keys()
        if state.keys() != own:
            raise QuantizationError("the state is of the training of another model")
        self.module.load_state_dict({**self.module.state_dict(), **state})

    def check(self) -> None:
        """Raise PruningError if a pruned weight is not zero."""
        weights = dict(self._model.named_parameters())
        for name, mask in self._masks.items():
            if alive := int(torch.count_nonzero(weights[name].detach()[~mask])):
                raise PruningError(
                    f"{name}: {alive} pruned weights are no longer zero: call pruner.step() after "
                    f"each optimizer.step()"
                )

    def finished(self) -> fx.GraphModule:
        """The int8 model with the scales that were trained, as `quantize` returns one.

        The training can go on afterwards.

        Raises:
            PruningError: From `check`.
            QuantizationError: If weights have become NaN or infinite.
        """
        self.check()
        dense = dense_copy(self._model).eval()
        check_model(dense)
        twin = copy.deepcopy(self.module)  # folding changes shared weights
        fold_batch_norms(twin)
        scheme = read_scheme(torchao.converted(twin))
        quantized = assemble(exported_module(dense, self._example), scheme)
        state = quantized.state_dict()
        masks = {name: mask for name, mask in self._masks.items() if name in state}
        versions = {name: version(name) for name in ("torch", "torchao")}
        shape = tuple(self._example.shape[1:])
        origin = Origin(model_on_meta(dense), masks, shape, 0, "training", versions)
        check_masks(set_origin(quantized, origin))
        return quantized

    def _set_modes(self) -> None:
        """Let `module.train` and `module.eval` switch the graph, as exported ones refuse to."""

        def train(mode: bool = True) -> fx.GraphModule:
            set_mode(self.module, mode, frozen=self._frozen)
            return self.module

        vars(self.module).update(train=train, eval=lambda: train(False))
        train()

    @torch.no_grad()
    def _check_answers(self) -> None:
        """Check that without rounding the graph computes in eval mode what the model does."""
        images = torch.cat([self._example, self._example.flip(-1)])
        set_fake_quantization(self.module, False)
        wanted, got = self._model.eval()(images), self.module.eval()(images)
        set_fake_quantization(self.module, True)
        self._model.train()
        self.module.train()
        if not isinstance(wanted, Tensor) or wanted.shape != got.shape:
            raise QuantizationError("only models that return one tensor can be trained so")
        if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            raise QuantizationError(
                f"the graph of {type(self._model).__name__} that torchao has prepared has other "
                f"outputs than the model: it can't be trained with quantization"
            )


def _refuse_masks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "weight_mask" in module._buffers:
            raise QuantizationError(
                f"layer {name} carries a mask of torch.nn.utils.prune, which training with "
                f"quantization does not apply: prune by a Pruner, whose masks are frozen"
            )


def _check_shared(model: nn.Module, module: fx.GraphModule) -> None:
    """Check that both have the same parameters, which no document of torchao's promises."""
    others = dict(module.named_parameters())
    for name, parameter in model.named_parameters():
        if name in others and others[name] is not parameter:
            raise QuantizationError(
                f"this version of torchao has copied {name}: masks and the optimizer would not act "
                f"on it; install torchao 0.18"
            )
