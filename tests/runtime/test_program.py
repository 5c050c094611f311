"""Programs have the outputs of compiled models, bit for bit, and refuse what doesn't fit."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from starfire_prune import runtime, save_program, sparse
from starfire_prune.runtime import library as runtime_library
from starfire_prune.sparse.module import CompiledModel
from tests.support.paths import ROOT
from tests.support.program_files import file_bytes
from tests.support.programs import MODELS, content_of

Floats = NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("native_kernels")


def outputs_of(compiled: CompiledModel, images: Floats) -> list[Floats]:
    outputs = compiled(torch.from_numpy(images))
    return [each.numpy() for each in (outputs if isinstance(outputs, tuple) else (outputs,))]


def results_of(program: runtime.Program, *arrays: Floats) -> list[Floats]:
    results = program(*arrays)
    return results if isinstance(results, list) else [results]


def batch_of(images: Tensor, size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((size, *images.shape[1:]), np.float32)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (2, 2), (5, 3)])
def test_outputs_are_those_of_compile(compiled, tmp_path, name, batch, threads):
    model, images = compiled(name)
    save_program(model, tmp_path / "model.program")
    program = runtime.load(tmp_path / "model.program", threads=threads)
    arrays = batch_of(images, batch)
    for _ in range(2):
        pairs = zip(results_of(program, arrays), outputs_of(model, arrays), strict=True)
        assert all(np.array_equal(result, output) for result, output in pairs)


@pytest.mark.parametrize("instructions", [128, 256, 257, 512])
@pytest.mark.parametrize("name", ["floats", "bytes"])
def test_each_instruction_set_gives_its_bits(compiled, contents, name, instructions):
    model, images = copy.deepcopy(compiled(name)[0]), batch_of(compiled(name)[1], 3)
    model.segments[0].isa = instructions
    program = runtime.load(file_bytes(contents[name]), instructions=instructions)
    pairs = zip(results_of(program, images), outputs_of(model, images), strict=True)
    assert all(np.array_equal(result, output) for result, output in pairs)


def test_several_threads_run_two_programs_at_once(compiled, contents):
    cases = []
    for name in ("floats", "bytes"):
        model, images = compiled(name)
        program = runtime.load(file_bytes(contents[name]), threads=2)
        for seed in range(3):
            arrays = batch_of(images, 1 + seed, seed)
            cases.append((program, arrays, outputs_of(model, arrays)))
    wrong = []

    def run(program, arrays, expected):
        for _ in range(20):
            pairs = zip(results_of(program, arrays), expected, strict=True)
            if not all(np.array_equal(result, output) for result, output in pairs):
                wrong.append(program)

    threads = [threading.Thread(target=run, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_runs_a_program(compiled, contents):
    program = runtime.load(file_bytes(contents["floats"]), threads=2)
    images = batch_of(compiled("floats")[1], 2)
    expected = results_of(program, images)
    child = os.fork()
    if not child:
        same = np.array_equal(results_of(program, images)[0], expected[0])
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_inputs_and_outputs_are_described(compiled, contents):
    program = runtime.load(file_bytes(contents["floats"]))
    assert program.inputs == [("images", (3, 37, 33))]
    assert [spec.name for spec in program.outputs] == ["output0", "output1"]
    assert [spec.shape for spec in program.outputs] == [
        tuple(output.shape[1:]) for output in compiled("floats")[0](compiled("floats")[1])
    ]
    assert repr(runtime.load(file_bytes(contents["bytes"]))) == (
        "Program(images (N, 3, 33, 30) -> output (N, 10))"
    )


class Two(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return one + other, torch.relu(one)


def test_inputs_may_be_named(tmp_path):
    one, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    save_program(sparse.compile(Two(), (one, other)), tmp_path / "two.program")
    program = runtime.load(tmp_path / "two.program")
    total, bounded = program(other=other.numpy(), one=one.numpy())
    assert np.array_equal(total, (one + other).numpy())
    assert np.array_equal(bounded, torch.relu(one).numpy())
    with pytest.raises(TypeError, match="`two` is not an input; the inputs are one, other"):
        program(one.numpy(), two=other.numpy())
    with pytest.raises(TypeError, match="`one` is given twice"):
        program(one.numpy(), one=other.numpy())
    with pytest.raises(TypeError, match=r"there must be 2 inputs \(one, other\), not 1"):
        program(one.numpy())
    with pytest.raises(ValueError, match=r"one batch size, but have \[2, 1\]"):
        program(one.numpy(), other.numpy()[:1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:, :2], ValueError, r"shape \(2, 2, 33, 30\), but must have \(N, 3, 33, 30\)"),
        (lambda x: x[0], ValueError, r"has the shape \(3, 33, 30\)"),
        (lambda x: x[:0], ValueError, r"with N of at least 1"),
        (lambda x: x.astype(np.float64), TypeError, r"must be of float32, not float64"),
        (lambda x: x.tolist(), TypeError, r"must be a NumPy array, not list"),
    ],
)
def test_other_inputs_are_refused(contents, change, error, message):
    program = runtime.load(file_bytes(contents["bytes"]))
    images = np.zeros((2, 3, 33, 30), np.float32)
    with pytest.raises(error, match=message):
        program(change(images))


def test_inputs_may_have_any_strides(compiled, contents):
    program = runtime.load(file_bytes(contents["bytes"]))
    images = batch_of(compiled("bytes")[1], 4)
    strided = np.asfortranarray(images)[::-2]
    assert np.array_equal(program(strided), program(images[::-2].copy()))


def test_a_batch_that_takes_too_much_memory_is_refused(contents):
    program = runtime.load(file_bytes(contents["wide images"]))
    images = np.lib.stride_tricks.as_strided(
        np.zeros(1, np.float32), (1 << 15, 3, 150, 146), (0,) * 4
    )
    sources = (runtime_library._POINTER * 1)(images.ctypes.data)
    failed = runtime_library.library().starfire_run(program._handle, len(images), sources, sources)
    text = runtime_library.library().starfire_error().decode()
    assert (failed, text) == (
        -1,
        "batch (=32768) takes more than 4 GiB of memory: run smaller batches",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, r"threads \(=0\) must be an int from 1 to 1024"),
        ({"threads": 2.0}, r"threads \(=2.0\) must be an int"),
        ({"instructions": 300}, r"instructions \(=300\) must be 512, 256, 128 or 0"),
    ],
)
def test_options_are_checked(contents, options, message):
    with pytest.raises(ValueError, match=message):
        runtime.load(file_bytes(contents["bytes"]), **options)


def test_a_path_must_be_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.program is not a file: export one with"):
        runtime.load(tmp_path / "no.program")
    with pytest.raises(runtime.ProgramError, match="is a folder: name the file of a program"):
        runtime.load(tmp_path)
    with pytest.raises(TypeError, match="source must be a path or bytes, not int"):
        runtime.load(3)  # type: ignore[arg-type]


def test_programs_cannot_be_pickled(contents):
    program = runtime.load(file_bytes(contents["bytes"]))
    with pytest.raises(TypeError, match="can't be pickled or copied: load its file again"):
        pickle.dumps(program)


def test_the_runtime_needs_no_torch():
    code = "import sys, starfire_prune.runtime\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    third_party = {"numpy", "torch", "safetensors", "pydantic", "yaml", "timm"}
    assert loaded & third_party == {"numpy"}
    assert "subprocess" not in loaded


# Saving


def test_models_with_operations_on_torch_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1))
    fast = sparse.compile(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"left to torch: aten.softmax.int; remove them"):
        save_program(fast, tmp_path / "model.program")
    assert not list(tmp_path.iterdir())


def test_only_compiled_models_are_saved(tmp_path):
    with pytest.raises(
        TypeError, match=r"must be the result of sparse\.compile, not <class 'torch"
    ):
        save_program(nn.Conv2d(3, 4, 3), tmp_path / "model.program")  # type: ignore[arg-type]


class Returns(nn.Module):
    def __init__(self, result: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> Any:
        return self.result(torch.relu(x), x)


@pytest.mark.parametrize("result", [lambda y, x: (y, x), lambda y, x: (y, y)])
def test_a_result_that_is_returned_twice_or_is_an_input_is_refused(tmp_path, result):
    fast = sparse.compile(Returns(result), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="returns an input, or a result twice; let it return each"):
        save_program(fast, tmp_path / "model.program")


def test_the_writer_agrees_with_the_description(compiled, contents, tmp_path):
    save_program(compiled("floats")[0], tmp_path / "model.program")
    written = runtime.load(tmp_path / "model.program")
    described = runtime.load(file_bytes(contents["floats"]))
    assert (written.inputs, written.outputs) == (described.inputs, described.outputs)
    assert (
        content_of(compiled("floats")[0]).program.tobytes()
        in (tmp_path / "model.program").read_bytes()
    )
