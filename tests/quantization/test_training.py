"""Training with quantization: shared parameters, masks, and what is refused."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import Pruner, ck_structured
from starfire_prune.quantization import QuantizedTraining, check_masks, torchao
from starfire_prune.quantization.origin import origin_of
from starfire_prune.quantization.reading import read_scheme
from starfire_prune.quantization.trained_graph import set_fake_quantization
from starfire_prune.serialization.quantized import load_quantized, save_quantized
from starfire_prune.utils.errors import PruningError, QuantizationError
from tests.support.quantized_networks import ResidualNet, images
from tests.support.quantized_training import traced_once

pytest.importorskip("torchao")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with traced_once():
        yield


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


def changed(training: QuantizedTraining, batch: Tensor) -> set[str]:
    """The names of the tensors that a forward pass changes."""
    before = {name: value.clone() for name, value in training.module.state_dict().items()}
    training.module(batch)
    after = training.module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.slow
def test_an_evaluation_changes_neither_batch_norms_nor_ranges(pruned):
    training = QuantizedTraining(pruned.model, images())
    training.module(images())
    training.module.eval()
    assert not changed(training, 3 * images())
    training.module.train()
    moved = changed(training, 3 * images())
    assert {"bn.running_mean", "bn.num_batches_tracked"} <= moved
    assert "activation_post_process_0.scale" in moved


@pytest.mark.slow
def test_a_frozen_training_changes_neither_batch_norms_nor_ranges(pruned):
    training = QuantizedTraining(pruned.model, images())
    training.module(images())
    training.freeze()
    assert training.module.training
    assert not changed(training, 3 * images())
    before = pruned.model.conv1.weight.clone()
    pruned.update(training.module)
    assert not torch.equal(pruned.model.conv1.weight, before)


@pytest.mark.slow
def test_a_training_goes_on_from_its_state(pruned):
    one = QuantizedTraining(pruned.model, images())
    one.module(images())
    state, twin = one.state(), copy.deepcopy(pruned.model)
    assert not state.keys() & twin.state_dict().keys()
    other = QuantizedTraining(twin, images())
    other.load_state(state)
    for module in (one.module, other.module):
        module.eval()
    assert torch.equal(one.module(images(seed=1)), other.module(images(seed=1)))
    with pytest.raises(QuantizationError, match="the training of another model"):
        other.load_state({})


class Settled(nn.Module):
    """A network whose batch norms have other settings than torchao writes into them."""

    def __init__(self, dropout: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, eps=0.01, momentum=0.3)
        self.last = nn.BatchNorm2d(8)
        self.dropout = dropout or nn.Dropout(0.5)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.last(self.bn(self.conv(images)).relu()).mean((2, 3))
        logits: Tensor = self.head(self.dropout(features))
        return logits


@pytest.mark.slow
def test_batch_norms_keep_their_momentum_and_epsilon():
    model = Settled()
    twin = copy.deepcopy(model)
    training = QuantizedTraining(model, images())
    set_fake_quantization(training.module, False)
    training.module(images())
    twin(images())
    torch.testing.assert_close(model.bn.running_mean, twin.bn.running_mean)
    training.module.eval()
    torch.testing.assert_close(training.module(images()), twin.eval()(images()))


@pytest.mark.slow
def test_scales_of_batch_norms_that_are_zero_are_lifted():
    model = ResidualNet()
    with torch.no_grad():
        model.bn2.weight[:3] = 0
    training = QuantizedTraining(model, images())
    assert training.module(images()).isfinite().all()
    assert (model.bn2.weight != 0).all()


class Noise(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features + torch.rand_like(features) if self.training else features


class Scaled(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return 2 * features if self.training else features


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (Noise(), r"^the model draws random numbers in training by aten.rand_like.default, which"),
        pytest.param(
            Scaled(),
            r"^the graph of Settled that torchao has prepared has other outputs than the model",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_models_that_compute_otherwise_in_training_are_refused(part, text):
    with pytest.raises(QuantizationError, match=text):
        QuantizedTraining(Settled(part), images())


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
        torch.testing.assert_close(quantized(images()), training.module(images()))
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


@pytest.mark.slow
def test_batch_norms_are_folded_as_torchao_folds_them(pruned):
    training = QuantizedTraining(pruned.model, images())
    for seed in range(2):
        pruned.update(training.module, seed)
    converted = torchao.package().convert_pt2e(copy.deepcopy(training.module), fold_quantize=False)
    wanted, got = read_scheme(converted), read_scheme(training.finished())
    assert got.inputs == wanted.inputs
    assert got.weights.keys() == wanted.weights.keys()
    for name, weight in got.weights.items():
        other = wanted.weights[name]
        assert torch.equal(weight.values, other.values), name
        assert torch.equal(weight.scales, other.scales), name
        torch.testing.assert_close(weight.bias, other.bias)
