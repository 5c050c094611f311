"""The engine: the Pruner, the settings of a pruning, and the sparsity that it reaches."""

from starfire_prune.engine.pruner import Pruner
from starfire_prune.engine.settings import Fc, Override, Pruning, parse_pruning
from starfire_prune.engine.sparsity import LayerSparsity, Sparsity, format_table, measure_sparsity
from starfire_prune.engine.state import Phase

__all__ = [
    "Fc",
    "LayerSparsity",
    "Override",
    "Phase",
    "Pruner",
    "Pruning",
    "Sparsity",
    "format_table",
    "measure_sparsity",
    "parse_pruning",
]
