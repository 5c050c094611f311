"""`starfire export`: what it writes and prints, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from starfire_prune import Pruner, load_recipe, measure_sparsity, runtime
from starfire_prune.compact.files import load_compact
from starfire_prune.export.input import find_input, load_input
from starfire_prune.models import create_model
from starfire_prune.runs.folder import exported_file
from starfire_prune.serialization.pruned import (
    load_pruned,
    read_metadata,
    read_pruned_file,
    save_pruned,
)
from tests.export.test_onnx import NEEDS_EXPORTER
from tests.support.commands import MODULE, Ended
from tests.support.networks import equal_states
from tests.support.processes import exported
from tests.support.runs import files_of, fresh_model
from tests.support.sparse_networks import difference, images

COMMAND = "export"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run's folder, to write in."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def sparse(finished: Path) -> nn.Module:
    """The model of the run."""
    return load_input(find_input(finished))


def refused(ended: Ended) -> str:
    """The sentence of a refusal."""
    assert ended.status == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("starfire export: ")
    assert ended.stderr.count("\n") == 1
    return ended.stderr.removeprefix("starfire export: ").rstrip("\n")


# Formats


def test_dense_is_read_by_safetensors_alone(tool, finished, tmp_path):
    ended = tool(finished, "--format", "dense", "--output", tmp_path / "new.safetensors")
    weights, expected = load_file(tmp_path / "new.safetensors"), exported(finished)
    assert (ended.status, ended.stderr) == (0, "")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_compressed_holds_the_same_in_fewer_bytes(tool, finished, tmp_path):
    output = tmp_path / "new.safetensors"
    ended = tool(finished, "--format", "compressed", "--deflate", "--output", output)
    size, dense = output.stat().st_size, sum(t.nbytes for t in exported(finished).values())
    assert equal_states(load_pruned(output), load_pruned(find_input(finished).weights))
    assert ended.stdout == (
        f"{output}: {size:,} bytes, {size / dense:.1%} of the {dense:,} of all weights\n"
    )


def test_timm_prints_the_call_that_loads_the_folder(tool, finished, tmp_path):
    ended = tool(finished, "--format", "timm", "--output", tmp_path / "timm")
    assert sorted(files_of(tmp_path / "timm")) == ["config.json", "model.safetensors"]
    assert ended.stdout.splitlines() == [
        f"{tmp_path / 'timm'}: resnet18 of 10 classes, with their names",
        f'timm.create_model("local-dir:{tmp_path / "timm"}", pretrained=True)',
    ]


def test_timm_makes_a_runs_own_export_a_folder_for_timm(tool, run):
    before = (run / "export" / "model.safetensors").stat().st_mtime_ns
    assert tool(run, "--format", "timm", "--output", run / "export").status == 0
    assert (run / "export" / "config.json").is_file()
    assert (run / "export" / "model.safetensors").stat().st_mtime_ns == before


@NEEDS_EXPORTER
def test_onnx_prints_what_was_checked(tool, finished, sparse, tmp_path):
    output = tmp_path / "model.onnx"
    ended = tool(finished, "--format", "onnx", "--fold-bn", "--output", output)
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(f"{output}: {output.stat().st_size:,} bytes, opset ")
    assert lines[1].startswith(f"{measure_sparsity(sparse).network:.2%} of the convolution and lin")
    assert lines[2] == "batch norms folded: 13 of 13"
    assert re.fullmatch(
        r"ONNX Runtime differs from torch by at most \d.\de-0\d; .* is .*", lines[3]
    )
    notes = {each.key for each in onnx.load(str(output)).metadata_props}
    names = ("model", "images", "label_names")
    assert notes == {f"starfire_prune.{name}" for name in names}


def test_compact_writes_what_load_compact_reads(tool, finished, sparse, tmp_path):
    output = tmp_path / "small.safetensors"
    ended = tool(finished, "--format", "compact", "--output", output)
    settings = find_input(finished).architecture
    loaded = load_compact(output, create_model(**settings))  # type: ignore[arg-type]
    assert difference(sparse, loaded, images(size=16)) < 1e-5
    assert "largest difference of the outputs" in ended.stdout
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in sparse.parameters())


@NEEDS_EXPORTER
@pytest.mark.slow
def test_onnx_of_the_compact_model_is_smaller(tool, finished, tmp_path):
    for name, options in (("whole", ()), ("small", ("--compact",))):
        output = tmp_path / f"{name}.onnx"
        ended = tool(finished, "--format", "onnx", "--fold-bn", *options, "--output", output)
        assert ended.status == 0
    small, whole = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("small", "whole"))
    assert small < whole


@pytest.mark.slow
def test_the_tool_runs_as_a_command(finished, tmp_path):
    command = [*MODULE, COMMAND, finished, "--format", "compressed"]
    command += ["--output", tmp_path / "new.safetensors"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "of all weights" in result.stdout
    assert result.stderr == ""


# Inspecting


def test_inspect_prints_a_line_a_tensor(tool, finished):
    weights = find_input(finished).weights
    ended = tool("--inspect", weights)
    lines = ended.stdout.splitlines()
    entries = read_pruned_file(weights).entries
    assert ended.status == 0
    assert lines[0].split() == [
        *("tensor", "shape", "dtype", "sparsity", "encoding", "bytes", "share")
    ]
    assert {line.split()[0] for line in lines[2:-2]} == entries.keys()


@pytest.mark.parametrize("name", ["recipe.yaml", "export"])
def test_inspect_refuses_what_is_no_file_of_weights(name, tool, finished):
    assert str(finished / name) in refused(tool("--inspect", finished / name))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN_OR_FILE is missing: name the folder of a run or a safetensors file"),
        (
            ["RUN"],
            "--format is missing: name one of dense, compressed, timm, onnx, compact, program",
        ),
        (["RUN", "--format", "onnx"], "--output is missing: name the file or folder to write"),
        (
            ["RUN", "--inspect", "FILE"],
            "RUN_OR_FILE has no effect with --inspect: leave it out",
        ),
        (
            ["--inspect", "FILE", "--fold-bn"],
            "--fold-bn has no effect with --inspect: leave it out",
        ),
        (
            ["RUN", "--format", "timm", "--output", "X", "--fold-bn"],
            "--fold-bn has no effect with --format timm: it is for onnx",
        ),
        (
            ["RUN", "--format", "dense", "--output", "X", "--deflate"],
            "--deflate has no effect with --format dense: it is for compressed and compact",
        ),
        (
            ["RUN", "--format", "compact", "--output", "X", "--compact"],
            "--compact has no effect with --format compact: it is for onnx",
        ),
        (
            ["FILE", "--format", "dense", "--output", "X", "--model", "test_resnet"],
            "--model has no effect with --format dense: {FILE} is written with the metadata "
            "of its model that it has",
        ),
        (
            ["RUN", "--format", "onnx", "--output", "X", "--model", "test_resnet"],
            "--model has no effect: {RUN} is a run, which has its own recipe",
        ),
        (
            ["FOREIGN", "--format", "timm", "--output", "X", "--model", "test_resnet"],
            "{FOREIGN} does not describe how its images are prepared, which config.json "
            "needs: give --recipe FILE",
        ),
    ],
)
def test_options_that_are_missing_or_without_effect(arguments, message, tool, finished, tmp_path):
    names = {"FILE": "file.safetensors", "FOREIGN": "foreign.safetensors", "X": "X"}
    places = {"RUN": finished, **{word: tmp_path / name for word, name in names.items()}}
    model = create_model("test_resnet", 2)
    save_pruned(model, places["FILE"])
    save_file(model.state_dict(), places["FOREIGN"])
    ended = tool(*[places.get(argument, argument) for argument in arguments])
    assert refused(ended) == message.format(**places)
    assert not places["X"].exists()


def test_an_empty_path_is_refused(tool):
    ended = tool("", "--format", "dense", "--output", "x")
    assert ended.status == 2
    assert "argument RUN_OR_FILE: is empty; name a folder or a file" in ended.stderr


def test_an_unfinished_run_is_refused(tool, run, tmp_path):
    shutil.rmtree(run / "export")
    ended = tool(run, "--format", "timm", "--output", tmp_path / "timm")
    assert "is unfinished, 4 of 4 epochs are done: continue with starfire train " in refused(ended)


@pytest.fixture
def unfinished(run: Path) -> Path:
    """A run's folder whose weights were exported before the end of the era."""
    recipe = load_recipe(run / "recipe.yaml")
    model = fresh_model(recipe)
    pruner = Pruner(model, recipe.pruning, updates_per_epoch=4)  # type: ignore[arg-type]
    options: dict[str, Any] = {"name": recipe.model.name, **recipe.model.options}
    architecture = {**options, "num_classes": recipe.model.num_classes}
    save_pruned(
        model, exported_file(run), pruner=pruner, architecture=architecture, unfinished=True
    )
    return run


