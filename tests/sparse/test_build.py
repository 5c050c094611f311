"""The native kernels are built once for each machine, and failures have clear messages."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from starfire_prune import ck_structured, sparse
from starfire_prune.sparse import BuildError, build, ops
from starfire_prune.utils import cpp
from tests.support.sparse_networks import difference, images

FAKE = """#!/bin/sh
for last; do :; done
[ "$last" = --version ] && {{ echo {version} "$1"; exit; }}
{build}
"""
FAILS = """echo "sparse.cpp:1: error: no room" >&2; exit 1"""
BUILDS = """echo "no library" > "$last" """  # whether to compile or to link


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache and a compiler that fails."""
    monkeypatch.setenv(cpp.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler(tmp_path))
    return tmp_path


def compiler(folder: Path, version: str = "fake 1.0", build: str = FAILS) -> str:
    path = folder / version.replace(" ", "-")
    path.write_text(FAKE.format(version=version, build=build))
    path.chmod(0o755)
    return str(path)


def key() -> str:
    return cpp.library_key(build.torch_library())


def test_the_compilers_first_error_is_reported(fresh):
    with pytest.raises(BuildError, match=r"can't build the native kernels: .*error: no room"):
        build.built_library()
    assert not list((fresh / "cache").iterdir())


def test_a_compilers_message_may_be_in_any_encoding(fresh):
    compiler(fresh, build=r"""printf 'error: gr\366\337er' >&2; exit 1""")
    with pytest.raises(BuildError, match=r"can't build the native kernels: error: gr\ufffd+er"):
        build.built_library()


def test_a_compiler_that_writes_nothing_is_reported(fresh):
    compiler(fresh, build="exit 0")
    with pytest.raises(BuildError, match=r"fake-1.0 can't build .*: no message; set CXX to"):
        build.built_library()


def test_a_failed_build_names_the_users_flags(fresh, monkeypatch):
    monkeypatch.setenv(cpp.FLAGS_VARIABLE, "-O9 -wrong")
    expected = rf"set CXX to .*, or unset {cpp.FLAGS_VARIABLE} \(='-O9 -wrong'\)"
    with pytest.raises(BuildError, match=expected):
        build.built_library()


def test_a_compiler_that_cannot_be_executed_is_reported(fresh, monkeypatch):
    (fresh / "picture").write_bytes(b"\x89PNG")
    (fresh / "picture").chmod(0o755)
    monkeypatch.setenv("CXX", f"{fresh}/picture -O1")
    expected = r"picture can't be run: .*Exec format error.*; set CXX to another C\+\+ compiler"
    with pytest.raises(BuildError, match=expected):
        build.built_library()


