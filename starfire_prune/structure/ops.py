"""The aten operators of exported graphs, grouped by how constant channels pass through them."""

import operator

import torch

__all__ = [
    "BATCH_NORMS",
    "BINARY",
    "CENTERING_NORMS",
    "CONVOLUTIONS",
    "CREATING",
    "ITEM",
    "KEEPING",
    "LINEAR",
    "PERMUTING",
    "POINTWISE",
    "POOLING",
    "REDUCTIONS",
    "RESHAPING",
    "SPLITTING",
]


aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
LINEAR = aten.linear.default
BATCH_NORMS = (aten._native_batch_norm_legit_no_training.default,)
CENTERING_NORMS = (
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
)
"""Batch norms that use the statistics of the batch."""
POINTWISE = (
    *(aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default),
    *(aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.hardswish.default, aten.hardsigmoid.default, aten.leaky_relu.default),
    *(aten.elu.default, aten.celu.default, aten.selu.default, aten.mish.default),
    *(aten.softplus.default, aten.exp.default, aten.log1p.default, aten.abs.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.neg.default, aten.pow.Tensor_Scalar),
    *(aten.clamp_min.default, aten.erf.default, aten.reciprocal.default),
)
KEEPING = (
    *(aten.clone.default, aten.alias.default, aten.detach.default),
    *(aten.lift_fresh_copy.default, aten.contiguous.default),
)
BINARY = (
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.div.Tensor),
    *(aten.div.Scalar, aten.maximum.default, aten.minimum.default, aten.rsub.Scalar),
)
RESHAPING = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    *(aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.unsqueeze.default, aten.unflatten.int),
)
PERMUTING = (aten.permute.default, aten.transpose.int, aten.t.default)
REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
ITEM = operator.getitem
CREATING = (
    *(aten.ones.default, aten.zeros.default, aten.full.default, aten.scalar_tensor.default),
    *(aten.arange.default, aten.arange.start, aten.arange.start_step),
)
"""Operations that create a known tensor without an input."""
SPLITTING = (
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
    *(aten.split.sizes, aten.tensor_split.sections),
)
POOLING = {
    1: (aten.max_pool1d.default, aten.adaptive_avg_pool1d.default, aten.upsample_nearest1d.vec),
    2: (
        *(aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.upsample_nearest2d.vec),
        *(aten._adaptive_avg_pool2d.default, aten.upsample_bilinear2d.vec),
    ),
    3: (aten.max_pool3d.default, aten.adaptive_avg_pool3d.default, aten.upsample_nearest3d.vec),
}