@pytest.mark.parametrize("format", ["dense", "compressed", "timm", "onnx", "compact"])
def test_weights_of_an_unfinished_pruning_are_refused(format, tool, unfinished, tmp_path):
    ended = tool(unfinished, "--format", format, "--output", tmp_path / "new")
    assert refused(ended) == (
        f"{exported_file(unfinished)} was saved before its pruning was finished: train on and save "
        f"it again, or give --unfinished (`unfinished=True`) to export it as it is"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("format", "name"), [("compressed", ""), ("timm", "model.safetensors")])
def test_unfinished_gives_weights_that_say_so(format, name, tool, unfinished, tmp_path):
    output = tmp_path / "new"
    ended = tool(unfinished, "--format", format, "--unfinished", "--output", output)
    assert ended.status == 0, ended.stderr
    assert read_metadata(output / name if name else output)["finished"] is False


def test_unfinished_gives_a_compact_file_that_says_so(tool, unfinished, tmp_path):
    output = tmp_path / "new.safetensors"
    ended = tool(unfinished, "--format", "compact", "--unfinished", "--output", output)
    assert ended.status == 0, ended.stderr
    assert read_metadata(output)["finished"] is False


@NEEDS_EXPORTER
def test_unfinished_gives_an_onnx_file_that_says_so(tool, unfinished, tmp_path):
    output = tmp_path / "new.onnx"
    ended = tool(unfinished, "--format", "onnx", "--unfinished", "--output", output)
    assert ended.status == 0, ended.stderr
    held = {entry.key: entry.value for entry in onnx.load(str(output)).metadata_props}
    assert json.loads(held["starfire_prune.pruning"]) == {"finished": False}


