"""Make a pruned network smaller and faster: python examples/prune_compact_time.py.

The network is pruned at once, without training: what counts here is what follows. Compaction needs
pip install 'starfire-prune[compact]', the sparse kernels a C++ compiler.
"""

import copy
import time

import timm
import torch
from torch import nn

from starfire_prune import ck_structured, filter_structured, sparse
from starfire_prune.compact import compact, format_compaction


def milliseconds(model: nn.Module, images: torch.Tensor, calls: int = 10) -> float:
    """The median time of a call."""
    times = []
    with torch.inference_mode():
        for _ in range(calls):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[calls // 2]


torch.manual_seed(0)
torch.set_num_threads(1)
images = torch.rand(1, 3, 64, 64)
dense = timm.create_model("resnet18", num_classes=10).eval()
convolutions = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d)]

# Whole filters leave dead channels, which compaction removes: a smaller dense network
filters = copy.deepcopy(dense)
for name in convolutions:
    if name.endswith("conv1") and name != "conv1":  # the inner convolution of a block
        filter_structured(filters.get_submodule(name), amount=0.5)
small, report = compact(filters, torch.zeros(2, 3, 64, 64))
print(format_compaction(report))

# Single kernels leave hardly any dead channel; the sparse compiler skips them one by one
kernels = copy.deepcopy(dense)
for name in convolutions:
    ck_structured(kernels.get_submodule(name), amount=0.8)
fast = sparse.compile(kernels, images)

print(f"dense                        {milliseconds(dense, images):6.1f} ms")
print(f"filters pruned, compact      {milliseconds(small, images):6.1f} ms")
print(f"kernels pruned, still dense  {milliseconds(kernels, images):6.1f} ms")
print(f"kernels pruned, compiled     {milliseconds(fast, images):6.1f} ms")
