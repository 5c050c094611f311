"""Building the native kernels: once for each machine, and with clear words where it fails."""

import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from starfire_prune import ck_structured, sparse
from starfire_prune.sparse import BuildError, build
from tests.support.sparse_networks import difference, images

FAKE = """#!/bin/sh
for last; do :; done
[ "$last" = --version ] && {{ echo {version} "$1"; exit; }}
{build}
"""
FAILS = """echo "sparse.cpp:1: error: no room" >&2; exit 1"""
BUILDS = """echo "no library" > "$last" """


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, a compiler that builds nothing, and no library that is loaded."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler(tmp_path))
    monkeypatch.setattr(build, "native", functools.cache(build.native.__wrapped__))
    return tmp_path


def compiler(folder: Path, version: str = "fake 1.0", build: str = FAILS) -> str:
    path = folder / version.replace(" ", "-")
    path.write_text(FAKE.format(version=version, build=build))
    path.chmod(0o755)
    return str(path)


def test_the_compilers_first_error_is_told(fresh):
    with pytest.raises(BuildError, match=r"can't build the native kernels: .*error: no room"):
        build.native()
    assert not list((fresh / "cache").iterdir())


def test_a_compilers_message_may_be_in_any_encoding(fresh):
    compiler(fresh, build=r"""printf 'error: gr\366\337er' >&2; exit 1""")
    with pytest.raises(BuildError, match=r"can't build the native kernels: error: gr\ufffd+er"):
        build.native()


def test_a_compiler_that_writes_nothing_is_told(fresh):
    compiler(fresh, build="exit 0")
    with pytest.raises(BuildError, match=r"no message, with CXX \(='.*fake-1.0'\); set CXX to"):
        build.native()


def test_a_failed_build_names_the_users_flags(fresh, monkeypatch):
    monkeypatch.setenv(build.FLAGS_VARIABLE, "-O9 -wrong")
    expected = rf"{build.FLAGS_VARIABLE} \(='-O9 -wrong'\); .*unset {build.FLAGS_VARIABLE}"
    with pytest.raises(BuildError, match=expected):
        build.native()


def test_a_compiler_that_cannot_be_executed_is_told(fresh, monkeypatch):
    (fresh / "picture").write_bytes(b"\x89PNG")
    (fresh / "picture").chmod(0o755)
    monkeypatch.setenv("CXX", f"{fresh}/picture -O1")
    expected = r"Exec format error.*CXX \(='.*picture -O1'\); set CXX to a C\+\+ compiler"
    with pytest.raises(BuildError, match=expected):
        build.native()