@pytest.mark.parametrize("name", ["new.safetensors", "new.onnx"])
def test_what_is_there_is_not_replaced(name, tool, finished, tmp_path):
    (tmp_path / name).write_text("old")
    format = "onnx" if name == "new.onnx" else "compressed"
    ended = tool(finished, "--format", format, "--output", tmp_path / name)
    assert refused(ended).endswith("is there already: choose another --output, or give --force")
    assert (tmp_path / name).read_text() == "old"


def test_weights_beside_an_onnx_file_are_not_replaced(tool, finished, tmp_path):
    (tmp_path / "new.onnx.data").write_text("old")
    ended = tool(finished, "--format", "onnx", "--output", tmp_path / "new.onnx")
    assert "new.onnx.data is there already: choose another --output" in refused(ended)


def test_force_replaces_a_file(tool, finished, tmp_path):
    (tmp_path / "new.safetensors").write_text("old")
    output = tmp_path / "new.safetensors"
    assert tool(finished, "--format", "dense", "--force", "--output", output).status == 0
    assert load_pruned(output)


def test_force_replaces_a_folder_for_timm(tool, finished, tmp_path):
    command = (finished, "--format", "timm", "--output", tmp_path / "timm")
    assert tool(*command).status == 0
    (tmp_path / "timm" / "config.json").write_text("old")
    assert "is there already: choose another --output" in refused(tool(*command))
    assert tool(*command, "--force").status == 0
    assert (tmp_path / "timm" / "config.json").read_text() != "old"


def test_an_empty_folder_is_filled(tool, finished, tmp_path):
    (tmp_path / "timm").mkdir()
    assert tool(finished, "--format", "timm", "--output", tmp_path / "timm").status == 0


