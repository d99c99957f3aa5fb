"""The whole gate of a small sample in one program, which keeps x in its registers.

For cbam_inference, y = act(x * Mc * sigmoid(norm(conv(pooled))) + residual); for cbam_attend, what
comes before the convolution. One kernel for both, so that their sums have one order.

Traffic: x (and residual) once, y once. One launch, one program per sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbam_fused.reference_gates import compute_dtype
from cbam_fused.triton_kernels.configurations import Configuration
from cbam_fused.triton_kernels.gate_pool_channels import Gated
from cbam_fused.triton_kernels.geometry import geometry
from cbam_fused.triton_kernels.launch import aligned_like, launch, rows_per_step
from cbam_fused.triton_kernels.pool_pixels import Pool
from cbam_fused.triton_kernels.primitives import (
    NORM,
    activate,
    aligned_shape,
    convolve,
    divide,
    reduce_maximum,
    sigmoid,
    spatial_gate,
    square_root,
    tile_offsets,
)


@triton.jit
def _hidden_units(descriptor, weight, bias, hidden_ptr, unit, live, reduced, BRANCH: tl.constexpr):
    """relu(W1 d + b1) for some rows of W1 [units, channels]; kept if there is a ``hidden_ptr``."""
    units = tl.sum(weight * descriptor[None, :], axis=1) + bias
    units = tl.where(units <= 0.0, 0.0, units)
    units = tl.where(live, units, 0.0)  # an infinite descriptor times no weight is NaN
    if hidden_ptr is not None:
        tl.store(hidden_ptr + BRANCH * reduced + unit, units, mask=live)
    return units


@triton.jit(
    do_not_specialize=["c", "h", "w", "reduced"],
    do_not_specialize_on_alignment=[
        *("weight1_ptr", "bias1_ptr", "weight2_ptr", "bias2_ptr"),
        *("conv_weight_ptr", "conv_bias_ptr"),
        *NORM,
    ],
)
def sample_kernel(
    x_ptr,  # [N, C, H, W]
    weight1_ptr,  # [R, C] or None
    bias1_ptr,  # [R] or None
    weight2_ptr,  # [C, R], or [C, C] without weight1
    bias2_ptr,  # [C] or None
    pooled_ptr,  # [N, 2, H, W], or None without a spatial gate
    descriptors_ptr,  # [N, P, C]; this and the next five for cbam_attend, or None
    hidden_ptr,  # [N, B, R], None also without weight1
    channel_gate_ptr,  # [N, C]
    pixel_ties_ptr,  # [N, C], None also without a maximum
    channel_ties_ptr,  # [N, H, W], None also without a spatial gate
    ticket_ptr,  # [1], zeroed for a later launch
    conv_weight_ptr,  # [M, K, K]; this and all that follow for cbam_inference, or None
    conv_bias_ptr,  # [1] or None
    norm_weight_ptr,  # [1] or None, as the three that follow
    norm_bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    residual_ptr,  # [N, C, H, W] or None
    y_ptr,  # [N, C, H, W]
    eps: tl.float64,
    c,
    h,
    w,
    reduced,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    LIGHT: tl.constexpr,
    TIES: tl.constexpr,
    K: tl.constexpr,
    LIGHT_MAPS: tl.constexpr,
    MAX_MAP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    c, pixels = aligned_shape(c, h * w, CHANNELS_LAST, ALIGN)
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_P)
    live_channel, live_pixel = channel < c, pixel < pixels
    live = live_channel[:, None] & live_pixel[None, :]
    at = tile_offsets(channel[:, None], pixel[None, :], c, pixels, CHANNELS_LAST, WIDE)
    at += sample * c * pixels
    value = tl.load(x_ptr + at, mask=live, other=0.0).to(COMPUTE)
    if ticket_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(ticket_ptr, 0)

    # Descriptors, each [BLOCK_C].
    POOLS: tl.constexpr = AVG + MAX + LP + LSE
    if AVG:
        average = divide(tl.sum(value, axis=1), pixels.to(COMPUTE))
    if MAX or LSE:
        lowest = tl.where(live, value, float("-inf"))
        tie = live.to(tl.int32)
        if TIES == "first":
            tie = tl.broadcast_to(pixel[None, :], [BLOCK_C, BLOCK_P])
        maximum, tie = reduce_maximum(lowest, tie, 1, TIES)
        maximum = tl.where(live_channel, maximum, 0.0)
        if pixel_ties_ptr is not None:
            tl.store(pixel_ties_ptr + sample * c + channel, tie, mask=live_channel)
    if LP:
        norm = square_root(tl.sum(value * value, axis=1))
    if LSE:
        exponentials = tl.where(live, tl.exp(value - maximum[:, None]), 0.0)
        log_sum = maximum + tl.log(tl.sum(exponentials, axis=1))
        log_sum = tl.where(live_channel, log_sum, 0.0)
    if descriptors_ptr is not None:
        descriptor_ptr = descriptors_ptr + sample * POOLS * c + channel
        if AVG:
            tl.store(descriptor_ptr, average, mask=live_channel)
        if MAX:
            tl.store(descriptor_ptr + AVG * c, maximum, mask=live_channel)
        if LP:
            tl.store(descriptor_ptr + (AVG + MAX) * c, norm, mask=live_channel)
        if LSE:
            tl.store(descriptor_ptr + (AVG + MAX + LP) * c, log_sum, mask=live_channel)

    logits = tl.zeros([BLOCK_C], COMPUTE)
    if weight1_ptr is not None:
        if hidden_ptr is not None:
            hidden_ptr += sample * (1 if LIGHT else POOLS) * reduced
        for start in tl.range(0, reduced, BLOCK_R):
            unit = start + tl.arange(0, BLOCK_R)
            live_unit = unit < reduced
            live_weight = live_unit[:, None] & live_channel[None, :]
            source = weight1_ptr + unit[:, None] * c + channel[None, :]
            weight = tl.load(source, mask=live_weight, other=0.0).to(COMPUTE)
            bias = tl.zeros([BLOCK_R], COMPUTE)
            if bias1_ptr is not None:
                bias += tl.load(bias1_ptr + unit, mask=live_unit, other=0.0).to(COMPUTE)
            kept = (hidden_ptr, unit, live_unit, reduced)
            hidden = tl.zeros([BLOCK_R], COMPUTE)
            if LIGHT:
                hidden += _hidden_units(0.5 * average + 0.5 * maximum, weight, bias, *kept, 0)
            else:
                if AVG:
                    hidden += _hidden_units(average, weight, bias, *kept, 0)
                if MAX:
                    hidden += _hidden_units(maximum, weight, bias, *kept, AVG)
                if LP:
                    hidden += _hidden_units(norm, weight, bias, *kept, AVG + MAX)
                if LSE:
                    hidden += _hidden_units(log_sum, weight, bias, *kept, AVG + MAX + LP)
            live_weight = live_channel[:, None] & live_unit[None, :]
            source = weight2_ptr + channel[:, None] * reduced + unit[None, :]
            weight = tl.load(source, mask=live_weight, other=0.0).to(COMPUTE)
            logits += tl.sum(weight * hidden[None, :], axis=1)
    else:
        total = tl.zeros([BLOCK_C], COMPUTE)
        if LIGHT:
            total += 0.5 * average + 0.5 * maximum
        else:
            if AVG:
                total += average
            if MAX:
                total += maximum
            if LP:
                total += norm
            if LSE:
                total += log_sum
        live_weight = live_channel[:, None] & live_channel[None, :]
        source = weight2_ptr + channel[:, None] * c + channel[None, :]
        weight = tl.load(source, mask=live_weight, other=0.0).to(COMPUTE)
        logits += tl.sum(weight * total[None, :], axis=1)
    if bias2_ptr is not None:
        BRANCHES: tl.constexpr = 1 if LIGHT else POOLS
        bias = tl.load(bias2_ptr + channel, mask=live_channel, other=0.0).to(COMPUTE)
        logits += BRANCHES * bias
    gate = tl.where(live_channel, sigmoid(logits), 0.0)
    if channel_gate_ptr is not None:
        tl.store(channel_gate_ptr + sample * c + channel, gate, mask=live_channel)
    value = value * gate[:, None]

    if pooled_ptr is not None:
        mean = divide(tl.sum(value, axis=0), c.to(COMPUTE))
        lowest = tl.where(live, value, float("-inf"))
        tie = live.to(tl.int32)
        if TIES == "first":
            tie = tl.broadcast_to(channel[:, None], [BLOCK_C, BLOCK_P])
        maximum, tie = reduce_maximum(lowest, tie, 0, TIES)
        maps_ptr = pooled_ptr + sample * 2 * pixels
        tl.store(maps_ptr + MAX_MAP * pixels + pixel, maximum, mask=live_pixel)
        tl.store(maps_ptr + (1 - MAX_MAP) * pixels + pixel, mean, mask=live_pixel)
        if channel_ties_ptr is not None:
            tl.store(channel_ties_ptr + sample * pixels + pixel, tie, mask=live_pixel)

    if y_ptr is not None:
        if pooled_ptr is not None:
            tl.debug_barrier()
            logits = convolve(
                *(maps_ptr, conv_weight_ptr, conv_bias_ptr, pixel, live_pixel, h, w),
                *(K, LIGHT_MAPS, COMPUTE),
            )
            norms = (norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr)
            value = value * spatial_gate(logits, *norms, eps, COMPUTE)[None, :]
        if residual_ptr is not None:
            value += tl.load(residual_ptr + at, mask=live, other=0.0).to(COMPUTE)
        value = activate(value, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, value, mask=live)


def _launch(
    plan: Configuration,
    x: Tensor,
    mlp: tuple,
    pool: Pool,
    max_map: int,
    pooled: Tensor | None,
    attended: tuple,
    applied: tuple,
    eps: float = 0.0,
    *,
    ties: str = "none",
    kernel_size: int = 1,
    light_maps: bool = False,
    activation: str = "none",
) -> None:
    """``attended`` and ``applied``: the kernel's arguments for either operation."""
    shape = geometry(x)
    weight1, bias1, weight2, bias2 = mlp
    reduced = 0 if weight1 is None else weight1.shape[0]
    launch(
        sample_kernel,
        shape.n,
        x,
        None if weight1 is None else weight1.contiguous(),
        bias1,
        weight2.contiguous(),
        bias2,
        pooled,
        *attended,
        *applied,
        eps,
        shape.c,
        shape.h,
        shape.w,
        reduced,
        configuration=plan,
        **pool.constants(),
        TIES=ties,
        K=kernel_size,
        LIGHT_MAPS=light_maps,
        MAX_MAP=max_map,
        ACTIVATION=activation,
        BLOCK_R=rows_per_step(reduced, plan.block_c, plan.num_warps),
        BLOCK_C=plan.block_c,
        BLOCK_P=plan.block_p,
        **shape.constants(),
    )


