"""Constant channels: which channels of a model have the same value whatever its input.

A convolution's output channel whose kernels are all zero is its bias; batch norms, activations and
pooling carry constants on. What reads a zero constant is useless, and what reads another one can be
folded into a bias (`starfire_prune.compact.folding`). The analysis runs over the graph of
`torch.export`, by the rules of `starfire_prune.structure.rules`.
"""

from starfire_prune.structure.analysis import ChannelAnalysis, over_weight
from starfire_prune.structure.channels import ConstantChannels, LayerChannels

__all__ = ["ChannelAnalysis", "ConstantChannels", "LayerChannels", "over_weight"]