@pytest.mark.parametrize("value", [" ", "''", "no-such-compiler -O1", "no\udcffname"])
def test_a_compiler_that_is_none_is_told(fresh, monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(BuildError, match=r"no C.. compiler: .*; set it to a compiler, or") as info:
        build.native()
    assert f"CXX (={value!r}) names no program" in str(info.value)


def test_without_any_compiler_three_are_named(fresh, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is in the PATH; inst"):
        build.native()


@pytest.mark.parametrize("variable", ["CXX", build.FLAGS_VARIABLE])
def test_quotes_that_do_not_end_are_told(fresh, monkeypatch, variable):
    monkeypatch.setenv(variable, "'g++ -O1")
    expected = rf"""{variable} \(="'g\+\+ -O1"\) can't be split.*: No closing.*; correct or unset"""
    with pytest.raises(BuildError, match=expected):
        build.native()


def test_flags_may_be_no_unicode(fresh, monkeypatch):
    key = build._key(build._command())
    monkeypatch.setenv(build.FLAGS_VARIABLE, "-I\udcff")
    assert build._key(build._command()) != key


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


def test_a_home_that_is_not_there_is_named(fresh, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, "~no-such-user/cache")
    with pytest.raises(BuildError, match=rf"{build.CACHE_VARIABLE} \(='~no-such-user/cache'\)"):
        build.native()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (build.CACHE_VARIABLE, ".", "."),
        (build.CACHE_VARIABLE, "a/b", "a/b"),
        (build.CACHE_VARIABLE, "~/kernels", "home/kernels"),
        ("XDG_CACHE_HOME", "{}/xdg", "xdg/starfire_prune"),
        ("XDG_CACHE_HOME", "xdg", "home/.cache/starfire_prune"),
        ("XDG_CACHE_HOME", "", "home/.cache/starfire_prune"),
    ],
)
def test_the_cache_is_an_absolute_folder(tmp_path, monkeypatch, variable, value, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(build.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv(variable, value.format(tmp_path))
    assert build._cache() == tmp_path / expected


def cached(fresh: Path) -> Path:
    """What is no library, where the library is looked for."""
    (fresh / "cache").mkdir(mode=0o700)
    path = fresh / "cache" / f"{build._key(build._command())}.so"
    path.write_text("no library")
    path.chmod(0o600)
    return path


def test_a_library_that_cannot_be_loaded_is_named(fresh):
    path = cached(fresh)
    with pytest.raises(BuildError, match=rf"{path.name} can't be loaded: .*delete it"):
        build.native()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_others_cannot_write_what_is_built(fresh, monkeypatch):
    compiler(fresh, build=BUILDS)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(fresh / "new" / "cache"))
    with pytest.raises(BuildError, match="can't be loaded"):
        build.native()
    folders = [fresh / "new", fresh / "new" / "cache"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in folders] == [0o700, 0o700]
    (library,) = folders[1].iterdir()
    assert library.read_text() == "no library\n"
    assert library.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_can_write_is_refused(fresh, what, mode):
    path = cached(fresh) if what == "library" else cached(fresh).parent
    path.chmod(mode)
    expected = rf"{path} can be written by others \(mode {mode:04o}\).*`chmod go-w {path}` .*, or "
    with pytest.raises(BuildError, match=expected + f"set {build.CACHE_VARIABLE} to a folder"):
        build.native()


def test_nothing_is_built_in_a_folder_that_others_can_write(fresh):
    compiler(fresh, build=BUILDS)
    (fresh / "cache").mkdir()
    (fresh / "cache").chmod(0o777)
    with pytest.raises(BuildError, match="can be written by others"):
        build.native()
    assert not list((fresh / "cache").iterdir())


def status(owner: int, mode: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("user", [0, 1000])
def test_what_is_the_users_or_roots_is_trusted(user):
    for owner in (user, 0):
        assert build._distrusted(status(owner, 0o40755), user) is None
        assert "by others (mode 0775)" in str(build._distrusted(status(owner, 0o40775), user))


@pytest.mark.parametrize("user", [0, 1000])
def test_what_is_another_users_is_refused(fresh, monkeypatch, user):
    path = cached(fresh)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status(1001, 0o40700))
    monkeypatch.setattr(os, "getuid", lambda: user)
    with pytest.raises(BuildError, match=rf"another user \(1001, and you are {user}\)") as info:
        build._check_trusted(path)
    assert f"; set {build.CACHE_VARIABLE} to a folder" in str(info.value)  # chmod is no way out


def test_systems_without_user_numbers_trust_their_folders(fresh, monkeypatch):
    cached(fresh).chmod(0o777)
    monkeypatch.delattr(os, "getuid")
    with pytest.raises(BuildError, match="can't be loaded"):
        build.native()


def test_the_key_is_of_what_calls_the_compiler_too(fresh, monkeypatch):
    cache = compiler(fresh, "cache 1.0")
    monkeypatch.setenv("CXX", f"{cache} g++")
    assert "g++" in build._run([*build._compiler(), "--version"]).stdout
    keys = {build._key(["the", "same"])}
    monkeypatch.setenv("CXX", f"{cache} clang++")
    keys.add(build._key(["the", "same"]))
    assert len(keys) == 2


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
    assert "CXX (='no-such-compiler') names no program" in str(compiled.reason)
    assert compiled.segments == []
    assert difference(pruned, compiled, images()) < 1e-6
