"""Constant channels: channels of a model that have the same value for every input.

If all kernels of a convolution's output channel are zero, the channel is its bias everywhere; batch
norms, activations and pooling map constant channels to constant channels. Weights that read a
constant zero are redundant; those that read another constant can be folded into a bias
(`starfire_prune.compact.fold_constants`).
"""

from starfire_prune.structure.analysis import ChannelAnalysis, per_weight
from starfire_prune.structure.channels import ConstantChannels, LayerChannels

__all__ = ["ChannelAnalysis", "ConstantChannels", "LayerChannels", "per_weight"]
