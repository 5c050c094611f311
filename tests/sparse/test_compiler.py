"""Compiled models have the outputs of the model, for every network, batch and instruction set."""

import copy
import pickle
import re
import subprocess
import sys
import threading
import warnings
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import ck_structured, intra_structured, sparse, window_structured
from starfire_prune.masks import ck_mask
from starfire_prune.utils.errors import TraceError
from tests.support.networks import Detector
from tests.support.sparse_networks import (
    FULL,
    NARROW,
    NARROW_CASES,
    SHORT,
    difference,
    named,
    sparse_network,
)

pytestmark = pytest.mark.usefixtures("native_kernels")
ISAS = (512, 256, 128)
TOLERANCE = 1e-4  # of the largest output


def images(batch: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def size_for(name: str) -> int:
    return 64 if name.startswith("vgg") else 32


close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


SHORT_RESNET = named("resnet18", channels=(8, 16, 24, 32), layers=SHORT)


def largest_difference(
    model: nn.Module, compiled: sparse.CompiledModel, inputs: Tensor, isas: tuple[int, ...] = ISAS
) -> float:
    """The largest difference on any instruction set, as a share of the largest output."""
    found = []
    for isa in (*isas, 0):  # 0 selects the widest one
        for segment in compiled.segments:
            segment.isa = isa
        found.append(difference(model, compiled, inputs))
    return max(found)


@pytest.mark.parametrize("name", NARROW_CASES)
def test_outputs_are_the_models(name):
    model = sparse_network(NARROW[name], dtype=torch.float32)
    inputs = images(size=size_for(name))
    compiled = sparse.compile(model, inputs)
    assert compiled.reason is None
    assert compiled.segments
    assert largest_difference(model, compiled, inputs) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_outputs_are_the_models_at_full_width(name):
    model = sparse_network(FULL[name], dtype=torch.float32, amount=0.7)
    inputs = images(size=64)
    assert largest_difference(model, sparse.compile(model, inputs), inputs) < TOLERANCE


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, sparse.CompiledModel]:
    model = sparse_network(NARROW["resnet50"], dtype=torch.float32)
    return model, sparse.compile(model, images())


def test_a_residual_network_runs_in_one_call(resnet):
    _, compiled = resnet
    assert compiled.torch_operations == []
    assert len(compiled.segments) == 1
    assert not list(compiled.parameters())


@pytest.mark.parametrize("batch", [1, 3, 16, 33])
def test_batches_of_any_size(resnet, batch):
    model, compiled = resnet
    assert largest_difference(model, compiled, images(batch, seed=batch)) < TOLERANCE


@pytest.mark.parametrize("size", [1, 33])
def test_images_of_odd_sizes(size):
    model = sparse_network(SHORT_RESNET, dtype=torch.float32)
    inputs = images(size=size)
    assert largest_difference(model, sparse.compile(model, inputs), inputs) < TOLERANCE


@pytest.mark.parametrize("block_size", [(1, 1), (4, 1), (1, 4), (4, 4)])
def test_models_pruned_in_blocks(block_size):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(18, 10, 1)
    for layer in layers:
        layer.weight.data *= ck_mask(layer.weight, 0.6, block_size=block_size)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    assert largest_difference(model, sparse.compile(model, images()), images()) < TOLERANCE


@pytest.mark.parametrize("method", [window_structured, intra_structured])
def test_models_pruned_within_windows(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2))
    for layer in (model[0], model[2]):
        method(layer, amount=0.6)
    assert largest_difference(model, sparse.compile(model, images()), images()) < TOLERANCE


