"""Safetensors files of pruned and of quantized models, compressed and with checksums."""

from starfire_prune.serialization.inspect import inspect_pruned
from starfire_prune.serialization.pruned import (
    convert_pruned,
    load_masks,
    load_pruned,
    load_pruned_model,
    save_pruned,
)
from starfire_prune.serialization.quantized import load_quantized, save_quantized

__all__ = [
    "convert_pruned",
    "inspect_pruned",
    "load_masks",
    "load_pruned",
    "load_pruned_model",
    "load_quantized",
    "save_pruned",
    "save_quantized",
]
