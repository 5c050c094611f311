"""Pruning methods like those of `torch.nn.utils.prune`, and the functions of the same names.

A method is a dataclass whose fields are its options, and which calls its mask function
(`starfire_prune.masks`). It derives from `MaskMethod`, which is a
`torch.nn.utils.prune.BasePruningMethod`, so that `prune.is_pruned`, `prune.remove` and
`prune.PruningContainer` work on it.
"""

# The order of these imports is that of the methods in messages and tables.
# isort: off
from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.conv import (
    CKStructured,
    InterStructured,
    IntraStructured,
    WindowStructured,
    ck_structured,
    intra_structured,
    window_structured,
)
from starfire_prune.methods.linear import (
    FCBlock,
    FCFine,
    FCStructured,
    fc_block,
    fc_fine,
    fc_structured,
)
from starfire_prune.methods.baselines import (
    FilterStructured,
    MagnitudeUnstructured,
    RandomUnstructured,
    filter_structured,
    magnitude_unstructured,
    random_unstructured,
)
from starfire_prune.methods.given import apply_masks
from starfire_prune.methods.registry import METHODS, register_method
from starfire_prune.methods.schedules import SCHEDULES, register_schedule
# isort: on

__all__ = [
    "METHODS",
    "SCHEDULES",
    "CKStructured",
    "FCBlock",
    "FCFine",
    "FCStructured",
    "FilterStructured",
    "InterStructured",
    "IntraStructured",
    "MagnitudeUnstructured",
    "MaskMethod",
    "RandomUnstructured",
    "WindowStructured",
    "apply_masks",
    "ck_structured",
    "fc_block",
    "fc_fine",
    "fc_structured",
    "filter_structured",
    "intra_structured",
    "magnitude_unstructured",
    "random_unstructured",
    "register_method",
    "register_schedule",
    "window_structured",
]
