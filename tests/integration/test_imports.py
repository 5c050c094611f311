"""Any module of the package can be the first one that a program imports."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

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


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
