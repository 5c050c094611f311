"""ONNX files: zeros, batches, metadata and the checks that keep a wrong file from being written."""

import copy
import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from starfire_prune import ck_structured, measure_sparsity
from starfire_prune.export import onnx as onnx_export
from starfire_prune.export.onnx import OnnxReport, export_onnx
from starfire_prune.export.onnx_graph import Weights
from starfire_prune.export.onnx_model import exported_model
from starfire_prune.models import create_model
from starfire_prune.structure.graph import dense_copy
from starfire_prune.utils.errors import CheckpointError, ExportError
from tests.support.networks import Detector, SmallNet
from tests.support.sparse_networks import FULL, NARROW, NARROW_CASES, randomize, sparse_network

NEEDS_EXPORTER = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 doesn't go with today's onnxscript"
)
pytestmark = NEEDS_EXPORTER
SIZE = (3, 8, 8)

Export = Callable[..., OnnxReport]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Three convolutions with batch norms and a linear layer, pruned by hooks."""
    network = SmallNet()
    randomize(network, torch.Generator().manual_seed(0))
    for layer in (network.stem, network.body, network.point):
        ck_structured(layer, amount=0.5)
    return network.eval()


@pytest.fixture(scope="module")
def exported(model: nn.Module) -> Any:
    """What torch's exporter gives for it, a second's work."""
    return exported_model(dense_copy(model), SIZE)


@pytest.fixture
def export(model: nn.Module, exported: Any, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Exports the model, or another one with what torch has made of the model."""

    def export(path: Path, other: nn.Module | None = None, **options: Any) -> OnnxReport:
        monkeypatch.setattr(onnx_export, "exported_model", lambda *_: copy.deepcopy(exported))
        return export_onnx(other or model, path, SIZE, **options)

    return export


def zeros_of(path: Path) -> dict[str, tuple[int, int]]:
    """Zeros and numbers of the file's weights, by the names of their layers."""
    tensors = onnx.load(str(path)).graph.initializer
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    return {
        name.removesuffix(".weight"): (int((array == 0).sum()), array.size)
        for name, array in arrays.items()
        if name.endswith(".weight") and array.ndim > 1
    }


def zeros_in(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.zeros, layer.total) for layer in measure_sparsity(model).layers}


def run(path: Path, images: Tensor) -> Tensor:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("fold_bn", [False, True])
def test_each_layer_has_the_zeros_of_the_model(fold_bn, export, model, tmp_path):
    report = export(tmp_path / "model.onnx", fold_bn=fold_bn)
    assert zeros_of(tmp_path / "model.onnx") == report.layers == zeros_in(model)
    assert report.sparsity == measure_sparsity(model).network
    assert report.unchecked == ()


@pytest.mark.parametrize(("fold_bn", "folded"), [(False, 0), (True, 3)])
def test_batch_norms_are_folded_only_on_request(fold_bn, folded, export, tmp_path):
    report = export(tmp_path / "model.onnx", fold_bn=fold_bn)
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    assert report.batch_norms == (folded, 3)
    assert sum(node.op_type == "BatchNormalization" for node in nodes) == 3 - folded


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_of_any_size_give_the_outputs_of_torch(batch, export, model, tmp_path):
    report = export(tmp_path / "model.onnx", fold_bn=True)
    images = torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(batch))
    expected = model(images).detach()
    output = run(tmp_path / "model.onnx", images)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * report.largest)


def test_the_report_gives_the_difference_of_the_outputs(export, model, tmp_path):
    report = export(tmp_path / "model.onnx")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, *SIZE, generator=generator) for size in (1, 3)]
    pairs = [(run(tmp_path / "model.onnx", images), model(images).detach()) for images in batches]
    assert report.deviation == max(float((one - other).abs().max()) for one, other in pairs)
    assert report.largest == max(float(other.abs().max()) for _, other in pairs)
    assert report.deviation < 1e-5 * report.largest


def test_the_model_is_left_as_it_is(model, tmp_path):
    network = copy.deepcopy(model).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export_onnx(network, tmp_path / "model.onnx", SIZE, fold_bn=True)
    assert network.training
    assert list(before) == list(network.state_dict())
    assert all(map(torch.equal, before.values(), network.state_dict().values()))


def test_no_path_of_this_machine_is_in_the_file(export, tmp_path):
    export(tmp_path / "model.onnx")
    assert b"networks.py" not in (tmp_path / "model.onnx").read_bytes()


