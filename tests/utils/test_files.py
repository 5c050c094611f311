"""Files and folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from starfire_prune.utils.errors import CheckpointError
from starfire_prune.utils.files import checked_file, replaced_file, replaced_folder, write_text


class Interrupted(BaseException):
    """What a block may end with, other than an error."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# A file


def test_a_file_appears_when_the_block_has_ended(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with replaced_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError, Interrupted])
def test_a_block_that_raises_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with replaced_file(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_what_a_kill_left_of_a_file_is_cleared_away(tmp_path):
    path = tmp_path / "file.txt"
    with replaced_file(path) as temporary:
        left = temporary
        temporary.write_text("new")
    left.write_text("half of an earlier one, and longer")
    with replaced_file(path) as temporary:
        assert temporary.read_text() == ""
        temporary.write_text("newer")
    assert path.read_text() == "newer"
    assert names(tmp_path) == ["file.txt"]


def test_a_block_that_makes_a_private_file_leaves_one_that_others_may_read(tmp_path):
    path, plain = tmp_path / "file.txt", tmp_path / "plain.txt"
    plain.touch()
    with replaced_file(path) as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_block_that_writes_no_file_is_an_error_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with replaced_file(path) as temporary:
            temporary.unlink()

    with pytest.raises(FileNotFoundError):
        write()
    assert path.read_text() == "old"


def test_text_is_written_in_utf8(tmp_path):
    write_text(tmp_path / "file.txt", "3×3\n")
    assert (tmp_path / "file.txt").read_bytes() == b"3\xc3\x973\n"


# A file that is checked


def test_a_check_fails_with_its_own_error_and_nothing_appears(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(RuntimeError, match=r"^of the check$"):  # noqa: SIM117
        with checked_file(path, replaced_file(path)):
            raise RuntimeError("of the check")
    assert names(tmp_path) == []


def test_a_checked_file_appears(tmp_path):
    path = tmp_path / "file.txt"
    with checked_file(path, replaced_file(path)) as temporary:
        temporary.write_text("new")
        assert names(tmp_path) == [temporary.name]
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_a_file_that_can_not_be_put_there_is_told_as_such(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(CheckpointError, match=r"file.txt can't be written"):  # noqa: SIM117
        with checked_file(path, replaced_file(path)):
            path.mkdir()
    assert names(tmp_path) == ["file.txt"]


# A folder


def test_a_folder_appears_when_the_block_has_ended(tmp_path):
    path = tmp_path / "new" / "folder"
    with replaced_folder(path) as temporary:
        (temporary / "file.txt").write_text("new")
        assert not path.exists()
    assert names(path) == ["file.txt"]
    assert names(path.parent) == ["folder"]


def test_a_folder_replaces_the_old_one_and_all_its_files(tmp_path):
    path = tmp_path / "folder"
    for name in ("old.txt", "new.txt"):
        with replaced_folder(path) as temporary:
            (temporary / name).touch()
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_of_a_folder_have_the_permissions_that_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        with replaced_folder(tmp_path / "folder") as temporary:
            (temporary / "plain").touch()
            (temporary / "secret").touch(0o600)
    finally:
        os.umask(before)
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == ["plain", "secret"]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o666 & ~mask] * 2


def test_a_folder_needs_no_name_in_its_path(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    with replaced_folder(Path(".")) as temporary:
        (temporary / "new.txt").touch()
    assert names(tmp_path / "folder") == ["new.txt"]


@pytest.mark.parametrize("error", [OSError, Interrupted])
def test_a_block_that_raises_leaves_the_old_folder(error, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")

    def write() -> None:
        with replaced_folder(path) as temporary:
            (temporary / "new.txt").touch()
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["folder"]
    assert (path / "old.txt").read_text() == "old"


def test_an_old_folder_goes_out_of_sight_at_once(tmp_path, monkeypatch):
    """A kill while it is deleted leaves no half of it under its name."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").touch()

    def die(*args: object, **options: object) -> None:
        assert not path.exists() or names(path) in (["old.txt"], ["new.txt"])
        if path.exists() and names(path) == ["new.txt"]:
            raise Interrupted

    def write() -> None:
        with replaced_folder(path) as temporary:
            (temporary / "new.txt").touch()
            monkeypatch.setattr("shutil.rmtree", die)

    with pytest.raises(Interrupted):
        write()
    assert names(path) == ["new.txt"]


def test_what_a_kill_left_of_a_folder_is_cleared_away(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    for kind in ("tmp", "old"):
        (tmp_path / f".folder.{kind}" / "half").mkdir(parents=True)
    with replaced_folder(path) as temporary:
        assert names(temporary) == []
        (temporary / "new.txt").touch()
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["folder"]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "folder", []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        fsync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(os, "fsync", note)
    with replaced_folder(path) as temporary:
        (temporary / "file.txt").touch()
    hidden = tmp_path / ".folder.tmp"
    assert synced == [
        (str(hidden / "file.txt"), False),
        (str(hidden), False),
        (str(tmp_path), True),
    ]
