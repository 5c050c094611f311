"""Accuracies under attack, from evaluations made by hand."""

import json
from typing import Any

import pytest

from starfire_prune.evaluation.attacks import Attack
from starfire_prune.evaluation.results import Evaluation
from starfire_prune.reporting.attacks import (
    SPACES,
    accuracy,
    attack_curve,
    attacks_of,
    columns_of,
    results_under,
)

CLEAN = {"attack": "none", "epsilon": 0.0, "top1": 0.75}
PGD = {"attack": "pgd", "steps": 10, "step_size": 0.01, "restarts": 2, "seed": 0}


def evaluation(*results: dict[str, Any]) -> Evaluation:
    shared: dict[str, Any] = {"images": 100, "top5": 0.9, "loss": 1.0}
    content = {
        "weights_sha256": "0",
        "data": {},
        "images": 100,
        "environment": {},
        "results": [{**shared, **result} for result in results],
    }
    return Evaluation.model_validate_json(json.dumps(content))


def fgsm(epsilon: float, top1: float, **settings: Any) -> dict[str, Any]:
    return {"attack": "fgsm", "epsilon": epsilon, "top1": top1, **settings}


def test_a_curve_begins_at_the_clean_images():
    own = evaluation(CLEAN, fgsm(0.1, 0.25), fgsm(0.05, 0.5))
    assert attack_curve(own, Attack("fgsm")) == ((0.0, 0.05, 0.1), (75.0, 50.0, 25.0))


def test_a_curve_without_clean_images_begins_at_the_first_epsilon():
    assert attack_curve(evaluation(fgsm(0.1, 0.25)), Attack("fgsm")) == ((0.1,), (25.0,))


@pytest.mark.parametrize("other", [{"images": 50}, {"precision": "bf16"}])
def test_a_curve_does_not_begin_at_other_images_or_another_precision(other):
    own = evaluation({**CLEAN, **other}, fgsm(0.1, 0.25))
    assert attack_curve(own, Attack("fgsm")) == ((0.1,), (25.0,))


def test_a_curve_begins_at_the_clean_images_that_were_attacked():
    few = {"images": 50}
    own = evaluation({**CLEAN, **few, "top1": 0.5}, CLEAN, fgsm(0.1, 0.25, **few))
    assert attack_curve(own, Attack("fgsm")) == ((0.0, 0.1), (50.0, 25.0))


def test_no_epsilon_in_the_precision_of_the_attack_is_clean():
    clean = {**CLEAN, "precision": "bf16"}
    own = evaluation(clean, fgsm(0.0, 0.7), {**PGD, "epsilon": 0.1, "top1": 0.25})
    (attack,) = (attack for attack in attacks_of([own]) if attack.name == "pgd")
    assert attack_curve(own, attack) == ((0.0, 0.1), (70.0, 25.0))


def test_a_curve_of_different_numbers_of_images_has_no_clean_point():
    own = evaluation(CLEAN, fgsm(0.0, 0.75), fgsm(0.05, 0.5), fgsm(0.1, 0.25, images=50))
    assert attack_curve(own, Attack("fgsm")) == ((0.05, 0.1), (50.0, 25.0))


def test_an_attack_that_was_not_measured_has_no_curve():
    assert attack_curve(evaluation(CLEAN), Attack("fgsm")) == ((), ())
    assert attack_curve(None, Attack("fgsm")) == ((), ())


def test_a_transferred_attack_differs_from_one_on_the_model_itself():
    own = evaluation(fgsm(0.1, 0.25), fgsm(0.1, 0.5, source="dense"))
    assert accuracy(own, Attack("fgsm"), 0.1) == 25.0
    assert accuracy(own, Attack("fgsm", source="dense"), 0.1) == 50.0
    assert [result.top1 for result in results_under(own, Attack("fgsm"))] == [0.25]


def test_of_equal_attacks_that_on_the_most_images_counts():
    own = evaluation(fgsm(0.1, 0.25, images=50), fgsm(0.1, 0.5, images=80))
    assert accuracy(own, Attack("fgsm"), 0.1) == 50.0