def test_a_folder_of_other_files_is_never_replaced(tool, finished, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    ended = tool(finished, "--format", "timm", "--force", "--output", tmp_path)
    assert "holds other files, such as thesis.tex: choose another folder" in refused(ended)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_the_weights_themselves_are_never_replaced(tool, run):
    weights = run / "export" / "model.safetensors"
    before = weights.read_bytes()
    ended = tool(run, "--format", "compressed", "--force", "--output", weights)
    assert refused(ended) == f"--output {weights} is what is exported: choose another"
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("format", "name", "message"),
    [
        ("onnx", "folder", "is a folder: --format onnx writes a file"),
        ("timm", "file", "is a file: --format timm writes a folder"),
        ("dense", "file/new", "can't be written: {tmp_path}/file is a file, not a folder"),
        ("timm", "file/new", "can't be written: {tmp_path}/file is a file, not a folder"),
    ],
)
def test_an_output_of_the_wrong_kind_is_refused(format, name, message, tool, finished, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    ended = tool(finished, "--format", format, "--output", tmp_path / name)
    expected = message.format(tmp_path=tmp_path)
    assert refused(ended) == f"--output {tmp_path / name} {expected}"


def test_an_output_that_is_not_writable_is_refused(tool, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    ended = tool(finished, "--format", "dense", "--output", tmp_path / "new.safetensors")
    assert refused(ended) == (
        f"--output {tmp_path / 'new.safetensors'} can't be written: {tmp_path} is not writable"
    )


def test_the_folder_one_is_in_is_not_replaced(tool, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = tool(finished.resolve(), "--format", "timm", "--output", ".")
    assert "--output . is the folder that you are in, which would be replaced" in refused(ended)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("one\n  two"), "{path} can't be inspected: one two"),
        (MemoryError(), "{path} can't be inspected: it takes more memory than is free (MemoryE"),
        (RecursionError("depth"), "{path} can't be inspected: it nests too deeply (depth); rest"),
    ],
)
def test_what_no_check_foresees_is_a_sentence_too(error, message, tool, tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("starfire_prune.serialization.inspect.inspect_pruned", fail)
    path = tmp_path / "file.safetensors"
    ended = tool("--inspect", path)
    assert ended.status == 1
    assert ended.stderr.startswith(f"starfire export: {message.format(path=path)}")
    assert ended.stderr.count("\n") == 1


def test_a_foreign_file_is_refused(tool, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    ended = tool(
        tmp_path / "foreign.safetensors", "--format", "onnx", "--output", tmp_path / "x.onnx"
    )
    assert "does not name a timm model: give --recipe FILE or --model NAME" in refused(ended)


def test_a_damaged_file_is_refused(tool, run, tmp_path):
    weights = run / "export" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    ended = tool(run, "--format", "compressed", "--output", tmp_path / "new.safetensors")
    assert f"{weights} can't be loaded: tensor " in refused(ended)
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    ("package", "format", "extra"),
    [
        ("onnxruntime", "onnx", "onnx"),
        ("torch_pruning", "compact", "compact"),
        ("timm", "timm", "train"),
    ],
)
def test_without_a_package_it_says_what_to_install(
    package, format, extra, tool, finished, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "timm":
        monkeypatch.delitem(sys.modules, "starfire_prune.models")
    ended = tool(finished, "--format", format, "--output", tmp_path / "new")
    assert refused(ended).endswith(f"pip install 'starfire-prune[{extra}]'")
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_every_option(tool):
    ended = tool("--help")
    options = ("--format", "--output", "--force", "--inspect", "--recipe", "--model", "--deflate")
    assert all(option in ended.stdout for option in options)


@pytest.mark.usefixtures("native_kernels")
def test_a_program_has_the_outputs_of_the_model(tool, finished, sparse, tmp_path):
    output = tmp_path / "model.program"
    ended = tool(finished, "--format", "program", "--output", output)
    assert (ended.status, ended.stderr) == (0, "")
    program = runtime.load(output)
    lines = ended.stdout.splitlines()
    assert lines[0] == f"{output}: {output.stat().st_size:,} bytes, {program}"
    assert lines[1] == "outputs are those of sparse.compile, bit for bit"
    x = torch.rand(3, *program.inputs[0].shape)
    with torch.no_grad():
        expected = sparse.eval()(x)
    assert torch.allclose(torch.from_numpy(program(x.numpy())), expected, atol=1e-4)
