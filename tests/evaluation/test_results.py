"""evaluation.json: its contents, and how evaluations are merged."""

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starfire_prune.evaluation.attacks import Attack
from starfire_prune.evaluation.results import (
    Evaluation,
    Result,
    evaluation_file,
    file_sha256,
    merged,
    read_evaluation,
    write_evaluation,
)
from starfire_prune.utils.errors import EvaluationError

CLEAN = Result(attack=Attack("none"), images=24, top1=0.75, top5=1.0, loss=0.5)
FGSM = Result(attack=Attack("fgsm", 0.1), images=24, top1=0.5, top5=0.875, loss=1.5)
PGD = Result(
    attack=Attack("pgd", 0.1, steps=10, step_size=0.02, restarts=2, seed=7),
    images=24,
    top1=0.25,
    top5=0.875,
    loss=1.5,
)

TEXT = """\
{
 "format_version": 1,
 "weights_sha256": "ab",
 "source_sha256": {},
 "data": {
  "name": "digits",
  "root": null
 },
 "images": 24,
 "environment": {
  "torch": "2.14.0"
 },
 "results": [
  {
   "attack": "pgd",
   "epsilon": 0.1,
   "space": "pixel",
   "steps": 10,
   "step_size": 0.02,
   "restarts": 2,
   "seed": 7,
   "source": null,
   "precision": "fp32",
   "images": 24,
   "top1": 0.25,
   "top5": 0.875,
   "loss": 1.5
  }
 ]
}
"""


def evaluation(*results: Result, **changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "weights_sha256": "ab",
        "data": {"name": "digits", "root": None},
        "images": 24,
        "environment": {"torch": "2.14.0"},
        "results": results,
    }
    return Evaluation(**{**fields, **changes})


def changed(result: Result, **changes: Any) -> Result:
    """A result with another attack or another number of images."""
    own = {key: value for key, value in changes.items() if key in Result.model_fields}
    settings = {key: value for key, value in changes.items() if key not in own}
    attack = dataclasses.replace(result.attack, **settings)
    return result.model_copy(update={"attack": attack, **own})


# The file


def test_the_file_is_written_as_documented(tmp_path):
    write_evaluation(tmp_path, evaluation(PGD))
    assert evaluation_file(tmp_path).read_text(encoding="utf-8") == TEXT


def test_what_was_written_is_read_back(tmp_path):
    written = write_evaluation(tmp_path, evaluation(CLEAN, FGSM, PGD))
    assert read_evaluation(tmp_path) == written == evaluation(CLEAN, FGSM, PGD)


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    write_evaluation(tmp_path, evaluation(changed(CLEAN, loss=None)))
    assert json.loads(evaluation_file(tmp_path).read_text())["results"][0]["loss"] is None


def test_a_folder_without_the_file_has_no_evaluation(tmp_path):
    assert read_evaluation(tmp_path) is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (TEXT, TEXT[:200], "Invalid JSON: EOF"),
        ('"format_version": 1', '"format_version": 2', "format_version: Input should be 1"),
        ('"top1": 0.25', '"top1": 25', r"results\.0\.top1: Input should be less than or equal"),
        ('"attack": "pgd"', '"attack": "cw"', r"results\.0\.attack\.name: Input should be 'none'"),
        ('"seed": 7,', '"seed": 7, "eps": 1,', r"results\.0\.eps: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_is_not_an_evaluation_raises(tmp_path, old, new, reason):
    evaluation_file(tmp_path).write_text(TEXT.replace(old, new), encoding="utf-8")
    match = rf"{tmp_path}/evaluation\.json can't be read: {reason}.*; delete it, and evaluate again"
    with pytest.raises(EvaluationError, match=match):
        read_evaluation(tmp_path)


def test_a_file_that_is_not_an_evaluation_is_not_overwritten(tmp_path):
    evaluation_file(tmp_path).write_text("mine", encoding="utf-8")
    with pytest.raises(EvaluationError, match="can't be read"):
        write_evaluation(tmp_path, evaluation(CLEAN))
    assert evaluation_file(tmp_path).read_text() == "mine"


def test_a_file_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(EvaluationError, match=r"run/evaluation\.json can't be written: "):
        write_evaluation(tmp_path / "run", evaluation(CLEAN))


def test_the_sum_of_a_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(3_000_000))
    assert file_sha256(path) == hashlib.sha256(bytes(3_000_000)).hexdigest()


# Merging


def test_results_of_other_settings_are_kept(tmp_path):
    write_evaluation(tmp_path, evaluation(PGD))
    write_evaluation(tmp_path, evaluation(FGSM))
    assert write_evaluation(tmp_path, evaluation(CLEAN)).results == (CLEAN, FGSM, PGD)


def test_a_result_of_the_same_settings_is_replaced():
    again = changed(FGSM, top1=0.4)
    whole = merged(evaluation(CLEAN, FGSM), evaluation(again))
    assert whole.results == (CLEAN, again)


@pytest.mark.parametrize(
    "changes",
    [
        *({"epsilon": 0.2}, {"space": "normalised"}, {"steps": 20}, {"step_size": 0.01}),
        *({"restarts": 1}, {"seed": 8}, {"source": "dense"}, {"precision": "bf16"}),
        {"images": 12},
    ],
)
def test_results_that_differ_in_a_setting_are_all_kept(changes):
    other = changed(PGD, **changes)
    assert set(merged(evaluation(PGD), evaluation(other)).results) == {PGD, other}


@pytest.mark.parametrize(
    "changes",
    [{"weights_sha256": "cd"}, {"images": 25}, {"data": {"name": "digits", "image_size": 32}}],
)
def test_results_of_other_weights_or_images_are_dropped(changes):
    new = evaluation(CLEAN, **changes)
    assert merged(evaluation(FGSM, PGD), new) == new


def test_the_same_data_may_lie_elsewhere():
    new = evaluation(CLEAN, data={"name": "digits", "root": "/elsewhere"})
    assert merged(evaluation(FGSM), new).results == (CLEAN, FGSM)


def test_the_environment_is_the_last_one():
    new = evaluation(CLEAN, environment={"torch": "3.0.0"})
    assert merged(evaluation(FGSM), new).environment == {"torch": "3.0.0"}


def test_results_from_a_source_of_other_weights_are_dropped():
    transferred = [changed(FGSM, source="dense"), changed(FGSM, source="ck")]
    old = evaluation(*transferred, FGSM, source_sha256={"dense": "12", "ck": "34"})
    new = evaluation(changed(PGD, source="dense"), source_sha256={"dense": "56"})
    whole = merged(old, new)
    assert set(whole.results) == {FGSM, transferred[1], *new.results}
    assert whole.source_sha256 == {"dense": "56", "ck": "34"}


@given(st.permutations([CLEAN, changed(CLEAN, precision="bf16"), FGSM, changed(FGSM, epsilon=0.2)]))
def test_the_order_of_results_does_not_depend_on_the_order_of_evaluations(results):
    whole = None
    for result in results:
        whole = merged(whole, evaluation(result))
    assert whole is not None
    found = [result.attack for result in whole.results]
    assert [(own.name, own.epsilon, own.precision) for own in found] == [
        ("none", 0.0, "bf16"),
        ("none", 0.0, "fp32"),
        ("fgsm", 0.1, "fp32"),
        ("fgsm", 0.2, "fp32"),
    ]
