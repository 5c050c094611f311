"""Loads and runs damaged programs: `python -m tests.support.try_damaged FOLDER COUNT SEED`.

The folder has contents of programs. Nothing but a crash or a hang is a failure here, except that
damage which a checksum covers is accepted.
"""

import sys
from pathlib import Path

import numpy as np

from starfire_prune import runtime
from tests.support.program_files import Content, damaged, file_bytes, mutated


def try_damaged(contents: list[Content], count: int, seed: int) -> tuple[int, int]:
    """Damage `count` files; returns how many damaged ones and how many mutated ones were run."""
    random = np.random.default_rng(seed)
    files = [file_bytes(content) for content in contents]
    expected = [run(runtime.load(file), 2) for file in files]
    ran = [0, 0]
    for number in range(count):
        index = int(random.integers(len(files)))
        as_mutated = number % 4 != 0
        file = (
            file_bytes(mutated(contents[index], random))
            if as_mutated
            else damaged(files[index], random)
        )
        options = ((1, 2, 5), (1, 2), (0, 0, 128, 256))
        batch, threads, instructions = (int(random.choice(each)) for each in options)
        try:
            program = runtime.load(file, threads=threads, instructions=instructions)
        except runtime.ProgramError:
            continue
        ran[as_mutated] += 1
        if as_mutated:
            run(program, batch)
        else:
            for one, other in zip(expected[index], run(program, 2), strict=True):
                np.testing.assert_array_equal(one, other)
    return ran[0], ran[1]


def run(program: runtime.Program, batch: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sources = [random.standard_normal((batch, *spec.shape), np.float32) for spec in program.inputs]
    results = program(*sources)
    return results if isinstance(results, list) else [results]


if __name__ == "__main__":
    folder, count, seed = sys.argv[1:]
    found = [Content.load(path) for path in sorted(Path(folder).glob("*.npz"))]
    sys.stdout.write("{} {}".format(*try_damaged(found, int(count), int(seed))))
