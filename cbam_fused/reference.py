"""CBAM and BAM in pure PyTorch: the specification, and the backend that works everywhere.

:func:`cbam` and :func:`bam` say what the gates compute and are differentiated by autograd. The five
functions named after the operations take the arguments of :mod:`cbam_fused.schemas`, in its order;
their backward formulas are written out.

Everything is computed in float32 (float64 for float64) and rounded once, to the dtype of x; an
activation is applied to the rounded value. Autocast has no effect inside.

Sources: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, section 3;
Park et al., "BAM: Bottleneck Attention Module", BMVC 2018, section 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cbam_fused import checks
from cbam_fused import reference_gates as gates
from cbam_fused.schemas import ACTIVATIONS, MAPS, TIES


def cbam(
    x: Tensor,
    mlp_weight1: Tensor | None,
    mlp_bias1: Tensor | None,
    mlp_weight2: Tensor,
    mlp_bias2: Tensor | None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    batch_statistics: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: str = "avg+max",
    maps: str = "max_mean",
    ties: str = "first",
    activation: str = "none",
) -> Tensor:
    """The convolutional block attention module: a channel gate, then a spatial gate.

    ::

        Mc = sigmoid(sum over pooled branches of MLP(pool_hw x))           [N, C]
        pooled = max_c (x Mc), mean_c (x Mc)                               [N, 2, H, W]
        Ms = sigmoid(norm(conv(pooled)))                                   [N, H, W]
        y = activation(x Mc Ms + residual)                                 [N, C, H, W]

    Args:
        x: ``[N, C, H, W]`` in float32, float16, bfloat16 or float64, any strides.
        mlp_weight1: ``[R, C]`` or ``[R, C, 1, 1]``; None: no hidden layer, only ``mlp_weight2``.
        mlp_bias1: ``[R]`` or None.
        mlp_weight2: ``[C, R]`` or ``[C, R, 1, 1]`` (``[C, C]`` without ``mlp_weight1``).
        mlp_bias2: ``[C]`` or None. It is added once per pooled branch.
        conv_weight: ``[1, 2, k, k]``, or ``[1, 1, k, k]`` for ``maps="light"``, k odd; None: no
            spatial gate.
        conv_bias: ``[1]`` or None.
        norm_weight, norm_bias: ``[1]`` or None.
        running_mean, running_var: ``[1]`` or None. With ``batch_statistics`` they are updated in
            place; without, the norm uses them, and where they are None there is no norm.
        residual: as x; added before the activation.
        batch_statistics: normalise with the mean and variance of the batch, as in training.
        momentum: weight of the batch in the running statistics, whose variance is the unbiased one.
        eps: added to the variance.
        pool: ``avg``, ``max``, ``lp`` (p = 2), ``lse`` joined by ``+`` in that order, one MLP
            branch each; or ``light``: one branch, 0.5 avg + 0.5 max.
        maps: ``max_mean`` (the authors' order), ``mean_max``, or ``light``: one map,
            0.5 max + 0.5 mean.
        ties: who receives the gradient of a maximum. ``first``: the first index that has it (the
            first NaN if there is one), as ``Tensor.max(dim)``; ``even``: its places share it,
            as ``Tensor.amax`` (and every element gets NaN if the maximum is NaN).
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        ``[N, C, H, W]`` in the dtype of x.

    Raises:
        ValueError: batch statistics of a single value (N * H * W = 1), or an unknown option.
    """
    pool = checks.canonical_pool(pool)
    checks.choice("maps", maps, MAPS)
    checks.choice("ties", ties, TIES)
    checks.choice("activation", activation, ACTIVATIONS)
    normalise_batch = batch_statistics and conv_weight is not None
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if normalise_batch and count == 1:
        got = checks.describe(x)
        raise ValueError(f"cbam: x must have N * H * W > 1 for batch statistics; got {got}")
    values = x.to(gates.compute_dtype(x.dtype))
    mlp = (mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2)
    running = (running_mean, running_var, momentum)
    attended = cbam_attend(
        values, *mlp, conv_weight, conv_bias, normalise_batch, *running, pool, maps, ties
    )
    channel_gate, logits = attended[0], None if conv_weight is None else attended[6]
    mean, var = attended[7:] if normalise_batch else (running_mean, running_var)
    norm = (norm_weight, norm_bias, mean, var, eps)
    gated = cbam_apply(values, channel_gate, logits, *norm, residual, "none")
    return gates.activate(gated.to(x.dtype), activation)


def cbam_inference(
    x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, conv_weight, conv_bias,
    norm_weight, norm_bias, norm_mean, norm_var, eps, residual, pool, maps, activation,
):  # fmt: skip
    """y = activation(x * Mc * Ms + residual), with constant norm statistics."""
    mlp = (mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2)
    running = (None, None, 0.0)
    attended = cbam_attend(x, *mlp, conv_weight, conv_bias, False, *running, pool, maps, "first")
    channel_gate, logits = attended[0], None if conv_weight is None else attended[6]
    norm = (norm_weight, norm_bias, norm_mean, norm_var, eps)
    return cbam_apply(x, channel_gate, logits, *norm, residual, activation)


def cbam_attend(
    x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, conv_weight, conv_bias,
    batch_statistics, running_mean, running_var, momentum, pool, maps, ties,
):  # fmt: skip
    """Phase 1: the channel gate, and the logits of the spatial gate with their statistics."""
    values = x.to(gates.compute_dtype(x.dtype))
    descriptors, pixel_ties = gates.pool_pixels(values, pool, ties)
    mlp = (mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2)
    channel_gate, hidden = gates.channel_gate(descriptors, mlp, pool)
    if conv_weight is None:
        pooled, logits, mean, var = (values.new_empty([0]) for _ in range(4))
        channel_ties = values.new_empty([0], dtype=torch.int32)
    else:
        gated = values * gates.per_channel(channel_gate)
        pooled, channel_ties = gates.pool_channels(gated, maps, ties)
        logits = gates.spatial_logits(pooled, conv_weight, conv_bias, maps)
        mean, var = values.new_empty([0]), values.new_empty([0])
        if batch_statistics:
            mean, var = gates.statistics(logits.unsqueeze(1))
            count = logits.numel()
            gates.update_running_statistics(running_mean, running_var, mean, var, count, momentum)
    spatial = (pooled, channel_ties, logits, mean, var)
    return channel_gate, descriptors, hidden, pixel_ties, *spatial


def cbam_apply(
    x, channel_gate, logits, norm_weight, norm_bias, norm_mean, norm_var, eps, residual, activation
):
    """Phase 2: y = activation(x * Mc * sigmoid(norm(logits)) + residual)."""
    gated = x.to(channel_gate.dtype) * gates.per_channel(channel_gate)
    if logits is not None:
        norm = (norm_weight, norm_bias, norm_mean, norm_var, eps)
        gated = gated * gates.spatial_gate(logits, norm)
    if residual is not None:
        gated = gated + residual
    return gates.in_layout_of(x, gates.activate(gated.to(x.dtype), activation))


def cbam_backward_reduce(
    grad, x, y, channel_gate, logits, norm_weight, norm_bias, norm_mean, norm_var, eps, activation
):
    """First pass of the backward: reductions of g * x, where g is the gradient of x * Mc * Ms."""
    if activation == "none":
        masked_grad = x.new_empty([0])
    else:
        closed = y <= 0 if activation == "relu" else (y <= 0) | (y >= 6)
        masked_grad = grad = gates.in_layout_of(x, torch.where(closed, 0, grad))
    product = grad.to(channel_gate.dtype) * x
    if logits is None:
        norm_grad, norm_sums = product.new_empty([0]), product.new_empty([0])
        return masked_grad, product.sum((2, 3)), norm_grad, norm_sums
    spatial_gate = gates.spatial_gate(logits, (norm_weight, norm_bias, norm_mean, norm_var, eps))
    channel_sums = (product * spatial_gate).sum((2, 3))
    spatial_sums = (product * gates.per_channel(channel_gate)).sum(1)
    norm_grad = spatial_sums * gates.sigmoid_slope(spatial_gate.squeeze(1))
    if norm_mean is None:
        return masked_grad, channel_sums, norm_grad, product.new_empty([0])
    mean, var = (statistic.to(logits.dtype) for statistic in (norm_mean, norm_var))
    normalised = (logits - mean) * gates.inverse_std(var, eps)
    norm_sums = torch.stack((norm_grad.sum(), (norm_grad * normalised).sum()))
    return masked_grad, channel_sums, norm_grad, norm_sums


def cbam_backward_input(
    grad, x, channel_gate, descriptors, hidden, pixel_ties, pooled, channel_ties, logits,
    channel_sums, norm_grad, norm_sums, norm_count, mlp_weight1, mlp_weight2, conv_weight,
    norm_weight, norm_bias, norm_mean, norm_var, eps, pool, maps, ties,
):  # fmt: skip
    """Second pass of the backward: gradients of x and of the MLP's and convolution's parameters."""
    values = x.to(channel_gate.dtype)
    per_channel = gates.per_channel(channel_gate)
    gated_grad = grad.to(channel_gate.dtype)  # the gradient of u = x * Mc
    channel_gate_grad = channel_sums
    if logits is None:
        conv_grads = values.new_empty([0]), values.new_empty([0])
    else:
        norm = (norm_weight, norm_bias, norm_mean, norm_var, eps)
        grad_means = None if norm_sums is None else norm_sums / max(norm_count, 1)
        logits_grad = gates.norm_backward(norm_grad, grad_means, logits, norm)
        pooled_grad, *conv_grads = gates.spatial_logits_backward(
            logits_grad, pooled, conv_weight, maps
        )
        pooling_grad = gates.pool_channels_backward(
            pooled_grad, values * per_channel, pooled, channel_ties, maps, ties
        )
        gated_grad = gated_grad * gates.spatial_gate(logits, norm) + pooling_grad
        channel_gate_grad = channel_gate_grad + (values * pooling_grad).sum((2, 3))
    mlp = (mlp_weight1, mlp_weight2)
    descriptors_grad, *mlp_grads = gates.channel_gate_backward(
        channel_gate_grad, channel_gate, descriptors, hidden, mlp, pool
    )
    x_grad = gated_grad * per_channel + gates.pool_pixels_backward(
        descriptors_grad, values, descriptors, pixel_ties, pool, ties
    )
    return gates.in_layout_of(x, x_grad.to(x.dtype)), *mlp_grads, *conv_grads


class Norm(NamedTuple):
    """A batch norm over C channels; every tensor is ``[C]`` or None.

    With ``batch_statistics`` it normalises with the statistics of the batch and updates the running
    ones in place; without, it normalises with the running ones.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    batch_statistics: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class Layer(NamedTuple):
    """A linear layer or a convolution, and the norm of its result.

    ``weight`` is ``[out, in]`` in the channel branch and ``[out, in, k, k]``, k odd, in the spatial
    branch; ``bias`` is ``[out]`` or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: Norm | None = None


def bam(
    x: Tensor,
    channel_layers: Sequence[Layer],
    spatial_layers: Sequence[Layer],
    *,
    dilation: int = 4,
    combine: str = "sum",
) -> Tensor:
    """The bottleneck attention module: a channel branch and a spatial branch, side by side.

    ::

        Mc = channel_layers(mean_hw x)                                     [N, C]
        Ms = spatial_layers(x)                                             [N, 1, H, W]
        y = x (1 + sigmoid(Mc combine Ms))                                 [N, C, H, W]

    In either branch a ReLU follows every layer, after its norm, but the last.

    Args:
        x: ``[N, C, H, W]`` in float32, float16, bfloat16 or float64, any strides.
        channel_layers: linear layers, C -> C / r -> ... -> C. In the authors' code: two,
            r = 16, the first with a norm.
        spatial_layers: convolutions that keep H and W, C -> C / r -> ... -> 1. In the authors'
            code: a 1 x 1, two dilated 3 x 3, a 1 x 1, all but the last with a norm.
        dilation: of the convolutions with k > 1.
        combine: ``sum`` (the paper), ``mul`` (the authors' code) or ``max``.

    Returns:
        ``[N, C, H, W]`` in the dtype of x.

    Raises:
        ValueError: batch statistics of a single value (N = 1 in the channel branch, N * H * W = 1
            in the spatial branch).
    """
    n, _, height, width = x.shape
    counts = {"N": (n, channel_layers), "N * H * W": (n * height * width, spatial_layers)}
    for name, (count, layers) in counts.items():
        if count == 1 and any(layer.norm and layer.norm.batch_statistics for layer in layers):
            got = checks.describe(x)
            raise ValueError(f"bam: x must have {name} > 1 for batch statistics; got {got}")
    values = x.to(gates.compute_dtype(x.dtype))
    channel_logits = _bam_branch(values.mean((2, 3)), channel_layers, dilation)
    spatial_logits = _bam_branch(values, spatial_layers, dilation)
    operation = {"sum": torch.add, "mul": torch.mul, "max": torch.maximum}[combine]
    gate = operation(gates.per_channel(channel_logits), spatial_logits).sigmoid()
    return gates.in_layout_of(x, (values * (1 + gate)).to(x.dtype))


@gates.without_autocast
def _bam_branch(values: Tensor, layers: Sequence[Layer], dilation: int) -> Tensor:
    for index, layer in enumerate(layers):
        if index > 0:
            values = values.relu()
        weight, bias = layer.weight.to(values.dtype), gates.cast(layer.bias, values.dtype)
        if values.dim() == 2:
            values = functional.linear(values, weight.flatten(1), bias)
        else:
            padding = dilation * (weight.shape[-1] // 2)
            values = functional.conv2d(values, weight, bias, padding=padding, dilation=dilation)
        values = values if layer.norm is None else _bam_norm(values, layer.norm)
    return values


def _bam_norm(values: Tensor, norm: Norm) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if norm.batch_statistics:
        mean, var = gates.statistics(values)
        count = values.numel() // values.shape[1]
        gates.update_running_statistics(
            norm.running_mean, norm.running_var, mean, var, count, norm.momentum
        )
    return gates.normalise(values, (norm.weight, norm.bias, mean, var, norm.eps))