def infer_sample(
    plan: Configuration,
    x: Tensor,
    mlp: tuple,
    conv: tuple,
    norm: tuple,
    eps: float,
    residual: Tensor | None,
    pool: Pool,
    max_map: int,
    *,
    light_maps: bool,
    activation: str,
) -> Tensor:
    """y. x is aligned; mlp, conv and norm: the arguments of the operation."""
    shape = geometry(x)
    weight, bias = conv
    y = torch.empty_like(x)
    pooled = None
    if weight is not None:
        pooled = x.new_empty([shape.n, 2, shape.pixels], dtype=compute_dtype(x.dtype))
        weight = weight.contiguous()
    applied = (weight, bias, *norm, aligned_like(x, residual), y)
    _launch(
        *(plan, x, mlp, pool, max_map, pooled, (None,) * 6, applied, eps),
        kernel_size=1 if weight is None else weight.shape[-1],
        light_maps=light_maps,
        activation=activation,
    )
    return y


def attend_sample(
    plan: Configuration,
    x: Tensor,
    mlp: tuple,
    pool: Pool,
    max_map: int,
    ties: str,
    ticket: Tensor | None,
    *,
    spatial: bool,
) -> tuple[Tensor, Tensor, Gated]:
    """(descriptors, pixel_ties, the rest), as `pool_pixels` and `gate_pool_channels` leave them.

    x is aligned; ``ticket`` is zeroed.
    """
    shape = geometry(x)
    n, c, pixels = shape.n, shape.c, shape.pixels
    layered = mlp[0] is not None
    floats, integers = {"dtype": compute_dtype(x.dtype)}, {"dtype": torch.int32}
    descriptors = x.new_empty([n, pool.descriptors, c], **floats)
    pixel_ties = x.new_empty([n, c] if pool.max else [0], **integers)
    hidden = x.new_empty([n, pool.branches, len(mlp[0]) if layered else 0], **floats)
    channel_gate = x.new_empty([n, c], **floats)
    pooled = x.new_empty([n, 1, 2, pixels] if spatial else [0], **floats)
    channel_ties = x.new_empty([n, 1, pixels] if spatial else [0], **integers)
    attended = (
        descriptors,
        hidden if layered else None,
        channel_gate,
        pixel_ties if pool.max else None,
        channel_ties if spatial else None,
        ticket,
    )
    _launch(
        *(plan, x, mlp, pool, max_map, pooled if spatial else None, attended, (None,) * 8),
        ties=ties,
    )
    return descriptors, pixel_ties, Gated(channel_gate, hidden, pooled, channel_ties)
