"""The graph of a float model that is quantized, as `torch.export` sees it."""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from torch import Tensor, fx, nn

from starfire_prune.structure.exporting import exportable_part, quiet_export
from starfire_prune.structure.graph import without_autocast
from starfire_prune.utils.errors import TraceError
from starfire_prune.utils.text import first_line

__all__ = ["exported_module"]


def exported_module(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The graph of a model for batches of any size, in the mode in which the model is.

    Args:
        model: A dense model. The graph shares its parameters and buffers.
        images: A batch, whose first image is the example.

    Raises:
        TraceError: If `torch.export` can't trace the model for batches of any size.
    """
    # Of two images: torch.export takes sizes of 0 and 1 as fixed
    example = images[:1].repeat(2, *[1] * (images.dim() - 1))
    shapes: Any = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with quiet_export(), without_autocast(), torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the model's code and torch.export raise errors of every kind
        part = exportable_part(model, (example,), any_batch=True)
        raise TraceError(
            f"torch.export can't trace {type(model).__name__} for batches of any size: "
            f"{textwrap.shorten(first_line(error), 200)}{part}"
        ) from error
    module: Any = program.module()
    for node in module.graph.find_nodes(op="call_module"):
        if node.target == "_guards_fn":  # it checks inputs, and knows no other batch sizes
            module.graph.erase_node(node)
    module.recompile()
    return module  # type: ignore[no-any-return]
