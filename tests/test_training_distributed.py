"""Training runs of several processes."""

import json
from pathlib import Path

import pytest

from tests.processes import launch_two, output_of, same_exports, wait_for_line
from tests.runs import metrics_of, write_recipe


@pytest.mark.slow
def test_two_processes_train_and_resume_as_one_run(tmp_path):
    arguments: list[str | Path] = [write_recipe(tmp_path), "--set=data.batch_size=200"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for process in launch_two(*arguments, "--output", whole):
        output_of(process)
    processes = launch_two(*arguments, "--output", broken)
    wait_for_line(processes[0], "epoch 2/4 ")
    for process in processes:
        process.kill()
        process.communicate()
    for process in launch_two(*arguments, "--output", broken, "--resume"):
        output_of(process)
    assert json.loads((whole / "environment.json").read_text())["processes"] == 2
    images = [row["top1"] * 360 for row in metrics_of(whole)]  # each is evaluated once
    assert images == pytest.approx([round(count) for count in images], abs=1e-6)
    assert metrics_of(broken) == metrics_of(whole)
    assert same_exports(broken, whole)
