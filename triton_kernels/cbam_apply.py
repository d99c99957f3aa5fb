"""cbam_apply, phase 2 of the gate: y = act(x * Mc * sigmoid(norm(z)) + residual)

x, y, residual [N, C, H, W] any float; Mc [N, C] and the logits z [N, H, W] in the compute dtype.
Traffic: x (and residual) once, y once.

`apply_kernel`: one program per sample, tile of pixels and range of channels. In cbam_inference it
takes the pooled maps instead of the logits, and convolves them itself, once for all channels.
"""

import torch
import triton
import triton.language as tl

from cbam_fused.triton_kernels.configurations import configuration
from cbam_fused.triton_kernels.geometry import geometry
from cbam_fused.triton_kernels.launch import aligned, aligned_like, launch
from cbam_fused.triton_kernels.primitives import (
    NORM,
    activate,
    aligned_shape,
    convolve,
    spatial_gate,
    tile_offsets,
)


@triton.jit(
    do_not_specialize=["c", "h", "w", "tiles", "splits"],
    do_not_specialize_on_alignment=[
        *("conv_weight_ptr", "conv_bias_ptr"),
        *NORM,
    ],
)
def apply_kernel(
    x_ptr,  # [N, C, H, W]
    channel_gate_ptr,  # [N, C]
    logits_ptr,  # [N, H, W] or None
    pooled_ptr,  # [N, 2, H, W], if there are no logits; both None: no spatial gate
    conv_weight_ptr,  # [M, K, K] or None
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
    tiles,
    splits,
    K: tl.constexpr,
    LIGHT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    c, pixels = aligned_shape(c, h * w, CHANNELS_LAST, ALIGN)
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    sample = (rest // splits).to(tl.int64)
    first_channel = rest % splits * SPLIT_C
    end_channel = tl.minimum(first_channel + SPLIT_C, c)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    live_pixel = pixel < pixels
    gate = tl.full([BLOCK_P], 1.0, COMPUTE)
    if logits_ptr is not None or pooled_ptr is not None:
        if logits_ptr is not None:
            logits = tl.load(logits_ptr + sample * pixels + pixel, mask=live_pixel, other=0.0)
        else:
            maps_ptr = pooled_ptr + sample * 2 * pixels
            logits = convolve(
                maps_ptr, conv_weight_ptr, conv_bias_ptr, pixel, live_pixel, h, w, K, LIGHT, COMPUTE
            )
        norm = (norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr)
        gate = spatial_gate(logits, *norm, eps, COMPUTE)
    start_of_sample = sample * c * pixels
    for start in tl.range(first_channel, end_channel, BLOCK_C, num_stages=NUM_STAGES):
        channel = start + tl.arange(0, BLOCK_C)
        live = (channel < end_channel)[:, None] & live_pixel[None, :]
        at = tile_offsets(channel[:, None], pixel[None, :], c, pixels, CHANNELS_LAST, WIDE)
        value = tl.load(x_ptr + start_of_sample + at, mask=live, other=0.0).to(COMPUTE)
        gate_source = channel_gate_ptr + sample * c + channel
        channel_gate = tl.load(gate_source, mask=channel < end_channel, other=0.0)
        value = value * channel_gate[:, None]
        if logits_ptr is not None or pooled_ptr is not None:
            value = value * gate[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + start_of_sample + at, mask=live, other=0.0)
            value += residual.to(COMPUTE)
        value = activate(value, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start_of_sample + at, value, mask=live)


def apply(
    x, channel_gate, logits, pooled, conv_weight, conv_bias, norm, eps, residual, maps, activation
):
    """y, from the logits, or from the pooled maps and the convolution, or with neither.

    x is aligned; norm: weight, bias, mean, var, each [1] or None.
    """
    shape = geometry(x)
    name = "apply_kernel" if pooled is None else "convolve_apply_kernel"
    plan = configuration(name, shape)
    tiles, splits = plan.tiles(shape), plan.splits(shape)
    y = torch.empty_like(x)
    launch(
        apply_kernel,
        shape.n * tiles * splits,
        x,
        channel_gate.contiguous(),
        None if logits is None else logits.contiguous(),
        pooled,
        None if pooled is None else conv_weight.contiguous(),
        None if pooled is None else conv_bias,
        *norm,
        aligned_like(x, residual),
        y,
        eps,
        shape.c,
        shape.h,
        shape.w,
        tiles,
        splits,
        configuration=plan,
        K=1 if pooled is None else conv_weight.shape[-1],
        LIGHT=maps == "light",
        ACTIVATION=activation,
        NUM_STAGES=plan.num_stages,
        **plan.tile(shape),
    )
    return y


def cbam_apply(
    x, channel_gate, logits, norm_weight, norm_bias, norm_mean, norm_var, eps, residual, activation
):
    """Phase 2: y = activation(x * Mc * sigmoid(norm(logits)) + residual)."""
    norm = (norm_weight, norm_bias, norm_mean, norm_var)
    return apply(
        *(aligned(x), channel_gate, logits, None, None, None, norm, eps, residual),
        maps="max_mean",
        activation=activation,
    )
