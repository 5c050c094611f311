"""The pruning methods by the names that recipes use."""

from collections.abc import Mapping
from types import MappingProxyType

from starfire_prune.methods.base import MaskMethod
from starfire_prune.methods.baselines import (
    FilterStructured,
    MagnitudeUnstructured,
    RandomUnstructured,
)
from starfire_prune.methods.conv import CKStructured, IntraStructured, WindowStructured
from starfire_prune.methods.linear import FCBlock, FCFine, FCStructured

__all__ = ["METHODS"]


METHODS: Mapping[str, type[MaskMethod]] = MappingProxyType(
    {
        "window": WindowStructured,
        "ck": CKStructured,
        "intra": IntraStructured,
        "block": FCBlock,
        "fine": FCFine,
        "dead_inputs": FCStructured,
        "magnitude": MagnitudeUnstructured,
        "random": RandomUnstructured,
        "filter": FilterStructured,
    }
)
"""The methods by the names that recipes use."""
