"""Times a program beside `sparse.compile`: `python benchmarks/runtime.py [MODEL] [SIZE]`.

It prints the start of the runtime, the load of a file, and the time of a batch of one image in
both, in turns, with their ratio. Two threads each; the least of all rounds counts.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from starfire_prune import ck_structured, runtime, save_program, sparse

ROUNDS, AMOUNT, THREADS = 50, 0.8, 2


def least(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least time of a call, in milliseconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main(name: str = "resnet18", size: str = "224") -> None:
    torch.set_num_threads(THREADS)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 3 and module.groups == 1:
            ck_structured(module, amount=AMOUNT)
    images = torch.rand(1, 3, int(size), int(size))
    compiled, arrays = sparse.compile(model, images), images.numpy()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.program"
        save_program(compiled, file)
        loading = least(lambda: runtime.load(file), 5)
        program = runtime.load(file, threads=THREADS)
        command = [sys.executable, "-c", "import starfire_prune.runtime"]
        empty = least(lambda: subprocess.run([sys.executable, "-c", ""], check=True), 5)
        importing = least(lambda: subprocess.run(command, check=True), 5) - empty
        megabytes = file.stat().st_size / 1e6
    calls = (lambda: program(arrays), lambda: compiled(images))
    pairs = [[least(call, 1) for call in calls] for _ in range(ROUNDS)]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    print(f"import {importing:.0f} ms, load {loading:.0f} ms ({megabytes:.1f} MB)")
    print(f"program {ours:.2f} ms, sparse.compile {theirs:.2f} ms: {ours / theirs:.2f}x")


if __name__ == "__main__":
    main(*sys.argv[1:])
