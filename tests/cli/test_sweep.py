"""`starfire sweep`: which runs of a table it trains, lists and reads, and how it ends."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from starfire_prune.cli import run_sweep as sweeping
from starfire_prune.experiments.tables import load_table
from starfire_prune.recipe.load import dump_recipe
from tests.support.commands import MODULE, Ended, Tool
from tests.support.paths import ROOT
from tests.support.processes import output_of, same_exports, start, wait_for_line
from tests.support.runs import RECIPE, files_of, metrics_of

COMMAND = "sweep"
TABLES = ROOT / "recipes" / "tables"

# Three runs of two recipes: `twin` is the recipe of `ck`
TABLE = """\
title: Small runs
base: small.yaml
columns: [{name: top1}]
runs:
- {name: dense, set: {pruning: none}, paper: {top1: 76.5}}
- {name: ck, paper: {top1: 75.0}}
- {name: twin}
- {name: ck-70, set: {pruning.amount: 0.7}}
"""
FOLDERS = ["dense-seed0", "ck-seed0", "ck-70-seed0"]
# A launcher of no cost: it notes its arguments, and leaves in the run's folder what is prepared
LAUNCHER = """\
here=${0%/*}
printf '%s\\n' "$@" '' >>"$here/launched"
for folder; do :; done
name=${folder##*/}
if [ -f "$here/endings/$name" ]; then
    read -r ending <"$here/endings/$name"
    case $ending in
        SIGTERM) kill -TERM $$;;
        hangs) sh -c 'echo $$ >"$0"; echo hangs; exec sleep 600' "$here/pid";;
        leaves) sleep 600 & echo $! >"$here/pid"; exit 1;;
        stays) trap '' TERM; echo $$ >"$here/pid"; while :; do sleep 1; done;;
        *) exit "$ending";;
    esac
