"""Quantization-aware training: a model learns with the rounding that int8 will bring."""

from __future__ import annotations

import copy
from importlib.metadata import version

import torch
from torch import Tensor, fx, nn

from starfire_prune.quantization import torchao
from starfire_prune.quantization.assembling import assemble
from starfire_prune.quantization.checks import check_masks, check_model
from starfire_prune.quantization.exporting import exported_module
from starfire_prune.quantization.origin import Origin, model_on_meta, pruned_weights, set_origin
from starfire_prune.quantization.reading import read_scheme
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
        model: The model, in float32 on the CPU, with masks that a `Pruner` has frozen.
        images: A batch of training images (N, C, H, W); only its shape matters.
        reduced_range: As in `quantize`.

    Attributes:
        module: The model to train, in training mode. `module.eval()` and `module.train()`, which
            return nothing here, switch batch norms and dropout.

    Raises:
        PruningError: If the pruning is not finished.
        QuantizationError: If the model is not in float32 on the CPU, contains NaN, carries masks of
            `torch.nn.utils.prune`, or torchao copies its parameters.
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

    def __init__(self, model: nn.Module, images: Tensor, *, reduced_range: bool = False) -> None:
        check_finished(model)
        pt2e = torchao.package()
        self._model = unwrap(model)
        check_model(self._model)
        _refuse_masks(self._model)
        self._masks = pruned_weights(self._model)
        self._example = images[:1].detach().clone()
        graph = exported_module(self._model.train(), self._example)
        torchao.mark_sources(graph)
        settings = torchao.quantizer(trains=True, reduced_range=reduced_range)
        self.module: fx.GraphModule = pt2e.prepare_qat_pt2e(graph, settings)
        _check_shared(self._model, self.module)
        torchao.package("").allow_exported_model_train_eval(self.module)
        self.module.train()

    def __repr__(self) -> str:
        return f"QuantizedTraining({type(self._model).__name__}, {len(self._masks)} pruned weights)"

    def check(self) -> None:
        """Raise PruningError if a weight that was zero at the beginning no longer is."""
        weights = dict(self._model.named_parameters())
        for name, mask in self._masks.items():
            if alive := int(torch.count_nonzero(weights[name].detach()[~mask])):
                raise PruningError(
                    f"{name}: {alive} pruned weights are no longer zero: call pruner.step() after "
                    f"each optimizer.step()"
                )

    def finished(self) -> fx.GraphModule:
        """The int8 model with the scales that were trained, as `quantize` returns one.

        The training can go on afterwards. torchao takes half a minute to fold batch norms.

        Raises:
            PruningError: From `check`.
            QuantizationError: If weights have become NaN or infinite.
        """
        self.check()
        dense = dense_copy(self._model).eval()
        check_model(dense)
        twin = copy.deepcopy(self.module)  # conversion folds batch norms into shared weights
        twin.eval()
        scheme = read_scheme(torchao.package().convert_pt2e(twin, fold_quantize=False))
        quantized = assemble(exported_module(dense, self._example), scheme)
        state = quantized.state_dict()
        masks = {name: mask for name, mask in self._masks.items() if name in state}
        versions = {name: version(name) for name in ("torch", "torchao")}
        shape = tuple(self._example.shape[1:])
        origin = Origin(model_on_meta(dense), masks, shape, 0, "training", versions)
        check_masks(set_origin(quantized, origin))
        return quantized


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
