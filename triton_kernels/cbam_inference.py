"""cbam_inference: the whole gate in one call, with constant norm statistics.

y = act(x * Mc * sigmoid(norm(conv(pooled))) + residual); x, y, residual [N, C, H, W] any float.

Small samples: one launch, one program per sample, which keeps x in its registers (`sample_kernel`).
Traffic: x (and residual) once, y once.

Others: `pool_pixels`, `gate_pool_channels`, and `apply`, which convolves the pooled maps itself.
Where `gate_pool_channels` splits the channels, `spatial_logits` comes between. Traffic: x three
times, residual once, y once.
"""

import torch
import triton
import triton.language as tl

from cbam_fused.reference_gates import compute_dtype
from cbam_fused.triton_kernels.cbam_apply import apply
from cbam_fused.triton_kernels.cbam_attend import maximum_map, spatial_logits
from cbam_fused.triton_kernels.configurations import whole_sample
from cbam_fused.triton_kernels.gate_pool_channels import gate_pool_channels
from cbam_fused.triton_kernels.geometry import geometry
from cbam_fused.triton_kernels.launch import aligned, aligned_like, launch, rows_per_step
from cbam_fused.triton_kernels.pool_pixels import Pool, pool_pixels
from cbam_fused.triton_kernels.primitives import (
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
def _hidden_units(descriptor, weight, bias):
    """relu(W1 d + b1) for some rows of W1 [units, channels]."""
    units = tl.sum(weight * descriptor[None, :], axis=1) + bias
    return tl.where(units <= 0.0, 0.0, units)


@triton.jit(
    do_not_specialize=["c", "h", "w", "reduced"],
    do_not_specialize_on_alignment=[
        *("weight1_ptr", "bias1_ptr", "weight2_ptr", "bias2_ptr"),
        *("conv_weight_ptr", "conv_bias_ptr"),
        *("norm_weight_ptr", "norm_bias_ptr", "norm_mean_ptr", "norm_var_ptr"),
    ],
)
def sample_kernel(
    x_ptr,  # [N, C, H, W]
    weight1_ptr,  # [R, C] or None
    bias1_ptr,  # [R] or None
    weight2_ptr,  # [C, R], or [C, C] without weight1
    bias2_ptr,  # [C] or None
    conv_weight_ptr,  # [M, K, K], or None without a spatial gate
    conv_bias_ptr,  # [1] or None
    norm_weight_ptr,  # [1] or None, as the three that follow
    norm_bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    residual_ptr,  # [N, C, H, W] or None
    pooled_ptr,  # [N, 2, H, W], scratch
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

    # Descriptors, each [BLOCK_C].
    average = divide(tl.sum(value, axis=1), pixels.to(COMPUTE))
    lowest = tl.where(live, value, float("-inf"))
    no_tie = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    maximum, _ = reduce_maximum(lowest, no_tie, 1, "none")
    maximum = tl.where(live_channel, maximum, 0.0)
    norm = square_root(tl.sum(value * value, axis=1))
    exponentials = tl.where(live, tl.exp(value - maximum[:, None]), 0.0)
    log_sum = maximum + tl.log(tl.sum(exponentials, axis=1))
    log_sum = tl.where(live_channel, log_sum, 0.0)

    logits = tl.zeros([BLOCK_C], COMPUTE)
    if weight1_ptr is not None:
        for start in tl.range(0, reduced, BLOCK_R):
            unit = start + tl.arange(0, BLOCK_R)
            live_unit = unit < reduced
            live_weight = live_unit[:, None] & live_channel[None, :]
            source = weight1_ptr + unit[:, None] * c + channel[None, :]
            weight = tl.load(source, mask=live_weight, other=0.0).to(COMPUTE)
            bias = tl.zeros([BLOCK_R], COMPUTE)
            if bias1_ptr is not None:
                bias += tl.load(bias1_ptr + unit, mask=live_unit, other=0.0).to(COMPUTE)
            hidden = tl.zeros([BLOCK_R], COMPUTE)
            if LIGHT:
                hidden += _hidden_units(0.5 * average + 0.5 * maximum, weight, bias)
            else:
                if AVG:
                    hidden += _hidden_units(average, weight, bias)
                if MAX:
                    hidden += _hidden_units(maximum, weight, bias)
                if LP:
                    hidden += _hidden_units(norm, weight, bias)
                if LSE:
                    hidden += _hidden_units(log_sum, weight, bias)
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
        BRANCHES: tl.constexpr = 1 if LIGHT else AVG + MAX + LP + LSE
        bias = tl.load(bias2_ptr + channel, mask=live_channel, other=0.0).to(COMPUTE)
        logits += BRANCHES * bias
    value = value * sigmoid(logits)[:, None]

    if conv_weight_ptr is not None:
        mean = divide(tl.sum(value, axis=0), c.to(COMPUTE))
        lowest = tl.where(live, value, float("-inf"))
        maximum, _ = reduce_maximum(lowest, no_tie, 0, "none")
        maps_ptr = pooled_ptr + sample * 2 * pixels
        tl.store(maps_ptr + MAX_MAP * pixels + pixel, maximum, mask=live_pixel)
        tl.store(maps_ptr + (1 - MAX_MAP) * pixels + pixel, mean, mask=live_pixel)
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


def cbam_inference(
    x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, conv_weight, conv_bias,
    norm_weight, norm_bias, norm_mean, norm_var, eps, residual, pool, maps, activation,
):  # fmt: skip
    """y = activation(x * Mc * Ms + residual), with constant norm statistics."""
    x = aligned(x)
    shape, pools, spatial = geometry(x), Pool.parse(pool), conv_weight is not None
    norm = (norm_weight, norm_bias, norm_mean, norm_var)
    plan = whole_sample(shape, mlp_weight2.numel())
    if plan is not None:
        y = torch.empty_like(x)
        pooled = x.new_empty([shape.n, 2, shape.pixels], dtype=compute_dtype(x.dtype))
        reduced = 0 if mlp_weight1 is None else mlp_weight1.shape[0]
        launch(
            sample_kernel,
            shape.n,
            x,
            None if mlp_weight1 is None else mlp_weight1.contiguous(),
            mlp_bias1,
            mlp_weight2.contiguous(),
            mlp_bias2,
            conv_weight.contiguous() if spatial else None,
            conv_bias if spatial else None,
            *norm,
            aligned_like(x, residual),
            pooled,
            y,
            eps,
            shape.c,
            shape.h,
            shape.w,
            reduced,
            configuration=plan,
            **pools.constants(),
            K=conv_weight.shape[-1] if spatial else 1,
            LIGHT_MAPS=maps == "light",
            MAX_MAP=maximum_map(maps),
            ACTIVATION=activation,
            BLOCK_R=rows_per_step(reduced, plan.block_c, plan.num_warps),
            BLOCK_C=plan.block_c,
            BLOCK_P=plan.block_p,
            **shape.constants(),
        )
        return y

    products = pool_pixels(x, mlp_weight1, mlp_weight2, pools, "none", None).partial_products
    gated = gate_pool_channels(
        x,
        products,
        mlp_bias1,
        mlp_weight2,
        mlp_bias2,
        pools,
        maximum_map(maps),
        "none",
        hidden_layer=mlp_weight1 is not None,
        spatial=spatial,
        keep_hidden=False,
    )
    pooled = logits = None
    if spatial and gated.pooled.shape[1] > 1:
        splits = (gated.pooled, gated.channel_ties)
        logits = spatial_logits(shape, *splits, conv_weight, conv_bias, maps, "none")[2]
    elif spatial:
        pooled = gated.pooled
    return apply(
        *(x, gated.channel_gate, logits, pooled, conv_weight, conv_bias, norm, eps, residual),
        maps=maps,
        activation=activation,
    )
