"""Training with quantization: shared parameters, masks, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import Pruner, ck_structured
from starfire_prune.quantization import QuantizedTraining, check_masks
from starfire_prune.quantization.origin import origin_of
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.serialization.quantized import load_quantized, save_quantized
from starfire_prune.utils.errors import PruningError, QuantizationError
from tests.support.quantized_networks import ResidualNet, images

pytest.importorskip("torchao")

LABELS = torch.arange(16) % 10


class Training:
    """A network that a Pruner prunes in the first update, and its optimizer."""

    def __init__(self) -> None:
        self.model = ResidualNet()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        pruning: dict[str, Any] = {"method": "ck", "amount": 0.5, "era": [0, 1]}
        self.pruner = Pruner(self.model, pruning, updates_per_epoch=1, optimizer=self.optimizer)

    def update(self, module: nn.Module, seed: int = 0, *, prunes: bool = True) -> Tensor:
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(module(images(16, seed)), LABELS)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if prunes:
            self.pruner.step()
        return loss.detach()


@pytest.fixture
def pruned() -> Training:
    training = Training()
    training.update(training.model)
    assert training.pruner.phase == "fixed"
    return training


@pytest.mark.slow  # torchao traces its patterns for seconds
def test_training_moves_the_models_own_weights_and_keeps_the_masks(pruned):
    training = QuantizedTraining(pruned.model, images())
    before = {name: value.clone() for name, value in pruned.model.named_parameters()}
    losses = [pruned.update(training.module) for _ in range(6)]
    assert losses[-1] < losses[0]
    for name, value in pruned.model.named_parameters():
        assert not torch.equal(value, before[name]), name
        if value.dim() > 1:
            assert torch.equal(value == 0, before[name] == 0), name
    training.check()
    pruned.pruner.check()


@pytest.mark.slow
def test_the_module_rounds(pruned):
    training = QuantizedTraining(pruned.model, images())
    pruned.update(training.module)
    training.module.eval()
    with torch.no_grad():
        rounded, plain = training.module(images()), pruned.model.eval()(images())
    assert not torch.equal(rounded, plain)
    assert (rounded - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.slow
def test_eval_mode_does_not_change_batch_norms(pruned):
    training = QuantizedTraining(pruned.model, images())
    training.module.eval()
    mean = pruned.model.bn.running_mean.clone()
    training.module(images())
    assert torch.equal(pruned.model.bn.running_mean, mean)
    training.module.train()
    training.module(images())
    assert not torch.equal(pruned.model.bn.running_mean, mean)


@pytest.mark.slow
def test_pruned_weights_that_come_back_are_reported(pruned):
    training = QuantizedTraining(pruned.model, images())
    with torch.no_grad():
        weight = pruned.model.conv1.weight
        weight[weight == 0] = 1.0
    text = r"^conv1.weight: 432 pruned weights are no longer zero: call pruner.step\(\) after each"
    with pytest.raises(PruningError, match=text):
        training.check()
    with pytest.raises(PruningError, match=text):
        training.finished()


def test_an_unfinished_pruning_is_refused():
    with pytest.raises(PruningError, match="unfinished=True"):
        QuantizedTraining(Training().model, images())


def test_masks_of_hooks_are_refused():
    model = ResidualNet()
    ck_structured(model.conv1, amount=0.5)
    with pytest.raises(QuantizationError, match=r"^layer conv1 carries a mask of torch.nn.utils"):
        QuantizedTraining(model, images())


def test_another_precision_is_refused():
    with pytest.raises(QuantizationError, match=r"^stem.weight is torch.float64: quantize the"):
        QuantizedTraining(ResidualNet().double(), images())


@pytest.mark.slow
def test_copied_parameters_are_refused(pruned, monkeypatch):
    from starfire_prune.quantization import training

    monkeypatch.setattr(training, "exported_module", lambda model, batch: _copied(model, batch))
    with pytest.raises(QuantizationError, match=r"^this version of torchao has copied stem"):
        QuantizedTraining(pruned.model, images())


def _copied(model: nn.Module, batch: Tensor) -> Any:
    from copy import deepcopy

    from starfire_prune.quantization.exporting import exported_module

    return exported_module(deepcopy(model), batch)


@pytest.mark.slow
def test_the_finished_model_is_int8_with_the_trained_scales(pruned, tmp_path):
    training = QuantizedTraining(pruned.model, images(), reduced_range=True)
    for seed in range(4):
        pruned.update(training.module, seed)
    quantized = training.finished()
    training.module.eval()
    with torch.no_grad():
        wanted, got = training.module(images()), quantized(images())
    # Batch norms are folded before rounding here, and after it there
    assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()
    masks = origin_of(quantized).masks
    counts = check_masks(quantized)
    assert masks.keys() == pruned.pruner.masks().keys()
    assert all(counts[name].pruned == int((~mask).sum()) for name, mask in masks.items())
    assert {each.largest for each in read_scheme(quantized).inputs.values()} == {127}
    save_quantized(quantized, tmp_path / "model.safetensors")
    loaded = load_quantized(tmp_path / "model.safetensors", ResidualNet())
    assert torch.equal(loaded(images()), quantized(images()))
    training.module.train()
    pruned.update(training.module)  # it goes on