@pytest.mark.parametrize("value", [" ", "''", "no-such-compiler -O1", "no\udcffname"])
def test_a_compiler_that_does_not_exist_is_reported(fresh, monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(BuildError, match=r"no C.. compiler: .*; install one, or set") as info:
        build.built_library()
    assert f"CXX (={value!r}) is not a program" in str(info.value)


def test_without_any_compiler_three_are_named(fresh, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(
        BuildError, match=r": c\+\+, g\+\+, clang\+\+ are not in the PATH; install one"
    ):
        build.built_library()


@pytest.mark.parametrize("variable", ["CXX", cpp.FLAGS_VARIABLE])
def test_quotes_that_do_not_end_are_reported(fresh, monkeypatch, variable):
    monkeypatch.setenv(variable, "'g++ -O1")
    expected = rf"""{variable} \(="'g\+\+ -O1"\) can't be split into words: No closing"""
    with pytest.raises(BuildError, match=expected):
        build.built_library()


def test_flags_may_be_invalid_unicode(fresh, monkeypatch):
    before = key()
    monkeypatch.setenv(cpp.FLAGS_VARIABLE, "-I\udcff")
    assert key() != before


@pytest.mark.parametrize("name", ["file/cache", "x" * 300], ids=["in a file", "too long"])
def test_a_cache_that_cannot_be_written_is_named(fresh, monkeypatch, name):
    (fresh / "file").touch()
    monkeypatch.setenv(cpp.CACHE_VARIABLE, str(fresh / name))
    with pytest.raises(BuildError, match=rf"set {cpp.CACHE_VARIABLE} to a folder"):
        build.built_library()


def test_users_without_a_home_are_asked_to_set_a_cache(fresh, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(cpp.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BuildError, match=rf"home directory.*; set {cpp.CACHE_VARIABLE} to a"):
        build.built_library()


def test_a_home_that_does_not_exist_is_named(fresh, monkeypatch):
    monkeypatch.setenv(cpp.CACHE_VARIABLE, "~no-such-user/cache")
    with pytest.raises(BuildError, match=rf"{cpp.CACHE_VARIABLE} \(='~no-such-user/cache'\)"):
        build.built_library()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (cpp.CACHE_VARIABLE, ".", "."),
        (cpp.CACHE_VARIABLE, "a/b", "a/b"),
        (cpp.CACHE_VARIABLE, "~/kernels", "home/kernels"),
        ("XDG_CACHE_HOME", "{}/xdg", "xdg/starfire_prune"),
        ("XDG_CACHE_HOME", "xdg", "home/.cache/starfire_prune"),
        ("XDG_CACHE_HOME", "", "home/.cache/starfire_prune"),
    ],
)
def test_the_cache_is_an_absolute_folder(tmp_path, monkeypatch, variable, value, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(cpp.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv(variable, value.format(tmp_path))
    assert cpp.cache_folder() == tmp_path / expected


def cached(fresh: Path) -> Path:
    """A file that isn't a library, in the place of the cached one."""
    (fresh / "cache").mkdir(mode=0o700)
    path = fresh / "cache" / f"{key()}.so"
    path.write_text("no library")
    path.chmod(0o600)
    return path


def test_a_library_that_cannot_be_loaded_is_named(fresh, monkeypatch):
    path = cached(fresh)
    monkeypatch.setattr(ops, "_are_registered", lambda: False)
    with pytest.raises(BuildError, match=rf"{path.name} can't be loaded: .*delete it"):
        ops.load_kernels.__wrapped__()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_others_cannot_write_what_is_built(fresh, monkeypatch):
    compiler(fresh, build=BUILDS)
    monkeypatch.setenv(cpp.CACHE_VARIABLE, str(fresh / "new" / "cache"))
    build.built_library()
    folders = [fresh / "new", fresh / "new" / "cache"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in folders] == [0o700, 0o700]
    (library,) = folders[1].iterdir()
    assert library.read_text() == "no library\n"
    assert library.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_cache_that_others_can_write_is_refused(fresh, mode):
    path = cached(fresh).parent
    path.chmod(mode)
    expected = (
        rf"{path} can be written by other users \(owner \d+, mode {mode:04o}\), who could run"
    )
    with pytest.raises(BuildError, match=expected) as info:
        build.built_library()
    assert f"; set {cpp.CACHE_VARIABLE} to a folder that only you can write" in str(info.value)


def test_nothing_is_built_in_a_cache_that_others_can_write(fresh):
    compiler(fresh, build=BUILDS)
    (fresh / "cache").mkdir()
    (fresh / "cache").chmod(0o777)
    with pytest.raises(BuildError, match="can be written by other users"):
        build.built_library()
    assert not list((fresh / "cache").iterdir())


@pytest.mark.parametrize(("owner", "user"), [(1001, 0), (1001, 1000)])
def test_a_cache_of_another_user_is_refused(fresh, monkeypatch, owner, user):
    set_owner(monkeypatch, owner, user)
    with pytest.raises(BuildError, match=rf"written by other users \(owner {owner}, mode 0700\)"):
        cpp.check_cache(fresh)


@pytest.mark.parametrize(("owner", "user"), [(0, 0), (0, 1000), (1000, 1000)])
def test_a_cache_of_the_user_or_root_is_accepted(fresh, monkeypatch, owner, user):
    set_owner(monkeypatch, owner, user)
    cpp.check_cache(fresh)


def set_owner(monkeypatch: pytest.MonkeyPatch, owner: int, user: int) -> None:
    status = os.stat_result((0o40700, 0, 0, 1, owner, 0, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status)
    monkeypatch.setattr(os, "getuid", lambda: user)


def test_systems_without_user_numbers_accept_any_cache(fresh, monkeypatch):
    path = cached(fresh)
    path.parent.chmod(0o777)
    monkeypatch.delattr(os, "getuid")
    assert build.built_library() == path


def test_the_key_depends_on_what_calls_the_compiler(fresh, monkeypatch):
    cache = compiler(fresh, "cache 1.0")
    monkeypatch.setenv("CXX", f"{cache} g++")
    assert "g++" in cpp.run_compiler([*cpp.compiler_command(), "--version"]).stdout
    keys = {cpp.library_key(cpp.Library(["the", "same"], [build.SOURCES]))}
    monkeypatch.setenv("CXX", f"{cache} clang++")
    keys.add(cpp.library_key(cpp.Library(["the", "same"], [build.SOURCES])))
    assert len(keys) == 2


def test_the_key_depends_on_the_compiler_and_its_flags(fresh, monkeypatch):
    before = key()
    assert key() == before
    monkeypatch.setenv(cpp.FLAGS_VARIABLE, "-O1")
    assert key() != before
    monkeypatch.delenv(cpp.FLAGS_VARIABLE)
    monkeypatch.setenv("CXX", f"{fresh}/compiler")
    Path(compiler(fresh)).rename(fresh / "compiler")
    other = key()
    Path(compiler(fresh, "fake 2.0")).rename(fresh / "compiler")
    assert key() not in (before, other)


def test_the_sources_are_part_of_the_package():
    names = {path.name for folder in build.torch_library().folders for path in folder.iterdir()}
    assert names >= {"sparse.cpp", "runner.cpp", "dispatch.cpp", "program.h", "spatial.h"}


@pytest.fixture
def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    ck_structured(model[0], amount=0.5)
    return model


def test_without_a_compiler_the_model_runs_on_torch(monkeypatch, pruned):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(ops, "_are_registered", lambda: False)
    ops.load_kernels.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="the model runs on torch, as dense: there is no C.. compiler"
    ) as w:
        compiled = sparse.compile(pruned, images())
    assert len(w) == 1
    assert w[0].filename == __file__
    assert "CXX (='no-such-compiler') is not a program" in str(compiled.reason)
    assert compiled.segments == []
    assert difference(pruned, compiled, images()) < 1e-6