fi
mkdir -p "$folder" && cp -R "$here/left/$name/." "$folder"
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The table beside its recipe, and beside the launcher with what it leaves."""
    (tmp_path / "small.yaml").write_text(RECIPE.replace("seed: 3", "seed: 0"), encoding="utf-8")
    path = tmp_path / "table.yaml"
    path.write_text(TABLE, encoding="utf-8")
    (tmp_path / "launcher.sh").write_text(LAUNCHER, encoding="utf-8")
    (tmp_path / "endings").mkdir()
    prepare(path)
    return path


@pytest.fixture
def swept(table: Path, tool: Tool) -> Callable[..., Ended]:
    """Sweeps the table with the launcher of no cost."""
    launcher = shlex.join(["sh", str(table.parent / "launcher.sh")])

    def sweep(*arguments: object) -> Ended:
        output = ("--output", table.parent / "runs")
        return tool(table, "--launcher", launcher, *output, *arguments)

    return sweep


def prepare(table: Path, *overrides: str) -> None:
    """Prepare what training leaves in the folders of a table's runs, for the launcher."""
    for run in load_table(table, overrides).runs:
        folder = table.parent / "left" / run.folder
        (folder / "export").mkdir(parents=True, exist_ok=True)
        (folder / "export" / "model.safetensors").touch()
        (folder / "recipe.yaml").write_text(dump_recipe(run.recipe), encoding="utf-8")
        phases = ("dense", "era", "era", "fixed")
        rows = [
            {"epoch": epoch, "top1": 0.7 + 0.01 * epoch, "phase": phase, "sparsity_network": 0.5}
            for epoch, phase in enumerate(phases)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def launched(table: Path) -> list[list[str]]:
    """The arguments that the launcher was started with, by the order of the runs."""
    log = table.parent / "launched"
    texts = log.read_text().split("\n\n")[:-1] if log.exists() else []
    return [text.split("\n") for text in texts]


def folders(table: Path) -> list[str]:
    """The folders of the runs that were launched."""
    return [Path(arguments[-1]).name for arguments in launched(table)]


def refusal(ended: Ended) -> str:
    """The one sentence of a refusal."""
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    return ended.stderr.removeprefix("starfire sweep: ").rstrip("\n")


# Sweeping


def test_runs_are_trained_one_after_another_and_one_recipe_once(swept, table):
    ended = swept()
    assert (ended.status, ended.stderr) == (0, "")
    assert folders(table) == FOLDERS
    headings = [line for line in ended.stdout.splitlines() if line.startswith("run ")][:3]
    assert headings == [
        f"run {number} of 3: {folder}" for number, folder in enumerate(FOLDERS, start=1)
    ]


def test_a_run_is_launched_with_its_recipe_its_settings_and_its_folder(swept, table):
    swept()
    option, module, command, recipe, *rest = launched(table)[0]
    assert (option, module, command) == ("-m", "starfire_prune", "train")
    assert Path(recipe) == table.parent / "small.yaml"
    assert rest == ["--set", "pruning=none", "--output", f"{table.parent}/runs/dense-seed0"]


def test_a_run_that_forks_is_launched_with_the_run_it_forks(swept, table):
    text = table.read_text().replace("base: small.yaml\n", "base: small.yaml\nfork: dense\n")
    keep = "pruning: none, training.keep_checkpoints: [1]"
    table.write_text(text.replace("pruning: none", keep))
    commands = swept("--print-commands").stdout.splitlines()
    output = table.parent / "runs"
    assert "--fork" not in commands[0]
    assert all(f" --fork {output / FOLDERS[0]} " in command for command in commands[1:])


def test_the_command_of_each_run_is_printed(swept, table):
    printed = swept().stdout
    for arguments in launched(table):
        assert shlex.join(arguments) + "\n" in printed


def test_a_sweep_ends_with_the_results(swept):
    assert swept().stdout.split("\n\n", 3)[3].splitlines() == [
        "Small runs",
        "",
        "run    epochs  sparsity asked [%]  reached [%]  top1 [%]  paper  difference",
        "-----  ------  ------------------  -----------  --------  -----  ----------",
        "dense     4/4                 0.0         50.0     73.00  76.50       -3.50",
        "ck        4/4                60.0         50.0     73.00  75.00       -2.00",
        "twin      4/4                60.0         50.0     73.00      -           -",
        "ck-70     4/4                70.0         50.0     73.00      -           -",
    ]


def test_runs_that_are_finished_are_skipped(swept, table):
    swept("--only", "ck")
    ended = swept()
    assert folders(table) == ["ck-seed0", "dense-seed0", "ck-70-seed0"]
    assert "\nrun 2 of 3: ck-seed0\nis finished\n\nrun 3 of 3" in ended.stdout


def test_a_run_that_was_broken_off_is_launched_again(swept, table):
    swept()
    (table.parent / "runs" / "ck-seed0" / "export" / "model.safetensors").unlink()
    assert swept().status == 0
    assert folders(table) == [*FOLDERS, "ck-seed0"]


def test_overrides_reach_every_run(swept, table):
    prepare(table, "optimizer.lr=0.1")
    assert swept("--set", "optimizer.lr=0.1", "--set=pruning.resolution=0.01").status == 0
    assert [arguments[4:-2] for arguments in launched(table)] == [
        ["--set", "pruning=none", "--set", "optimizer.lr=0.1"],
        ["--set", "optimizer.lr=0.1", "--set", "pruning.resolution=0.01"],
        [
            *("--set", "pruning.amount=0.7", "--set", "optimizer.lr=0.1"),
            *("--set", "pruning.resolution=0.01"),
        ],
    ]


def test_without_output_the_folder_is_named_after_the_table(tool, table, monkeypatch):
    monkeypatch.chdir(table.parent)
    assert "  runs/tables/table/dense-seed0  0 of 4 epochs\n" in tool(table, "--list").stdout


def test_a_table_of_anothers_runs_has_the_folder_of_that_one(tool, table):
    other = table.with_name("other.yaml")
    other.write_text(
        "title: T\nruns_of: table.yaml\ncolumns: [{name: top5, metric: top5}]\nruns: [{name: ck}]\n"
    )
    assert tool(other, "--list").stdout == "0  ck  runs/tables/table/ck-seed0  0 of 4 epochs\n"


# Failures


@pytest.mark.parametrize(("ending", "reason"), [("3", "status 3"), ("SIGTERM", "ended by SIGTERM")])
def test_a_run_that_fails_does_not_keep_the_others_from_training(ending, reason, swept, table):
    (table.parent / "endings" / "dense-seed0").write_text(f"{ending}\n")
    ended = swept()
    assert (ended.status, ended.stderr) == (
        1,
        f"starfire sweep: 1 of 3 runs failed: dense-seed0 ({reason})\n",
    )
    assert folders(table) == FOLDERS
    assert "\ndense     0/4 " in ended.stdout


def test_all_runs_that_fail_are_named(swept, table):
    for folder, ending in (("dense-seed0", "1"), ("ck-70-seed0", "2")):
        (table.parent / "endings" / folder).write_text(f"{ending}\n")
    assert swept().stderr == (
        "starfire sweep: 2 of 3 runs failed: dense-seed0 (status 1); ck-70-seed0 (status 2)\n"
    )


def test_a_folder_of_another_recipe_fails_without_being_launched(swept, table):
    prepare(table, "optimizer.lr=0.1")
    swept("--set", "optimizer.lr=0.1", "--only", "ck")
    prepare(table)
    ended = swept()
    assert ended.status == 1
    assert ended.stderr == (
        f"starfire sweep: 1 of 3 runs failed: ck-seed0 ({table.parent}/runs/ck-seed0 holds the run "
        f"of another recipe (optimizer.lr: 0.1 there, 0.05 here))\n"
    )
    assert folders(table) == ["ck-seed0", "dense-seed0", "ck-70-seed0"]


# Choosing


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["ck*"], ["ck-seed0", "ck-70-seed0"]),
        (["ck-70-seed?"], ["ck-70-seed0"]),
        (["twin"], ["ck-seed0"]),
        (["ck-70", "dense"], ["dense-seed0", "ck-70-seed0"]),
    ],
    ids=lambda patterns: " ".join(patterns),
)
def test_only_runs_that_fit_a_pattern_are_trained(patterns, chosen, swept, table):
    options = [word for pattern in patterns for word in ("--only", pattern)]
    assert swept(*options).status == 0
    assert folders(table) == chosen