def test_two_threads_call_one_model(resnet):
    _, compiled = resnet
    inputs = [images(batch, seed=batch) for batch in (1, 2, 3, 4)]
    with torch.no_grad():
        expected = [compiled(x) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(25):
            if not torch.equal(compiled(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_model_is_not_changed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    ck_structured(model[0], amount=0.5)
    before = copy.deepcopy(model.state_dict())
    sparse.compile(model, images())
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Gated(nn.Module):
    """A model with operations that the kernels don't support."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).relu()
        gate = functional.softmax(x, 1)
        return self.second(x * gate) + x, gate


def test_unsupported_operations_run_on_torch():
    torch.manual_seed(0)
    model = Gated().eval()
    compiled = sparse.compile(model, images())
    assert compiled.torch_operations == ["aten.softmax.int"]
    assert len(compiled.segments) == 2
    with torch.no_grad():
        for output, expected in zip(compiled(images()), model(images()), strict=True):
            close(output, expected)
    with pytest.raises(ValueError, match=r"shape \(3, 3, 32, 32\), but the model is compiled for"):
        compiled(images(3))


class Pair(nn.Module):
    """Two independent inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(y)


def test_batches_of_two_sizes_in_one_model():
    torch.manual_seed(0)
    model, inputs = Pair().eval(), (images(2), images(5, 8))
    compiled = sparse.compile(model, inputs)
    assert compiled.torch_operations == ["aten.conv2d.default"]
    with torch.no_grad():
        for output, expected in zip(compiled(*inputs), model(*inputs), strict=True):
            close(output, expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_compiled_models_can_be_copied(resnet, again):
    _, compiled = resnet
    expected = compiled(images())
    assert torch.equal(again(compiled)(images()), expected)


@pytest.mark.slow
def test_another_process_can_load_an_exported_model(resnet, tmp_path):
    _, compiled = resnet
    exported = torch.export.export(compiled, (images(),), strict=False)
    torch.export.save(exported, tmp_path / "model.pt2")
    torch.save(compiled(images()), tmp_path / "expected.pt")
    torch.save(compiled, tmp_path / "pickled.pt")
    code = """
import sys, torch
from starfire_prune import sparse
sparse.load_kernels()
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
folder = sys.argv[1]
exported = torch.export.load(folder + "/model.pt2").module()
pickled = torch.load(folder + "/pickled.pt", weights_only=False)
expected = torch.load(folder + "/expected.pt")
assert torch.equal(exported(images), expected)
assert torch.equal(pickled(images), expected)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_pickled_model_loads_the_kernels(resnet, tmp_path):
    _, compiled = resnet
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(compiled))
    code = """
import pickle, sys, torch
model = pickle.load(open(sys.argv[1], "rb"))
print(*model(torch.zeros(1, 3, 32, 32)).shape)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model.pkl")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "10"]


@pytest.mark.parametrize("strict", [False, True])
def test_compiled_models_can_be_exported(resnet, strict):
    _, compiled = resnet
    exported = torch.export.export(compiled, (images(),), strict=strict)
    names = [str(node.target) for node in exported.graph.nodes]
    assert "starfire_prune.sparse_inference.default" in names
    assert torch.equal(exported.module()(images()), compiled(images()))


def test_exported_models_take_batches_of_any_size(resnet):
    _, compiled = resnet
    sizes = (({0: torch.export.Dim("batch", min=2, max=64)},),)
    exported = torch.export.export(compiled, (images(),), dynamic_shapes=sizes, strict=False)
    assert torch.equal(exported.module()(images(5)), compiled(images(5)))


@pytest.mark.filterwarnings("ignore:Skipping serialization of")  # torch 2.6, of its own options
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_can_compile_compiled_models(resnet, backend):
    _, compiled = resnet
    torch.compiler.reset()
    again: Any = torch.compile(compiled, backend=backend, fullgraph=True)
    for batch in (2, 5):
        assert torch.equal(again(images(batch)), compiled(images(batch)))


def test_compiled_models_can_be_traced(resnet):
    _, compiled = resnet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated and warns about checks
        traced = torch.jit.trace(compiled, images(1))  # type: ignore[no-untyped-call]
    assert torch.equal(traced(images(3)), compiled(images(3)))


def test_models_in_double_precision_run_on_torch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    compiled = sparse.compile(model, images().double())
    assert compiled.torch_operations == ["aten.conv2d.default"]
    assert re.search(r"support none of the model's operations.*float32", str(compiled.reason))
    with pytest.raises(TypeError, match=r"input 0 must be torch.float64 on the CPU"):
        compiled(images())


def test_inputs_that_do_not_fit_are_refused(resnet):
    _, compiled = resnet
    with pytest.raises(ValueError, match=r"shape \(1, 3, 16, 16\), but .* for \(N, 3, 32, 32\)"):
        compiled(images(1, 16))
    with pytest.raises(TypeError, match="there must be 1 inputs, as in the example, not 2"):
        compiled(images(), images())
    with pytest.raises(TypeError, match="input 0 must be a tensor, as in the example, not int"):
        compiled(1)


def test_compiled_models_do_not_train(resnet):
    _, compiled = resnet
    with pytest.raises(ValueError, match=r"mode \(=True\) is not possible: a compiled model"):
        compiled.train()
    assert not compiled.eval().training


def test_a_model_of_one_layer():
    layer = nn.Linear(20, 7)
    compiled = sparse.compile(layer, torch.rand(5, 20))
    assert difference(layer, compiled, torch.rand(9, 20)) < TOLERANCE


@pytest.mark.slow
def test_timm_models_that_clamp_and_pool():
    model = timm.create_model("mobilenetv2_035", num_classes=10).eval()
    compiled = sparse.compile(model, images(1))
    assert compiled.torch_operations == []
    assert difference(model, compiled, images(1)) < TOLERANCE


def test_a_model_with_data_dependent_shapes_names_the_part_to_compile(capfd):
    message = (
        r"^torch.export can't trace Detector: Could not guard on data-dependent expression .*; use "
        r"its part `model.backbone` instead, which can be exported with an input of shape "
        r"\(2, 3, 8, 8\)$"
    )
    with pytest.raises(TraceError, match=message):
        sparse.compile(Detector(), images(size=8))
    assert len(capfd.readouterr().err.splitlines()) < 5
    assert len(sparse.compile(Detector().backbone, images(size=8)).segments) == 1


def test_a_models_own_error_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="3 channels"):
        sparse.compile(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.rand(2, 5, 8, 8))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pixels: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
        output: Tensor = self.conv(pixels) * scale
        return output if mask is None else output * mask


def test_inputs_may_be_keywords():
    model, scale = Scaled().eval(), torch.tensor([2.0])
    compiled = sparse.compile(model, (images(size=8), scale))
    expected = model(images(size=8), scale)
    close(compiled(images(size=8), scale=scale), expected)
    close(compiled(scale=scale, pixels=images(size=8)), expected)
    with pytest.raises(TypeError, match=r"^the input scale is missing, which the example has$"):
        compiled(pixels=images(size=8))
    with pytest.raises(
        TypeError, match=r"^`pixels` is given twice; the inputs are pixels, scale: "
    ):
        compiled(images(size=8), scale, pixels=images(size=8))
    for name in ("mask", "size"):
        with pytest.raises(
            TypeError, match=f"^`{name}` is not an input of the example; the inputs"
        ):
            compiled(images(size=8), **{"scale": scale, name: scale})


def test_copied_models_accept_keywords(resnet):
    _, compiled = resnet
    name = compiled.names[0]
    close(pickle.loads(pickle.dumps(compiled))(**{name: images()}), compiled(images()))
