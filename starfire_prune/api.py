"""The names that `import starfire_prune` offers."""

from starfire_prune.engine.comm_hook import MaskedAllreduceState, masked_allreduce_hook
from starfire_prune.engine.pruner import Pruner
from starfire_prune.engine.sparsity import format_table, measure_sparsity
from starfire_prune.masks.baselines import filter_mask, magnitude_mask, random_mask
from starfire_prune.masks.conv import ck_mask, intra_mask, window_mask
from starfire_prune.masks.linear import fc_block_mask, fc_fine_mask, fc_structure_mask
from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.baselines import (
    FilterStructured,
    MagnitudeUnstructured,
    RandomUnstructured,
    filter_structured,
    magnitude_unstructured,
    random_unstructured,
)
from starfire_prune.methods.conv import (
    CKStructured,
    IntraStructured,
    WindowStructured,
    ck_structured,
    intra_structured,
    window_structured,
)
from starfire_prune.methods.given import apply_masks
from starfire_prune.methods.linear import (
    FCBlock,
    FCFine,
    FCStructured,
    fc_block,
    fc_fine,
    fc_structured,
)
from starfire_prune.methods.registry import register_method
from starfire_prune.methods.schedules import register_schedule
from starfire_prune.quantization.checks import check_masks
from starfire_prune.quantization.post_training import quantize
from starfire_prune.quantization.training import QuantizedTraining
from starfire_prune.recipe.load import load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.serialization.program import save_program
from starfire_prune.serialization.pruned import (
    convert_pruned,
    load_masks,
    load_pruned,
    load_pruned_model,
    save_pruned,
)
from starfire_prune.serialization.quantized import load_quantized, save_quantized
from starfire_prune.utils.settings import RecipeError

__all__ = [
    "CKStructured",
    "FCBlock",
    "FCFine",
    "FCStructured",
    "FilterStructured",
    "IntraStructured",
    "MagnitudeUnstructured",
    "MaskMethod",
    "MaskedAllreduceState",
    "Pruner",
    "QuantizedTraining",
    "RandomUnstructured",
    "Recipe",
    "RecipeError",
    "WindowStructured",
    "apply_masks",
    "check_masks",
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
    "load_quantized",
    "load_recipe",
    "magnitude_mask",
    "magnitude_unstructured",
    "masked_allreduce_hook",
    "measure_sparsity",
    "quantize",
    "random_mask",
    "random_unstructured",
    "register_method",
    "register_schedule",
    "save_program",
    "save_pruned",
    "save_quantized",
    "window_mask",
    "window_structured",
]