@pytest.mark.parametrize(("index", "folder"), [*enumerate(FOLDERS)])
def test_an_index_chooses_a_recipe(index, folder, swept, table):
    assert swept("--index", index).status == 0
    assert folders(table) == [folder]


def test_an_index_counts_within_those_that_fit(swept, table):
    assert swept("--only", "ck*", "--index", 1).status == 0
    assert folders(table) == ["ck-70-seed0"]


def test_an_index_shows_all_runs_of_its_recipe(swept):
    rows = swept("--index", 1).stdout.splitlines()[-2:]
    assert [row.split()[:2] for row in rows] == [["ck", "4/4"], ["twin", "4/4"]]


# What is only shown


@pytest.mark.parametrize("option", ["--list", "--print-commands", "--results"])
def test_what_only_shows_trains_nothing_and_makes_no_folder(option, swept, table):
    assert swept(option).status == 0
    assert folders(table) == []
    assert not (table.parent / "runs").exists()


def test_the_list_tells_how_far_each_recipe_is(swept, table):
    output = table.parent / "runs"
    swept("--only", "dense")
    swept("--only", "ck")
    metrics = output / "ck-seed0" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    (output / "ck-seed0" / "export" / "model.safetensors").unlink()
    assert swept("--list").stdout.splitlines() == [
        f"0  dense  {output}/dense-seed0  finished",
        f"1  ck, twin  {output}/ck-seed0  2 of 4 epochs",
        f"2  ck-70  {output}/ck-70-seed0  0 of 4 epochs",
    ]


def test_the_results_are_those_so_far(swept):
    swept("--only", "ck")
    lines = swept("--results").stdout.splitlines()
    assert [line.split()[:2] for line in lines[4:]] == [
        ["dense", "0/4"],
        ["ck", "4/4"],
        ["twin", "4/4"],
        ["ck-70", "0/4"],
    ]


