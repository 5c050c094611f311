"""Quantization to int8 that keeps the masks: pruned weights stay exactly zero."""

from starfire_prune.quantization.checks import LayerZeros, check_masks
from starfire_prune.quantization.post_training import quantize

__all__ = ["LayerZeros", "check_masks", "quantize"]
