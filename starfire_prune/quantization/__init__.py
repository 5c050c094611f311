"""Quantization to int8 that keeps the masks: pruned weights stay exactly zero."""

from starfire_prune.quantization.checks import LayerZeros, check_masks
from starfire_prune.quantization.post_training import quantize
from starfire_prune.quantization.training import QuantizedTraining

__all__ = ["LayerZeros", "QuantizedTraining", "check_masks", "quantize"]