def test_commands_are_those_that_a_sweep_launches(swept, table):
    printed = [shlex.split(line) for line in swept("--print-commands").stdout.splitlines()]
    swept()
    assert [words[2:] for words in printed] == launched(table)


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_commands_of_a_shipped_table_are_those_of_its_runs(path, tool, monkeypatch):
    monkeypatch.setenv("CIFAR10", "/data/cifar-10")
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    monkeypatch.setenv("TINY_IMAGENET", "/data/tiny-imagenet-200")
    monkeypatch.setenv("TINY_IMAGENET20", "/data/tiny-imagenet-20")
    runs = {run.folder: run for run in reversed(load_table(path).runs)}
    printed = tool(path, "--print-commands").stdout.splitlines()
    assert len(printed) == len(runs)
    for line in printed:
        *launcher, recipe = shlex.split(line)[:7]
        *settings, _, folder = shlex.split(line)[7:]
        run = runs[Path(folder).name]
        if run.fork:
            *settings, option, fork = settings
            assert (option, Path(fork).name) == ("--fork", run.fork)
        assert shlex.join(launcher) == "accelerate launch --quiet -m starfire_prune train"
        assert Path(recipe) == run.recipe_path
        assert settings == [word for value in run.overrides for word in ("--set", value)]


# Refusals


def test_a_missing_table_is_refused_with_those_that_are_there(tool, table):
    missing = table.with_name("tabel.yaml")
    sentence = refusal(tool(missing))
    assert sentence == f"{missing}: no such file; in that folder: table.yaml, small.yaml"


def test_a_broken_table_is_refused_with_its_line(tool, table):
    table.write_text("title: [\n")
    sentence = refusal(tool(table))
    assert sentence.startswith(f"{table}: line 2, column 1: not valid YAML: ")


def test_a_wrong_setting_is_refused_with_the_nearest_name(swept):
    sentence = refusal(swept("--set=epohcs=3"))
    assert sentence == "--set: epohcs: unknown key (got 3); did you mean epochs?"


def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest_names(swept, table):
    assert refusal(swept("--only", "ck", "--only", "ck-7")) == (
        "--only ck-7 fits no run of table; nearest: ck-70, ck"
    )
    assert folders(table) == []


def test_a_pattern_like_no_name_is_refused_with_the_first_names(swept):
    assert refusal(swept("--only", "*9")) == (
        "--only *9 fits no run of table; nearest: dense, ck, twin, ck-70"
    )


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_refused_with_the_range(index, swept):
    assert refusal(swept("--index", index)) == (
        f"--index {index} is out of range: there are 3 runs, 0 to 2"
    )


@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        ("no-such-launcher --gpus 8", "there is no command no-such-launcher; install it, or give"),
        ("", "is empty; such as --launcher 'accelerate launch'"),
        ("torchrun 'x", '"torchrun \'x" is not a command: No closing quotation'),
    ],
)
def test_a_launcher_that_cannot_start_is_refused(launcher, fault, tool, table):
    sentence = refusal(tool(table, "--launcher", launcher))
    assert sentence.startswith("--launcher")
    assert fault in sentence


def test_commands_may_be_printed_for_a_launcher_of_another_machine(tool, table):
    ended = tool(table, "--launcher", "srun torchrun", "--print-commands")
    assert ended.stdout.startswith("srun torchrun ")


def test_a_refused_option_is_told_by_the_parser(tool, table):
    ended = tool(table, "--list", "--results")
    assert ended.status == 2
    assert ended.stderr.endswith("--results: not allowed with argument --list\n")


@pytest.mark.parametrize("below", ["", "runs"])
def test_an_output_that_cannot_be_written_to_is_refused_before_any_run(below, swept, table):
    file = table.parent / "small.yaml"
    assert refusal(swept("--output", file / below)) == (
        f"{file} is a file, not a folder for the run: choose another --output"
    )
    assert launched(table) == []


# With processes of their own


