"""Structured sparse training of convolutional networks in PyTorch.

The methods work like those of `torch.nn.utils.prune`, `Pruner` applies them while a model trains,
and `load_recipe` reads a whole training run from YAML. Recipes load pydantic, and only when used.
"""

from typing import TYPE_CHECKING, Any

from starfire_prune.engine import Pruner
from starfire_prune.masks import (
    ck_mask,
    fc_block_mask,
    fc_fine_mask,
    fc_structure_mask,
    filter_mask,
    intra_mask,
    magnitude_mask,
    random_mask,
    window_mask,
)
from starfire_prune.methods import (
    CKStructured,
    FCBlock,
    FCFine,
    FCStructured,
    FilterStructured,
    IntraStructured,
    MagnitudeUnstructured,
    RandomUnstructured,
    WindowStructured,
    ck_structured,
    fc_block,
    fc_fine,
    fc_structured,
    filter_structured,
    intra_structured,
    magnitude_unstructured,
    random_unstructured,
    window_structured,
)
from starfire_prune.plain_state import apply_masks
from starfire_prune.pruned_file import (
    convert_pruned,
    load_masks,
    load_pruned,
    load_pruned_model,
    save_pruned,
)
from starfire_prune.report import format_table, measure_sparsity

if TYPE_CHECKING:
    from starfire_prune.comm_hook import MaskedAllreduceState, masked_allreduce_hook
    from starfire_prune.recipe import Recipe, RecipeError, load_recipe

__all__ = [
    "CKStructured",
    "FCBlock",
    "FCFine",
    "FCStructured",
    "FilterStructured",
    "IntraStructured",
    "MagnitudeUnstructured",
    "MaskedAllreduceState",
    "Pruner",
    "RandomUnstructured",
    "Recipe",
    "RecipeError",
    "WindowStructured",
    "apply_masks",
    "ck_mask",
    "ck_structured",
    "convert_pruned",
    "fc_block",
    "fc_block_mask",
    "fc_fine",
    "fc_fine_mask",
    "fc_structure_mask",
    "fc_structured",
    "filter_mask",
    "filter_structured",
    "format_table",
    "intra_mask",
    "intra_structured",
    "load_masks",
    "load_pruned",
    "load_pruned_model",
    "load_recipe",
    "magnitude_mask",
    "magnitude_unstructured",
    "masked_allreduce_hook",
    "measure_sparsity",
    "random_mask",
    "random_unstructured",
    "save_pruned",
    "window_mask",
    "window_structured",
]

__version__ = "0.1.0"

_RECIPE_NAMES = frozenset({"Recipe", "RecipeError", "load_recipe"})
_HOOK_NAMES = frozenset({"MaskedAllreduceState", "masked_allreduce_hook"})


def __getattr__(name: str) -> Any:
    if name in _RECIPE_NAMES:
        from starfire_prune import recipe

        return getattr(recipe, name)
    if name in _HOOK_NAMES:  # not before: some builds of torch have no distributed package
        from starfire_prune import comm_hook

        return getattr(comm_hook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
