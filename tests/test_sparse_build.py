"""Building the native kernels: once for each machine, and with clear words where it fails."""

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from starfire_prune import ck_structured, sparse
from starfire_prune.sparse import BuildError, build
from tests.sparse_networks import difference, images

FAKE = """#!/bin/sh
[ "$1" = --version ] && {{ echo {version}; exit; }}
echo "sparse.cpp:1: error: no room" >&2
exit 1
"""


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, a compiler that builds nothing, and no library that is loaded."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler(tmp_path))
    monkeypatch.setattr(build, "native", functools.cache(build.native.__wrapped__))
    return tmp_path


def compiler(folder: Path, version: str = "fake 1.0") -> str:
    path = folder / version.replace(" ", "-")
    path.write_text(FAKE.format(version=version))
    path.chmod(0o755)
    return str(path)


def test_the_compilers_first_error_is_told(fresh):
    with pytest.raises(BuildError, match=r"can't build the native kernels: .*error: no room"):
        build.native()
    assert not list((fresh / "cache").iterdir())


@pytest.mark.parametrize("name", ["file/cache", "x" * 300], ids=["in a file", "too long"])
def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch, name):
    (fresh / "file").touch()
    monkeypatch.setenv(build.CACHE_VARIABLE, str(fresh / name))
    with pytest.raises(BuildError, match=rf"set {build.CACHE_VARIABLE} to a folder"):
        build.native()


def test_users_without_a_home_are_told_to_name_a_cache(fresh, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(build.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BuildError, match=rf"home directory.*; set {build.CACHE_VARIABLE} to a"):
        build.native()


def test_a_library_that_cannot_be_loaded_is_named(fresh):
    key = build._key(build._command())
    (fresh / "cache").mkdir()
    (fresh / "cache" / f"{key}.so").write_text("no library")
    with pytest.raises(BuildError, match=rf"{key}.so can't be loaded: .*delete it"):
        build.native()


def test_the_key_is_of_the_compiler_and_its_flags(fresh, monkeypatch):
    key = build._key(build._command())
    assert build._key(build._command()) == key
    monkeypatch.setenv(build.FLAGS_VARIABLE, "-O1")
    assert build._key(build._command()) != key
    monkeypatch.delenv(build.FLAGS_VARIABLE)
    monkeypatch.setenv("CXX", f"{fresh}/compiler")
    Path(compiler(fresh)).rename(fresh / "compiler")
    other = build._key(build._command())
    Path(compiler(fresh, "fake 2.0")).rename(fresh / "compiler")
    assert build._key(build._command()) not in (key, other)


def test_the_sources_are_part_of_the_package():
    assert {path.name for path in build.SOURCES.iterdir()} >= {"sparse.cpp", "kernels.h"}


@pytest.fixture
def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    ck_structured(model[0], amount=0.5)
    return model


def test_without_a_compiler_the_model_stays_dense(monkeypatch, pruned):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.native.cache_clear()
    with pytest.warns(RuntimeWarning, match="the model stays dense: there is no C.. compiler") as w:
        compiled = sparse.compile(pruned, images())
    build.native.cache_clear()
    assert len(w) == 1
    assert w[0].filename == __file__
    assert "CXX=no-such-compiler isn't in the PATH" in str(compiled.reason)
    assert compiled.segments == []
    assert difference(pruned, compiled, images()) < 1e-6