def test_a_command_that_is_refused_prints_no_traceback(table):
    done = subprocess.run(
        [*MODULE, COMMAND, table, "--only", "none"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "starfire sweep: --only none fits no run of table; nearest: dense, ck, twin, ck-70\n"
    )


def hang(table: Path, ending: str) -> None:
    (table.parent / "endings" / "dense-seed0").write_text(f"{ending}\n")


def is_running(table: Path) -> bool:
    """Whether a process is there, 10 s later, whose number a launcher has left; it is killed."""
    number = int((table.parent / "pid").read_text())
    for _ in range(100):  # one that was killed is there until its new parent has reaped it
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.kill(number, signal.SIGKILL)
    return True


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_sweep_and_what_its_launcher_has_started(number, table):
    hang(table, "hangs")
    launcher = shlex.join(["sh", str(table.parent / "launcher.sh")])
    options = ("--launcher", launcher, "--output", table.parent / "runs")
    sweep = start(*MODULE, COMMAND, table, *options)
    wait_for_line(sweep, "hangs")
    os.kill(sweep.pid, number)  # and not its group, as a terminal would
    try:
        assert sweep.wait(timeout=60) == 128 + number
    finally:
        assert not is_running(table)
    assert sweep.communicate()[0] == (
        f"starfire sweep: interrupted by {number.name}; the same command goes on where this one "
        f"stopped\n"
    )


def test_a_launcher_that_fails_leaves_nothing_behind(swept, table):
    hang(table, "leaves")
    assert swept().stderr == "starfire sweep: 1 of 3 runs failed: dense-seed0 (status 1)\n"
    assert not is_running(table)


def test_a_run_that_does_not_end_when_asked_to_is_killed(table, monkeypatch):
    class OnceItHangs(list[int]):
        def __bool__(self) -> bool:
            return bool((table.parent / "pid").exists())

    hang(table, "stays")
    monkeypatch.setattr(sweeping, "PATIENCE_S", 0.2)
    command = ["sh", str(table.parent / "launcher.sh"), "dense-seed0"]
    assert sweeping._status_of(command, OnceItHangs([signal.SIGTERM])) == -signal.SIGKILL
    assert not is_running(table)


@pytest.mark.parametrize(
    "option",
    [
        "--list",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("--print-commands", "--results")),
    ],
)
def test_what_is_shown_ends_quietly_where_nobody_reads_it(option, table):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*MODULE, COMMAND, table, option],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_run_that_was_broken_off(table):
    """With real runs: a finished one is skipped, a broken one ends with the unbroken one's bits."""
    runs = table.parent / "runs"

    def sweep(output: Path, *options: str) -> subprocess.Popen[str]:
        settings = ("--set", "data.batch_size=200", "--launcher", sys.executable)
        return start(*MODULE, COMMAND, table, "--output", output, *settings, *options)

    broken = sweep(runs, "--only", "dense", "--only", "ck")
    wait_for_line(broken, "run 2 of 2: ck-seed0")
    wait_for_line(broken, "epoch 2/4 ")
    broken.terminate()
    assert "interrupted by SIGTERM" in output_of(broken, 128 + signal.SIGTERM)
    printed = output_of(sweep(runs))
    assert "run 1 of 3: dense-seed0\nis finished\n" in printed
    assert re.search(rf"\nresumed {runs}/ck-seed0 after [12] of 4 epochs\n", printed)
    assert "\nrun 3 of 3: ck-70-seed0\n" in printed
    finished = files_of(runs)
    assert output_of(sweep(runs)).count("\nis finished\n") == 3
    assert files_of(runs) == finished
    output_of(sweep(table.parent / "whole", "--only", "ck"))
    assert same_exports(runs / "ck-seed0", table.parent / "whole" / "ck-seed0")


@pytest.mark.slow
def test_a_run_that_is_refused_prints_its_sentence_and_no_traceback(table):
    options = ("--set", "model.options.nonsense=1", "--only", "dense")
    command = (*MODULE, COMMAND, table, "--output", table.parent / "runs", *options)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # holds accelerate
    printed = output_of(start(*command, PATH=path), 1)
    assert "\nstarfire train: resnet18 can't be built with the options " in printed
    assert "argument 'nonsense'\n" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_accelerate_launches_the_runs_of_a_table(table):
    launcher = f"{sys.executable} -m accelerate.commands.launch --cpu --num_processes=1"
    options = ("--launcher", launcher, "--set", "data.batch_size=200", "--only", "ck-70")
    printed = output_of(start(*MODULE, COMMAND, table, "--output", table.parent / "runs", *options))
    assert metrics_of(table.parent / "runs" / "ck-70-seed0")[-1]["sparsity"] > 0.65
    assert "\nck-70     4/4 " in printed
