"""Pruning methods in the image of `torch.nn.utils.prune`, and the functions of the same names.

A method is its mask function (`starfire_prune.masks`) and its options, on top of `MaskMethod`: a
`torch.nn.utils.prune.BasePruningMethod`, so that `prune.is_pruned`, `prune.remove` and
`prune.PruningContainer` work on it.
"""

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
from starfire_prune.methods.registry import METHODS

__all__ = [
    "METHODS",
    "CKStructured",
    "FCBlock",
    "FCFine",
    "FCStructured",
    "FilterStructured",
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
    "window_structured",
]
