"""Fixtures that several test modules share, and the settings of Hypothesis."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# The tests' tensors are small and their processes share the cores, so that threads of torch would
# mostly wait for each other. torch reads this when it is loaded, in processes of tests too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the tests of several threads

# The same examples at every run, however slow the machine
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")


def pytest_collection_finish() -> None:
    """Let the garbage collector skip what was loaded: its search took a seventh of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def native_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernels of sparse inference, built once, in the cache that a variable names if any.

    The processes of pytest-xdist share one build: the first one builds, the others wait.
    """
    from starfire_prune.sparse import BuildError, load_kernels
    from starfire_prune.utils import cpp

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get(cpp.CACHE_VARIABLE):
            patch.setenv(cpp.CACHE_VARIABLE, str(shared / "kernels"))
        try:
            with FileLock(shared / "kernels.lock"):
                load_kernels()
        except BuildError as error:
            pytest.skip(str(error))
        yield


@pytest.fixture
def runs() -> Iterator[pytest.MonkeyPatch]:
    """Training runs of a second; a patch of what a test wants else."""
    from tests.support.runs import (
        small_runs,  # with the training libraries, which most tests don't load
    )

    with small_runs() as patch:
        yield patch


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, with its recipe beside it as `small.yaml`."""
    from starfire_prune.training.train import train
    from tests.support.runs import small_recipe, small_runs

    folder = tmp_path_factory.mktemp("finished")
    with small_runs(plot=True):
        train(small_recipe(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images that STARFIRE_TEST_DATA names."""
    folder = os.environ.get("STARFIRE_TEST_DATA")
    if not folder:
        pytest.skip("STARFIRE_TEST_DATA does not name a folder of real images")
    if not (Path(folder) / "unpack.py").is_file():
        pytest.skip(f"STARFIRE_TEST_DATA (={folder}) holds no unpack.py")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_imagenet(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 classes of Tiny-ImageNet: 500 training and 50 validation images each, 64×64."""
    root = tmp_path_factory.mktemp("data") / "tiny-imagenet-200"
    return _unpack(shared_data, "tiny-imagenet-200", root, "--classes", "20")


@pytest.fixture(scope="session")
def imagenette(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 classes of ImageNet: 100 training and 50 validation images each, 224×224."""
    return _unpack(shared_data, "imagenette", tmp_path_factory.mktemp("data") / "imagenette")


def _unpack(shared_data: Path, name: str, root: Path, *options: str) -> Path:
    subprocess.run([sys.executable, shared_data / "unpack.py", name, root, *options], check=True)
    return root