def test_metadata_are_stored_as_json(export, tmp_path):
    export(tmp_path / "model.onnx", metadata={"images": {"mean": [0.5]}})
    stored = {
        each.key: each.value for each in onnx.load(str(tmp_path / "model.onnx")).metadata_props
    }
    assert json.loads(stored["images"]) == {"mean": [0.5]}


# Weights in a file of their own


def test_many_weights_are_written_to_a_second_file(export, model, tmp_path):
    path = tmp_path / "model.onnx"
    report = export(path, external_from_bytes=1)
    assert sorted(part.name for part in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.external == tmp_path / "model.onnx.data"
    assert report.size_bytes == sum(part.stat().st_size for part in tmp_path.iterdir())
    assert zeros_of(path) == zeros_in(model)
    images = torch.zeros(1, *SIZE)
    torch.testing.assert_close(run(path, images), model(images).detach())


def test_a_model_is_replaced_with_the_file_of_its_weights(export, model, tmp_path):
    path = tmp_path / "model.onnx"
    for data in ("model.onnx.data", "model.onnx.data2", "model.onnx.data"):
        report = export(path, external_from_bytes=1)
        assert report.external == tmp_path / data
        assert sorted(part.name for part in tmp_path.iterdir()) == ["model.onnx", data]
        torch.testing.assert_close(
            run(path, torch.ones(1, *SIZE)), model(torch.ones(1, *SIZE)).detach()
        )
    export(path)
    assert [part.name for part in tmp_path.iterdir()] == ["model.onnx"]


def test_an_interrupted_write_removes_no_file_that_is_needed(export, model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    export(path, external_from_bytes=1)
    kept = (tmp_path / "model.onnx.data").read_bytes()
    assert export(path, external_from_bytes=1).external == tmp_path / "model.onnx.data2"
    (tmp_path / "model.onnx.data").write_bytes(kept)  # as if the last step had not been reached
    assert export(path, external_from_bytes=1).external == tmp_path / "model.onnx.data"
    assert sorted(part.name for part in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_files_that_an_onnx_file_does_not_refer_to_are_kept(export, tmp_path):
    (tmp_path / "model.onnx.data").write_text("somebody's")
    export(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").read_text() == "somebody's"


@pytest.mark.parametrize("moved", [0, 1])
def test_a_move_that_fails_leaves_the_old_model_whole(moved, export, model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    export(path, external_from_bytes=1)
    moves: list[Path] = []

    def move(source: Path, target: Path) -> None:
        if len(moves) == moved:
            raise OSError(28, "No space left on device")
        moves.append(target)
        source.replace(target)

    monkeypatch.setattr(onnx_export, "move_file", move)
    with pytest.raises(CheckpointError, match=r"model\.onnx can't be written: No space left"):
        export(path, external_from_bytes=1)
    torch.testing.assert_close(
        run(path, torch.ones(1, *SIZE)), model(torch.ones(1, *SIZE)).detach()
    )


def test_few_weights_are_written_to_one_file(export, tmp_path):
    report = export(tmp_path / "model.onnx")
    assert report.external is None
    assert [part.name for part in tmp_path.iterdir()] == ["model.onnx"]
    assert report.size_bytes == (tmp_path / "model.onnx").stat().st_size


# What is refused


def test_outputs_that_differ_are_refused(export, model, tmp_path):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1.0)
    with pytest.raises(ExportError, match=r"Runtime's outputs differ by 1, where the largest is"):
        export(tmp_path / "model.onnx", other)
    assert list(tmp_path.iterdir()) == []


def test_zeros_that_are_lost_are_refused(export, model, tmp_path):
    other = copy.deepcopy(model)
    ck_structured(other.get_submodule("body"), amount=0.9)
    with pytest.raises(
        ExportError, match=r"^body: weights that are zero in the model are not zero"
    ):
        export(tmp_path / "model.onnx", other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("external_from_bytes", [1, 2**31])
def test_a_refusal_leaves_the_file_that_was_there(external_from_bytes, export, model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("head.bias").fill_(torch.nan)
    with pytest.raises(ExportError, match=r"differ by inf, where the largest"):
        export(path, other, external_from_bytes=external_from_bytes)
    assert [part.name for part in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_a_weight_that_the_file_does_not_have_is_reported(export, model, tmp_path):
    other = copy.deepcopy(model)
    other.add_module("idle", nn.Linear(4, 4))
    assert export(tmp_path / "model.onnx", other).unchecked == ("idle",)


def test_a_weight_under_another_name_is_found_by_its_values(export, exported, model, tmp_path):
    for tensor in exported.graph.initializer:
        if tensor.name == "head.weight":
            turned = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
    weights = Weights(onnx, copy.deepcopy(exported.graph))
    weights.keep(set(weights) - {"head.weight"})
    weights.replace("turned", turned)
    head = zeros_in(model)["head"]
    assert onnx_export._checked_zeros(model, weights)[0]["head"] == head


def test_a_model_that_can_not_be_exported_is_refused(tmp_path):
    class Branching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images if images.sum() > 0 else -images

    with pytest.raises(ExportError, match=r"^torch \S+ and onnxscript \S+ can't export this model"):
        export_onnx(Branching(), tmp_path / "model.onnx", SIZE)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_it_says_what_to_install(package, export, tmp_path, monkeypatch):
    load = importlib.import_module

    def missing(name: str) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    message = rf"^export to ONNX needs {package}: pip install 'starfire-prune\[onnx\]'$"
    with pytest.raises(ModuleNotFoundError, match=message):
        export(tmp_path / "model.onnx")


def test_a_file_that_can_not_be_written_is_refused(export, tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(CheckpointError, match=r"folder/model.onnx can't be written"):
        export(tmp_path / "folder" / "model.onnx")


# Outputs of other kinds


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Returning(nn.Module):
    """A convolution, and what a function makes of its output and the input."""

    def __init__(self, make: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.make = make

    def forward(self, images: Tensor) -> object:
        return self.make(self.conv(images), images)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda x, _: {"out": x, "aux": x.relu()}, ("out", "aux")),
        (lambda x, _: Result(x, (x.relu(), x > 0)), ("logits", "hidden_0", "hidden_1")),
        (lambda x, _: (x, [x.relu(), x.sum()]), ("output_0", "output_1_0", "output_1_1")),
        (lambda x, _: Pair(x, x.relu()), ("first", "second")),
        (lambda x, images: {"images": images, "x": {"a": x, "b": x}}, ("images_", "x.a", "x.b")),
    ],
    ids=["dict", "dataclass", "tuple", "named tuple", "input and output twice"],
)
def test_outputs_of_other_kinds_are_named(make, names, tmp_path):
    network = Returning(make).eval()
    path = tmp_path / "model.onnx"
    assert export_onnx(network, path, SIZE).outputs == names
    images = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0))
    session: Any = importlib.import_module("onnxruntime").InferenceSession(str(path))
    assert tuple(output.name for output in session.get_outputs()) == names
    arrays = session.run(None, {"images": images.numpy()})
    expected: Any = network(images)
    if isinstance(expected, Result):
        expected = (expected.logits, expected.hidden)
    for array, output in zip(arrays, tree_leaves(expected), strict=True):
        torch.testing.assert_close(torch.from_numpy(array), output)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda x, _: {"out": x, "size": 3}, "dict with size: int"),
        (lambda x, _: (x, {"kind": "cat"}), "tuple with output_1.kind: str"),
        (lambda x, _: {}, "no tensors"),
        (lambda x, _: None, "no tensors"),
    ],
)
def test_outputs_that_are_not_tensors_are_refused_before_the_export(
    make, found, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.onnx, "export", None)
    message = (
        f"an ONNX file returns tensors, and Returning returns {found}: wrap it in a module that "
        f"returns a tensor, or tensors in a dict, dataclass, tuple or list"
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        export_onnx(Returning(make), tmp_path / "model.onnx", SIZE)


def test_images_that_the_model_does_not_accept_are_refused_before_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)
    message = r"^Returning does not accept images of shape \(2, 5, 8, 8\): .*3 channels"
    with pytest.raises(ExportError, match=message):
        export_onnx(Returning(lambda x, _: x), tmp_path / "model.onnx", (5, 8, 8))


def test_a_path_may_be_text(export, tmp_path):
    export(str(tmp_path / "model.onnx"))
    assert (tmp_path / "model.onnx").is_file()


# What ONNX Runtime's tools and convolutions need


def test_onnx_runtime_prepares_the_file_for_quantization(model, tmp_path):
    prepare: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    network = nn.Sequential(model, nn.Unflatten(1, (2, 5)), nn.Flatten())
    export_onnx(network, tmp_path / "model.onnx", SIZE)
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    assert any(node.op_type == "Constant" for node in nodes)
    prepare.quant_pre_process(str(tmp_path / "model.onnx"), str(tmp_path / "prepared.onnx"))
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    expected = run(tmp_path / "model.onnx", images)
    torch.testing.assert_close(run(tmp_path / "prepared.onnx", images), expected)


@pytest.mark.parametrize("fold_bn", [False, True])
def test_convolutions_in_three_dimensions_need_no_bias(fold_bn, tmp_path):
    norm = nn.BatchNorm3d(4)
    norm.running_mean = torch.randn(4, generator=torch.Generator().manual_seed(0))
    layers = nn.Conv3d(3, 4, 3, bias=False), norm, nn.ConvTranspose3d(4, 2, 3, bias=False)
    network = nn.Sequential(*layers).eval()
    report = export_onnx(network, tmp_path / "model.onnx", (3, 4, 8, 8), fold_bn=fold_bn)
    assert report.batch_norms == (int(fold_bn), 1)
    assert report.deviation < 1e-5 * report.largest


# Models that can't be exported


class Gated(nn.Module):
    """A convolution for each image, as in CondConv: the groups are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 3, 3))

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        weight = self.weight.repeat(batch, 1, 1, 1)
        one = images.reshape(1, batch * channels, height, width)
        return functional.conv2d(one, weight, groups=batch).reshape(batch, 4, height - 2, width - 2)


def test_an_operation_that_can_not_be_translated_names_its_layer(tmp_path):
    network = nn.Sequential(nn.Sequential(nn.ReLU(), Gated()))
    with pytest.raises(ExportError) as caught:
        export_onnx(network, tmp_path / "model.onnx", SIZE)
    assert str(caught.value).partition(", because of ")[2] == (
        "aten.conv2d.default in 0.1: one of its attributes, such as `groups`, depends on the "
        "batch size, and is a constant in ONNX; replace that layer by one without such an attribute"
    )


def test_a_model_with_data_dependent_shapes_names_the_part_to_export(tmp_path, capfd):
    with pytest.raises(ExportError, match="can't export this model to ONNX: ") as caught:
        export_onnx(Detector(), tmp_path / "model.onnx", SIZE)
    assert str(caught.value).endswith(
        "; use its part `model.backbone` instead, which can be exported with an input of shape "
        "(2, 3, 8, 8)"
    )
    assert len(capfd.readouterr().err.splitlines()) < 5
    assert export_onnx(Detector().backbone, tmp_path / "model.onnx", SIZE).outputs == ("logits",)


# Real networks


@pytest.mark.slow
@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("name", NARROW_CASES)
def test_networks_keep_their_zeros(name, fold_bn, tmp_path):
    network = sparse_network(NARROW[name], dtype=torch.float32)
    report = export_onnx(network, tmp_path / "model.onnx", (3, 32, 32), fold_bn=fold_bn)
    assert zeros_of(tmp_path / "model.onnx") == zeros_in(network)
    assert report.deviation < 1e-5 * report.largest


@pytest.mark.slow
@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("name", ["resnet50", "resnet50_v1", "efficientnet_b0", "convnext_atto"])
def test_full_networks_keep_their_zeros(name, fold_bn, tmp_path):
    build = FULL.get(name, lambda: create_model(name, 10))
    network = sparse_network(build, dtype=torch.float32, amount=0.6)
    report = export_onnx(network, tmp_path / "model.onnx", (3, 64, 64), fold_bn=fold_bn)
    assert report.layers == zeros_in(network)
    assert report.deviation < 1e-5 * report.largest


@pytest.mark.parametrize("external_from_bytes", [1, 2**30])
def test_a_failed_check_is_not_reported_as_a_failed_write(
    external_from_bytes, export, tmp_path, monkeypatch
):
    def fail(*arguments: object) -> None:
        raise RuntimeError("of the forward pass")

    monkeypatch.setattr(onnx_export, "_checked_outputs", fail)
    with pytest.raises(RuntimeError, match=r"^of the forward pass$"):
        export(tmp_path / "model.onnx", external_from_bytes=external_from_bytes)
    assert list(tmp_path.iterdir()) == []


class Amplifying(nn.Module):
    """The sine of large numbers, which differ by rounding from engine to engine."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.factor = nn.Conv2d(3, 8, 16), factor

    def forward(self, images: Tensor) -> Tensor:
        return torch.sin(self.factor * self.conv(images)).mean((2, 3))


def test_a_model_that_amplifies_rounding_is_exported(tmp_path, monkeypatch):
    report = export_onnx(Amplifying(3e4), tmp_path / "model.onnx", (3, 16, 16))
    assert report.deviation > 1e-3 * report.largest
    monkeypatch.setattr(onnx_export, "_ROUNDINGS", 0)
    with pytest.raises(ExportError, match="differ by"):
        export_onnx(Amplifying(3e4), tmp_path / "other.onnx", (3, 16, 16))
