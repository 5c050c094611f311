"""benchmarks/size.py: what its command line refuses before it measures for minutes."""

import importlib
from types import ModuleType

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("size")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "-1"], "--repeats: '-1' is no whole number from 0 on"),
        (["--repeats", "x"], "--repeats: 'x' is no whole number from 0 on"),
        (["--sparsities", "0.6", "1.5"], "--sparsities: '1.5' is no sparsity: give one between"),
        (["--sparsities", "nan"], "--sparsities: 'nan' is no sparsity: give one between 0 and 1"),
        (["--json", ""], "--json: '' is no file: name one to write"),
        (["--json", "{tmp_path}"], "--json: '{tmp_path}' is no file: name one to write"),
        (["--json", "{tmp_path}/file/x"], "'{tmp_path}/file/x' can't be written: {tmp_path}/file "),
    ],
)
def test_arguments_that_can_not_be_are_refused(arguments, message, size, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^2$"):
        size._parser().parse_args([text.format(tmp_path=tmp_path) for text in arguments])
    assert message.format(tmp_path=tmp_path) in capsys.readouterr().err


def test_a_file_in_a_new_folder_is_accepted(size, tmp_path):
    path = tmp_path / "new" / "size.json"
    arguments = ["--repeats", "0", "--sparsities", "0.5", "--json", str(path)]
    parsed = size._parser().parse_args(arguments)
    assert (parsed.repeats, parsed.sparsities, parsed.json) == (0, [0.5], path)
