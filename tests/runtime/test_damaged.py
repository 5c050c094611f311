"""Damaged programs are refused, or run without a crash: nothing they say is trusted."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from starfire_prune import runtime
from starfire_prune.serialization.program import FILE_VERSION
from starfire_prune.sparse.program_format import FORMAT, OPERATION_FIELDS, Opcode
from starfire_prune.utils import cpp
from tests.support.paths import ROOT
from tests.support.program_files import Content, file_bytes
from tests.support.try_damaged import try_damaged

pytestmark = pytest.mark.usefixtures("native_kernels")
NOT_THERE = {Opcode.DEQUANTIZE, Opcode.BYTE_MEAN, Opcode.RESPONSE}
SANITIZED = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def first_operations(program: np.ndarray) -> dict[int, int]:
    """By opcode: where its first operation is."""
    at = 6 + 3 * int(program[1]) + 16 * int(program[2])
    found: dict[int, int] = {}
    for _ in range(program[3]):
        opcode = int(program[at])
        found.setdefault(opcode, at)
        at += 1 + OPERATION_FIELDS[Opcode(opcode)]
    return found


def changed(content: Content, at: int, number: int) -> bytes:
    program = content.program.copy()
    program[at] = number
    return file_bytes(content._replace(program=program))


def test_the_programs_have_most_operations(contents):
    found = {code for content in contents.values() for code in first_operations(content.program)}
    assert found >= set(Opcode) - NOT_THERE


@pytest.mark.parametrize("number", [-1, 1 << 20, 1 << 62, -(1 << 63)])
def test_no_operation_reads_or_writes_another_view(contents, number):
    for content in contents.values():
        for at in first_operations(content.program).values():
            for field in (1, 2):
                with pytest.raises(
                    runtime.ProgramError, match=r"operation \d+ .*: the number of a"
                ):
                    runtime.load(changed(content, at + field, number))


@pytest.mark.parametrize(("number", "message"), [(0, "doesn't know"), (99, "doesn't know")])
def test_unknown_operations_are_named(contents, number, message):
    content = contents["floats"]
    at = min(first_operations(content.program).values())
    with pytest.raises(runtime.ProgramError, match=message):
        runtime.load(changed(content, at, number))


def test_a_newer_version_is_named(contents):
    file = file_bytes(contents["bytes"], version="2")
    with pytest.raises(runtime.ProgramError, match=r"has version 2 .* reads version 1: update"):
        runtime.load(file)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "too short for a safetensors file"),
        (b"x" * 100, "no complete safetensors file"),
        (b"\x02" + bytes(7) + b"{}", "is not a file of a program: `starfire export RUN"),
    ],
)
def test_other_files_are_named(file, message):
    with pytest.raises(runtime.ProgramError, match=message):
        runtime.load(file)


def test_every_flipped_bit_of_a_header_is_noticed(contents):
    file = file_bytes(contents["bytes"])
    length = 8 + int.from_bytes(file[:8], "little")
    expected = run(runtime.load(file))
    for at in range(0, length, 3):
        flipped = bytearray(file)
        flipped[at] ^= 1 << at % 8
        try:
            program = runtime.load(bytes(flipped))
        except runtime.ProgramError:
            continue
        assert np.array_equal(run(program), expected)


def run(program: runtime.Program) -> np.ndarray:
    result = program(np.ones((2, *program.inputs[0].shape), np.float32))
    assert isinstance(result, np.ndarray)
    return result


def test_damaged_files_do_no_harm(contents):
    damaged, mutated = try_damaged(list(contents.values()), 400, seed=0)
    assert damaged == 0
    assert mutated > 20


@pytest.mark.slow
def test_many_damaged_files_do_no_harm(contents):
    damaged, mutated = try_damaged(list(contents.values()), 20_000, seed=1)
    assert damaged == 0
    assert mutated > 1000


@pytest.mark.slow
def test_damaged_files_are_clean_under_sanitizers(contents, tmp_path):
    compiler = cpp.compiler_command()[0]
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{compiler} has no sanitizers")
    for number, content in enumerate(contents.values()):
        content.save(tmp_path / f"{number}.npz")
    environment = {**os.environ, cpp.FLAGS_VARIABLE: SANITIZED}
    code = "from starfire_prune.runtime import library_path; library_path()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    environment |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.support.try_damaged", str(tmp_path), "3000", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_a_changed_format_has_another_version():
    """Whoever changes what a field means raises the version of both sides, and these numbers."""
    sizes = sum(value for name, value in FORMAT.items() if name != "MAGIC")
    assert (FILE_VERSION, len(FORMAT), sizes) == (1, 78, 2101)
