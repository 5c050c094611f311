"""What modules of the package load, and that any of them can be the first one to be imported."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# By module: libraries that it does not load, since they take seconds or need not be there
NOT_LOADED = {
    "starfire_prune": ("timm", "starfire_prune.sparse"),
    "starfire_prune.api": ("timm", "accelerate", "torchvision", "matplotlib"),
    "starfire_prune.compact": ("torch_pruning",),
    "starfire_prune.data": ("timm", "torchvision", "PIL", "sklearn"),
    "starfire_prune.experiments.tables": ("timm", "accelerate", "matplotlib"),
    "starfire_prune.recipe": ("timm", "accelerate", "matplotlib"),
}

# Each module in a fork of a process that has loaded torch, for a line of what is loaded then
LOADED = """
import importlib, os, sys
import torch
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(module)
        print(module, *sys.modules, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} can't be imported first")
"""

# Each module in a fork of a process that has loaded only the slow packages
CODE = """
import importlib, os, pkgutil, sys
import pydantic, timm, torch
for module in pkgutil.walk_packages(["starfire_prune"], "starfire_prune."):
    if module.name.endswith("__main__"):
        continue
    child = os.fork()
    if not child:
        importlib.import_module(module.name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module.name} can't be imported first")
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """By module: the modules that are loaded once it is imported."""
    command = [sys.executable, "-c", LOADED, *NOT_LOADED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {module: set(names) for module, *names in lines}


@pytest.mark.parametrize("module", NOT_LOADED)
def test_a_module_loads_no_library_that_it_can_do_without(module, loaded):
    assert module in loaded[module]
    assert not loaded[module].intersection(NOT_LOADED[module])


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
