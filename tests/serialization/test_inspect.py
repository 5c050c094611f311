"""What a file holds, told without decoding it."""

import pytest
import torch
from torch import nn

from starfire_prune import ck_structured, fc_fine, load_pruned
from starfire_prune.serialization.inspect import TensorInfo, format_inspection, inspect_pruned
from tests.serialization.test_pruned import FORMS, every_form, pruned, saved


@every_form
def test_each_tensor_is_reported_with_shape_and_zeros(form, tmp_path):
    path = saved(tmp_path, form)
    inspection, state = inspect_pruned(path), load_pruned(path)
    assert [tensor.name for tensor in inspection.tensors] == list(state)
    for tensor in inspection.tensors:
        value = state[tensor.name]
        assert (tensor.shape, tensor.total) == (tuple(value.shape), value.numel())
        assert f"torch.{tensor.dtype}" == str(value.dtype)
        assert tensor.zeros == int((value == 0).sum())
        assert tensor.sparsity == pytest.approx(float((value == 0).double().mean()))


@every_form
def test_the_bytes_and_shares_add_up(form, tmp_path):
    path = saved(tmp_path, form)
    inspection = inspect_pruned(path)
    assert inspection.size_bytes == path.stat().st_size
    stored = sum(tensor.size_bytes for tensor in inspection.tensors)
    assert stored + inspection.header_bytes == inspection.size_bytes
    shares = sum(tensor.share for tensor in inspection.tensors)
    assert shares == pytest.approx(stored / inspection.size_bytes)
    assert inspection.dense_bytes == sum(value.nbytes for value in load_pruned(path).values())


def test_encodings_are_reported(tmp_path):
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Linear(64, 64))
    ck_structured(model[0], amount=0.5)
    fc_fine(model[1], amount=0.5)
    told = {
        form: [tensor.encoding for tensor in inspect_pruned(saved(tmp_path, form, model)).tensors]
        for form in FORMS
    }
    assert told == {
        "dense": ["dense"] * 4,
        "compressed": ["ck", "dense", "bitmap", "dense"],
        "deflated": ["ck+deflate", "dense", "bitmap+deflate", "dense"],
    }


def test_metadata_are_reported(tmp_path):
    model, pruner = pruned()
    path = saved(tmp_path, "compressed", model, pruner=pruner, recipe={"epochs": 2})
    inspection = inspect_pruned(path)
    assert inspection.pruning["method"] == "intra"
    assert (inspection.model, inspection.recipe) == (None, {"epochs": 2})


def test_an_empty_tensor_has_no_sparsity():
    assert TensorInfo("empty", (0,), "float32", 0, 0, "dense", 0, 0.0).sparsity == 0.0


def test_the_table_has_a_row_a_tensor(tmp_path):
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        model.get_parameter("0.weight")[:12] = 0.0
    model.register_buffer("\x1b[2J", torch.tensor(1))
    inspection = inspect_pruned(saved(tmp_path, "compressed", model))
    header = f"{inspection.header_bytes:,}"
    rest = f"{2304 + 32 + 64 + 8 + inspection.header_bytes:,}"
    lines = format_inspection(inspection).splitlines()
    columns = ["tensor", "shape", "dtype", "sparsity", "encoding", "bytes", "share"]
    assert lines[0].split() == columns
    rows = [line.split() for line in lines[2:-1]]
    assert rows[0][:5] == [r"'\x1b[2J'", "int64", "0.00%", "dense", "8"]
    assert rows[1][:6] == ["0.weight", "16x16x3x3", "float32", "75.00%", "ck", "2,336"]
    assert rows[2][:6] == ["0.bias", "16", "float32", "0.00%", "dense", "64"]
    assert rows[3][:2] == ["(header)", header]
    assert lines[-1].startswith(f"{rest} bytes, ")
    assert lines[-1].endswith("% of the 9,288 of all tensors dense")
