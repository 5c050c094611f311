"""Smaller dense models: the channels that nothing needs are removed."""

from starfire_prune.compact.compaction import (
    CompactLayer,
    CompactReport,
    compact,
    format_compaction,
)
from starfire_prune.compact.files import load_compact, save_compact
from starfire_prune.compact.folding import fold_constants

__all__ = [
    "CompactLayer",
    "CompactReport",
    "compact",
    "fold_constants",
    "format_compaction",
    "load_compact",
    "save_compact",
]