def test_attacks_begin_with_none_and_end_with_transferred_ones():
    own = evaluation(fgsm(0.1, 0.5, source="dense"), fgsm(0.1, 0.25), CLEAN)
    assert attacks_of([None, own]) == [
        Attack("none"),
        Attack("fgsm"),
        Attack("fgsm", source="dense"),
    ]


def test_columns_are_of_all_epsilons_that_any_evaluation_holds():
    columns = columns_of([evaluation(fgsm(0.1, 0.25)), evaluation(CLEAN, fgsm(0.05, 0.5))])
    assert [name for name, _, _ in columns] == ["clean [%]", "FGSM, ε 0.05 [%]", "FGSM, ε 0.1 [%]"]


def test_epsilon_is_written_in_255ths_where_it_is_a_whole_number_of_levels():
    levels = columns_of([evaluation(fgsm(2 / 255, 0.5), fgsm(0.05, 0.25))])
    assert [name for name, _, _ in levels] == ["FGSM, ε 2/255 [%]", "FGSM, ε 0.05 [%]"]
    (column,) = columns_of([evaluation(fgsm(2 / 255, 0.5, space="normalised"))])
    assert column[0] == "FGSM, normalised, ε 0.007843 [%]"


def test_an_attack_that_changes_nothing_has_no_column():
    assert columns_of([evaluation(fgsm(0.0, 0.75))]) == []


def test_an_attack_in_another_precision_is_another_one():
    own = evaluation(fgsm(0.1, 0.25), fgsm(0.1, 0.5, precision="bf16"))
    assert accuracy(own, Attack("fgsm"), 0.1) == 25.0
    assert Attack("fgsm", precision="bf16").label == "FGSM, bf16"


def pgd(epsilon: float, top1: float, **settings: Any) -> dict[str, Any]:
    """By default with two restarts and the default step size."""
    return {**PGD, "step_size": 2.5 * epsilon / 10, "epsilon": epsilon, "top1": top1, **settings}


def test_pgd_of_another_step_size_is_another_attack():
    own = evaluation(pgd(8 / 255, 0.5), pgd(8 / 255, 0.25, step_size=1 / 255))
    usual, small = attacks_of([own])
    assert (usual.label, small.label) == (
        "PGD of 10 steps, 2 restarts",
        "PGD of 10 steps of 1/255, 2 restarts",
    )
    assert [accuracy(own, attack, 8 / 255) for attack in (usual, small)] == [50.0, 25.0]


def test_pgd_from_the_images_is_another_attack():
    own = evaluation(pgd(0.1, 0.5, restarts=1), pgd(0.1, 0.25, restarts=1, seed=None))
    random, still = attacks_of([own])
    assert (random.label, still.label) == ("PGD of 10 steps", "PGD of 10 steps from the images")
    assert [accuracy(own, attack, 0.1) for attack in (random, still)] == [50.0, 25.0]


def test_a_step_size_for_all_epsilons_is_one_curve_even_where_it_is_the_default():
    own = evaluation(*(pgd(epsilon, 0.5, step_size=0.025) for epsilon in (0.05, 0.1)))
    (attack,) = (attack for attack in attacks_of([own]) if attack.step_size is not None)
    assert attack_curve(own, attack)[0] == (0.05, 0.1)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_of_several_seeds_the_lowest_counts_in_any_order(seeds):
    own = evaluation(*(pgd(0.1, 0.25 * (1 + seed), seed=seed) for seed in seeds))
    (attack,) = attacks_of([own])
    assert accuracy(own, attack, 0.1) == 25.0


def test_an_attack_is_named_by_all_its_settings():
    own = evaluation(pgd(0.1, 0.1, space="normalised", source="ck"))
    (attack,) = attacks_of([own])
    assert attack.label == "PGD of 10 steps, 2 restarts, normalised, transferred from ck"
    assert SPACES[attack.space] == "normalised pixels"
