"""Programs run where neither torch nor a compiler is, and from C."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from starfire_prune import runtime
from starfire_prune.utils import cpp
from tests.support.paths import ROOT
from tests.support.program_files import file_bytes

pytestmark = pytest.mark.usefixtures("native_kernels")
IGNORED = shutil.ignore_patterns("__pycache__", "*.cpp")
RUN = """
import sys
import numpy as np
from starfire_prune import runtime
program = runtime.load(sys.argv[1])
np.save(sys.argv[2], program(np.full((3, *program.inputs[0].shape), 0.5, np.float32)))
print(runtime.library_path())
"""


@pytest.fixture
def file(contents, tmp_path: Path) -> Path:
    path = tmp_path / "model.program"
    path.write_bytes(file_bytes(contents["bytes"]))
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the package and NumPy, and nothing else."""
    folder = tmp_path / "site"
    shutil.copytree(ROOT / "starfire_prune", folder / "starfire_prune", ignore=IGNORED)
    place = Path(np.__file__).parents[1]
    for path in (place / "numpy", place / "numpy.libs"):
        if path.exists():
            (folder / path.name).symlink_to(path)
    return folder


def python(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python without its own packages and without programs."""
    environment = {
        "PYTHONPATH": str(site),
        "PATH": str(site / "no programs"),
        cpp.CACHE_VARIABLE: str(site / "cache"),
    }
    command = [sys.executable, "-S", "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)


def expected(file: Path) -> np.ndarray:
    program = runtime.load(file)
    result = program(np.full((3, *program.inputs[0].shape), 0.5, np.float32))
    assert isinstance(result, np.ndarray)
    return result


def test_a_wheel_needs_no_torch_and_no_compiler(file, site, tmp_path):
    library = site / "starfire_prune" / "runtime" / "libstarfire.so"
    shutil.copy(runtime.library_path(), library)
    done = python(site, file, tmp_path / "out.npy")
    assert (done.returncode, done.stdout.strip()) == (0, str(library)), done.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected(file))


def test_without_library_and_compiler_an_error_says_what_to_do(file, site, tmp_path):
    (site / "starfire_prune" / "runtime" / "libstarfire.so").unlink(missing_ok=True)
    done = python(site, file, tmp_path / "out.npy")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "this installation has no libstarfire.so, and it can't be built: there is no C++ compiler: "
        "c++, g++, clang++ are not in the PATH; install one, or set CXX to one; or install a wheel "
        "for this platform, which has it"
    )


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example in C, built."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path / "run_program"
    sources = [str(ROOT / "examples" / "run_program.c"), str(runtime.library_path())]
    options = ["-Wall", "-Wextra", "-Werror", f"-I{runtime.HEADER.parent}", "-o", str(path)]
    subprocess.run([compiler, *sources, *options], check=True)
    return path


def test_the_example_in_c_prints_the_outputs(file, example):
    done = subprocess.run([example, file, "3", "0.5"], capture_output=True, text=True, check=True)
    values = [float(line.split(" = ")[1]) for line in done.stdout.splitlines()]
    assert done.stdout.startswith("output[0] = ")
    assert np.array_equal(np.array(values, np.float32), expected(file).reshape(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such file", "1", "0"], "no such file: No such file or directory"),
        (["model.program", "0", "0"], "BATCH must be at least 1"),
        (["damaged", "1", "0"], "damaged: its tensor constants is damaged: the checksum differs"),
    ],
)
def test_the_example_in_c_prints_errors(file, example, tmp_path, arguments, message):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    done = subprocess.run([example, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, message + "\n")
