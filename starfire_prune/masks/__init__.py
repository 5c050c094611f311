"""Pure mask functions: a weight tensor in, a bool mask of the same shape out (True = kept).

Each method of the paper is one function here, and so is each baseline. What is pruned at once is a
*unit* (a weight, a kernel, a block, a filter), and the units that compete with each other are a
*scope* (a kernel, an input channel, the layer). All functions share these rules:

- **Count.** A float `amount` is the share of each scope's units that is zero afterwards,
  `floor(amount * units + 0.5)` of them; an int is that many units of each scope. The amount is
  absolute: what `mask` has already pruned counts towards it. `ck_units` and its like give the
  units of a weight by its shape.
- **Ties.** Exactly that many units are pruned. Of equal scores the lower index is pruned first, so
  that every rank and device computes the same mask.
- **Monotone.** What `mask` has pruned remains pruned; an amount below that changes nothing. A unit
  counts as pruned once all its weights are.

Weights may have any memory format and floating dtype; half precision is compared in float32, which
is exact. Scores are magnitudes, so importance scores may be passed in place of the weight.
"""

from starfire_prune.masks.baselines import filter_mask, magnitude_mask, random_mask
from starfire_prune.masks.conv import (
    ck_mask,
    intra_mask,
    intra_shares,
    window_mask,
)
from starfire_prune.masks.counts import (
    Units,
    ck_units,
    count,
    effective_block_size,
    fc_block_units,
    fc_fine_units,
    filter_units,
    weight_units,
    window_units,
)
from starfire_prune.masks.linear import (
    fc_block_mask,
    fc_fine_mask,
    fc_structure_mask,
)

__all__ = [
    "Units",
    "ck_mask",
    "ck_units",
    "count",
    "effective_block_size",
    "fc_block_mask",
    "fc_block_units",
    "fc_fine_mask",
    "fc_fine_units",
    "fc_structure_mask",
    "filter_mask",
    "filter_units",
    "intra_mask",
    "intra_shares",
    "magnitude_mask",
    "random_mask",
    "weight_units",
    "window_mask",
    "window_units",
]
