"""Pure mask functions: a weight tensor in, a bool mask of the same shape out (True = kept).

Each method of the paper is one function here, and so is each baseline. They share these rules:

- **Count.** A float `amount` is the share of each locale's units that is zero afterwards,
  `floor(amount * units + 0.5)` of them; an int is that many units of each locale. The amount is
  absolute: what `mask` has already taken counts towards it.
- **Ties.** Exactly that many units go. Of equal scores the lower index goes first, so that every
  rank and device finds the same mask.
- **Monotone.** What `mask` has taken stays taken; an amount below that changes nothing.

Any memory format and floating dtype is taken; half precision is compared in float32, which is
exact. Scores are magnitudes, so importance scores may be passed in place of the weight.
"""

from starfire_prune.masks.baselines import filter_mask, magnitude_mask, random_mask
from starfire_prune.masks.conv import ck_locale_size, ck_mask, intra_mask, intra_shares, window_mask
from starfire_prune.masks.counts import count
from starfire_prune.masks.linear import fc_block_mask, fc_fine_mask, fc_structure_mask

__all__ = [
    "ck_locale_size",
    "ck_mask",
    "count",
    "fc_block_mask",
    "fc_fine_mask",
    "fc_structure_mask",
    "filter_mask",
    "intra_mask",
    "intra_shares",
    "magnitude_mask",
    "random_mask",
    "window_mask",
]
