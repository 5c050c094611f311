"""Recipes: a training run written down as strict data.

A recipe is a YAML file read into frozen models. Unknown keys, wrong types, values out of range and
options without effect are refused, all of them in one `RecipeError`.
"""

from starfire_prune.engine.settings import Fc, Override, Pruning, parse_pruning
from starfire_prune.recipe.compare import (
    beyond_pruning,
    dense_epochs,
    differing_keys,
    training_differences,
)
from starfire_prune.recipe.load import dump_recipe, load_recipe, recipe_schema, write_schema
from starfire_prune.recipe.sections import (
    Data,
    Ema,
    LrSchedule,
    Model,
    Optimizer,
    Quantization,
    Recipe,
    Training,
)
from starfire_prune.utils.settings import RecipeError

__all__ = [
    "Data",
    "Ema",
    "Fc",
    "LrSchedule",
    "Model",
    "Optimizer",
    "Override",
    "Pruning",
    "Quantization",
    "Recipe",
    "RecipeError",
    "Training",
    "beyond_pruning",
    "dense_epochs",
    "differing_keys",
    "dump_recipe",
    "load_recipe",
    "parse_pruning",
    "recipe_schema",
    "training_differences",
    "write_schema",
]
