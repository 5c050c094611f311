"""Safetensors files of pruned models, compressed and with checksums."""

from starfire_prune.serialization.inspect import inspect_pruned
from starfire_prune.serialization.pruned import (
    convert_pruned,
    load_masks,
    load_pruned,
    load_pruned_model,
    save_pruned,
)

__all__ = [
    "convert_pruned",
    "inspect_pruned",
    "load_masks",
    "load_pruned",
    "load_pruned_model",
    "save_pruned",
]
