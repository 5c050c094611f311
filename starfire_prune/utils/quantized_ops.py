"""torch's operations `quantized_decomposed`, of which the graphs of quantized models consist.

torch registers them when one of its modules is imported, not with `import torch`. Importing this
file does that, so that quantized models run without torchao. Should a later torch no longer have
the module, the operations are those of torchao, which registers the same names.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = [
    "DEQUANTIZE",
    "DEQUANTIZE_CHANNELS",
    "QUANTIZE",
    "QUANTIZE_CHANNELS",
]


_MODULES = (
    "torch.ao.quantization.fx._decomposed",
    "torchao.quantization.pt2e.quantize_pt2e",
)


def _operations() -> Any:
    """The namespace with the operations, registered by the first module that has them."""
    for module in _MODULES:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        if hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
            return torch.ops.quantized_decomposed
    raise ModuleNotFoundError(
        "this version of torch has no operations of quantization: pip install "
        "'starfire-prune[quantize]'",
        name="torchao",
    )


_OPERATIONS = _operations()
QUANTIZE = _OPERATIONS.quantize_per_tensor.default
"""`(float32, scale, zero_point, quant_min, quant_max, dtype)` to integers."""
DEQUANTIZE = _OPERATIONS.dequantize_per_tensor.default
"""`(integers, scale, zero_point, quant_min, quant_max, dtype)` to float32."""
QUANTIZE_CHANNELS = _OPERATIONS.quantize_per_channel.default
"""`(float32, scales, zero_points, axis, quant_min, quant_max, dtype)` to integers."""
DEQUANTIZE_CHANNELS = _OPERATIONS.dequantize_per_channel.default
"""`(integers, scales, zero_points, axis, quant_min, quant_max, dtype)` to float32."""
