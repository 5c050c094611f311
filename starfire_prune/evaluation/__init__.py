"""Accuracy of a run or a file, clean and under attack."""

from starfire_prune.evaluation.attacks import Attack, fgsm, pgd
from starfire_prune.evaluation.evaluate import evaluate_weights
from starfire_prune.evaluation.results import (
    Evaluation,
    Result,
    format_evaluation,
    read_evaluation,
    write_evaluation,
)
from starfire_prune.evaluation.spaces import NORMALISED, PIXELS, Space, pixel_space

__all__ = [
    "NORMALISED",
    "PIXELS",
    "Attack",
    "Evaluation",
    "Result",
    "Space",
    "evaluate_weights",
    "fgsm",
    "format_evaluation",
    "pgd",
    "pixel_space",
    "read_evaluation",
    "write_evaluation",
]
