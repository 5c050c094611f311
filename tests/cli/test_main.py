"""`starfire`, `python -m starfire_prune` and the files in tools/: how a command is chosen."""

import argparse
import os
import runpy
import subprocess
import sys
from typing import Any

import pytest

import starfire_prune
from starfire_prune.cli.main import COMMANDS
from tests.support.commands import MODULE
from tests.support.paths import ROOT

TOOLS = sorted((ROOT / "tools").glob("*.py"))


def test_help_names_every_command(starfire):
    ended = starfire("--help")
    assert (ended.status, ended.stderr) == (0, "")
    assert all(f"\n  {name} " in ended.stdout for name in COMMANDS)


def test_no_command_prints_the_help(starfire):
    ended = starfire()
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr == starfire("--help").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_begins_with_its_summary(name, starfire):
    ended = starfire(name, "--help")
    assert ended.status == 0
    assert ended.stdout.startswith(f"usage: starfire {name} ")
    assert f"\n\n{COMMANDS[name].summary}.\n" in ended.stdout


def test_the_version_is_the_packages(starfire):
    assert starfire("--version").stdout == f"starfire_prune {starfire_prune.__version__}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian", "there is no command 'trian'; did you mean train?"),
        ("xyz", "there is no command 'xyz'; the commands are train, evaluate, export, quantize, "),
        ("--resume", "error: unrecognized arguments: --resume"),
    ],
)
def test_a_wrong_command_is_refused_with_a_suggestion(word, message, starfire):
    ended = starfire(word)
    assert (ended.status, ended.stdout) == (2, "")
    assert f"starfire: {message}" in ended.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["recipes"]])
def test_what_needs_no_torch_does_not_load_it(words):
    """It would take seconds."""
    code = (
        "import sys\nfrom starfire_prune.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'numpy', 'yaml'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_of_a_command_may_begin_with_the_home(name, monkeypatch):
    """Shells leave the ~ of `--output=~/run` to the command."""
    monkeypatch.setenv("HOME", "/home/ada")
    parser = argparse.ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    paths = {"FOLDER", "FILE", "PATH", "RUN", "RUN_OR_MODEL", "RUN_OR_FILE", "RECIPE", "TABLE"}
    types: list[Any] = [
        action.type
        for action in parser._actions
        if (action.metavar or action.dest.upper()) in paths
    ]
    assert types
    assert {str(type("~/x")) for type in types} == {"/home/ada/x"}


def test_the_module_is_the_command():
    done = subprocess.run([*MODULE, "recipes"], capture_output=True, text=True, check=True)
    assert "\n  quickstart " in done.stdout


def test_every_tool_is_a_command():
    assert {path.stem for path in TOOLS} == {*COMMANDS} - {"recipes"}


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_speaks_by_its_own_name(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), os.devnull])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"{path.name}: ")


def test_names_of_the_package_are_those_of_its_api():
    from starfire_prune import api

    assert {*api.__all__} <= {*dir(starfire_prune)}
    assert starfire_prune.Pruner is api.Pruner
    with pytest.raises(AttributeError, match="has no attribute 'Prunner'"):
        starfire_prune.Prunner  # type: ignore[attr-defined]  # noqa: B018


def test_packages_are_attributes_without_an_import_of_all_others():
    code = "import sys, starfire_prune as s; s.masks.ck_mask; assert s.utils and 'yaml' not in sys"
    code += ".modules"
    subprocess.run([sys.executable, "-c", code], check=True)
