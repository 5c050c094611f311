"""Runs the kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from starfire_prune.utils import cpp
from tests.support.paths import ROOT

FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.mark.slow
@pytest.mark.usefixtures("native_kernels")
def test_the_kernels_are_clean_under_sanitizers(tmp_path):
    compiler = cpp.compiler_command()[0]
    runtimes = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in runtimes
    ]
    libraries = [done.stdout.strip() for done in found]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"{compiler} has no sanitizers")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        cpp.FLAGS_VARIABLE: FLAGS,
        cpp.CACHE_VARIABLE: str(tmp_path),
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    names = ("kernels", "activations", "image_kernels", "byte_kernels", "compiler", "families")
    tests += [f"tests/sparse/test_{name}.py" for name in names]
    tests += [
        "-k",
        "kernels or activations or outputs_are or sizes or batches or threads or equal_torch "
        "or mobilenetv3 or detector or convnextv2",
    ]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "skipped" not in done.stdout
