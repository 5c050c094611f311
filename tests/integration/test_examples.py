"""The examples run to their end, each as a user starts it."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
# By example: the start of the last line that it prints
LAST_LINES = {
    "accelerate_loop": "weights: digits.safetensors",
    "plain_loop": "sparsity: 59.82% of the pruned layers' weights",
    "prune_compact_time": "kernels pruned, compiled ",
}


def test_every_example_is_run():
    assert [path.stem for path in sorted(EXAMPLES.glob("*.py"))] == [*LAST_LINES]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("accelerate_loop", marks=pytest.mark.slow),
        "plain_loop",
        pytest.param("prune_compact_time", marks=pytest.mark.slow),  # it compacts a ResNet
    ],
)
@pytest.mark.usefixtures("native_kernels")
def test_an_example_runs(name, tmp_path):
    if name == "prune_compact_time":
        pytest.importorskip("torch_pruning")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(LAST_LINES[name])
