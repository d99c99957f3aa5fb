"""cbam_backward_reduce: the first pass of the backward. With g = grad through the activation and
p = g x,

    channel_sums[n, c] = sum_hw p Ms        q[n, hw] = sum_c p Mc        norm_grad = q Ms (1 - Ms)
    norm_sums = sum norm_grad, sum norm_grad * normalised logits

Traffic: grad and x once; with an activation also y once, and masked_grad written once.
Two launches: `reduce_products`, one program per sample, pixel tile and split of the channels,
leaves both sums of what it reads; `finish_reduce` adds them up in ascending order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbam_fused.triton_kernels.configurations import configuration
from cbam_fused.triton_kernels.geometry import geometry
from cbam_fused.triton_kernels.launch import aligned, aligned_like, launch
from cbam_fused.triton_kernels.primitives import (
    NORM,
    aligned_shape,
    is_last,
    normalise,
    spatial_gate,
    sum_partials,
    tile_offsets,
)


@triton.jit(do_not_specialize=["c", "pixels", "tiles"], do_not_specialize_on_alignment=NORM)
def reduce_products_kernel(
    grad_ptr,  # [N, C, HW], or [N, HW, C] if CHANNELS_LAST; as x, y and masked_grad
    x_ptr,
    y_ptr,  # None without an activation
    masked_grad_ptr,  # out, or None
    channel_gate_ptr,  # [N, C]
    logits_ptr,  # [N, HW], or None without a spatial gate
    norm_weight_ptr,  # [1] or None, as the three that follow
    norm_bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    tile_sums_ptr,  # [N, tiles, C], out: sum_hw p Ms of each tile
    split_sums_ptr,  # [N, splits, HW], out: sum_c p Mc of each split; or None
    ticket_ptr,  # [1], zeroed for the next launch
    c,
    pixels,
    tiles,
    eps: tl.float64,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    c, pixels = aligned_shape(c, pixels, CHANNELS_LAST, ALIGN)
    splits = tl.cdiv(c, SPLIT_C)
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    first_channel = rest % splits * SPLIT_C
    end_channel = tl.minimum(first_channel + SPLIT_C, c)
    n = (rest // splits).to(tl.int64)
    if tl.program_id(0) == 0:
        tl.store(ticket_ptr, 0)

    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    live_pixel = pixel < pixels
    if logits_ptr is not None:
        logits = tl.load(logits_ptr + n * pixels + pixel, mask=live_pixel, other=0.0)
        pixel_gate = spatial_gate(
            logits, norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr, eps, COMPUTE
        )[None, :]
        gated = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    sample = n * c * pixels
    for start in tl.range(first_channel, end_channel, BLOCK_C, num_stages=NUM_STAGES):
        channel = start + tl.arange(0, BLOCK_C)
        live_channel = channel < end_channel
        live = live_channel[:, None] & live_pixel[None, :]
        at = tile_offsets(channel[:, None], pixel[None, :], c, pixels, CHANNELS_LAST, WIDE)
        grad = tl.load(grad_ptr + sample + at, mask=live, other=0.0)
        x = tl.load(x_ptr + sample + at, mask=live, other=0.0)
        if ACTIVATION != "none":
            y = tl.load(y_ptr + sample + at, mask=live, other=0.0).to(COMPUTE)
            closed = y <= 0.0
            if ACTIVATION == "relu6":
                closed = closed | (y >= 6.0)
            grad = tl.where(closed, tl.zeros_like(grad), grad)
            tl.store(masked_grad_ptr + sample + at, grad, mask=live)
        product = grad.to(COMPUTE) * x.to(COMPUTE)
        if logits_ptr is None:
            sums = tl.sum(product, axis=1)
        else:
            sums = tl.sum(product * pixel_gate, axis=1)
            gate = tl.load(channel_gate_ptr + n * c + channel, mask=live_channel, other=0.0)
            gated += product * gate[:, None]
        tl.store(tile_sums_ptr + (n * tiles + tile) * c + channel, sums, mask=live_channel)
    if logits_ptr is not None:
        target = split_sums_ptr + (n * splits + rest % splits) * pixels + pixel
        tl.store(target, tl.sum(gated, axis=0), mask=live_pixel)


@triton.jit(
    do_not_specialize=["n", "c", "pixels", "tiles", "splits", "channel_programs", "pixel_programs"],
    do_not_specialize_on_alignment=NORM,
)
def finish_reduce_kernel(
    tile_sums_ptr,  # [N, tiles, C]
    split_sums_ptr,  # [N, splits, HW], or None without a spatial gate, as all the others of it
    logits_ptr,  # [N, HW]
    norm_weight_ptr,  # [1] or None, as the three that follow
    norm_bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    channel_sums_ptr,  # [N, C], out
    norm_grad_ptr,  # [N, HW], out
    norm_sums_ptr,  # [2], out
    partial_norm_sums_ptr,  # [2, pixel programs]
    ticket_ptr,  # [1], zero
    n,
    c,
    pixels,
    tiles,
    splits,
    channel_programs,
    pixel_programs,
    eps: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    # The first programs add up tiles, the others splits: each BLOCK of the sums of all samples.
    program = tl.program_id(0)
    if program < channel_programs:
        place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        live = place // c < n
        source = tile_sums_ptr + place // c * tiles * c + place % c
        sums = sum_partials(source, live, tiles, c, BLOCK_TILES, COMPUTE)
        tl.store(channel_sums_ptr + place, sums, mask=live)
    elif logits_ptr is not None:
        program -= channel_programs
        place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
        live = place // pixels < n
        source = split_sums_ptr + place // pixels * splits * pixels + place % pixels
        sums = sum_partials(source, live, splits, pixels, BLOCK_SPLITS, COMPUTE)
        logits = tl.load(logits_ptr + place, mask=live, other=0.0)
        gate = spatial_gate(
            logits, norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr, eps, COMPUTE
        )
        norm_grad = sums * (gate * (1.0 - gate))
        tl.store(norm_grad_ptr + place, norm_grad, mask=live)
        if norm_mean_ptr is not None:
            product = norm_grad * normalise(logits, norm_mean_ptr, norm_var_ptr, eps, COMPUTE)
            tl.store(partial_norm_sums_ptr + program, tl.sum(tl.sum(norm_grad, 1), 0))
            target = partial_norm_sums_ptr + pixel_programs + program
            tl.store(target, tl.sum(tl.sum(product, 1), 0))
            if is_last(ticket_ptr, pixel_programs):
                for row in tl.static_range(2):
                    partials_ptr = partial_norm_sums_ptr + row * pixel_programs
                    total = tl.zeros([BLOCK], COMPUTE)
                    for start in tl.range(0, pixel_programs, BLOCK):
                        index = start + tl.arange(0, BLOCK)
                        live_index = index < pixel_programs
                        total += tl.load(
                            partials_ptr + index, live_index, 0.0, cache_modifier=".cg"
                        )
                    tl.store(norm_sums_ptr + row, tl.sum(total, axis=0))


def cbam_backward_reduce(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    channel_gate: Tensor,
    logits: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """masked_grad, channel_sums, norm_grad, norm_sums: see `cbam_fused.schemas`."""
    x = aligned(x)
    shape = geometry(x)
    n, c, pixels = shape.n, shape.c, shape.pixels
    active, spatial = activation != "none", logits is not None
    with_norm = spatial and norm_mean is not None
    masked_grad = torch.empty_like(x) if active else x.new_empty([0])
    channel_sums = channel_gate.new_empty([n, c])
    norm_grad = channel_gate.new_empty([n, shape.h, shape.w] if spatial else [0])
    norm_sums = channel_gate.new_empty([2] if with_norm else [0])
    results = masked_grad, channel_sums, norm_grad, norm_sums
    if n == 0:
        norm_sums.zero_()
        return results

    plan = configuration("reduce_products_kernel", shape)
    tiles = plan.tiles(shape)
    splits = plan.splits(shape)
    tile_sums = channel_sums if tiles == 1 else channel_gate.new_empty([n, tiles, c])
    split_sums = channel_gate.new_empty([n, splits, pixels]) if spatial else None
    ticket = channel_gate.new_empty([1], dtype=torch.int32)
    logits = logits.contiguous() if spatial else None
    norm = (norm_weight, norm_bias, norm_mean, norm_var)
    launch(
        reduce_products_kernel,
        n * splits * tiles,
        aligned_like(x, grad),
        x,
        aligned_like(x, y) if active else None,
        masked_grad if active else None,
        channel_gate.contiguous(),
        logits,
        *norm,
        tile_sums,
        split_sums,
        ticket,
        c,
        pixels,
        tiles,
        eps,
        configuration=plan,
        **plan.tile(shape),
        ACTIVATION=activation,
        NUM_STAGES=plan.num_stages,
    )
    plan = configuration("finish_reduce_kernel", shape)
    channel_programs = triton.cdiv(n * c, plan.block_p) if tiles > 1 else 0
    pixel_programs = triton.cdiv(n * pixels, plan.block_p) if spatial else 0
    launch(
        finish_reduce_kernel,
        channel_programs + pixel_programs,
        tile_sums,
        split_sums,
        logits,
        *norm,
        channel_sums,
        norm_grad,
        norm_sums,
        channel_gate.new_empty([2, pixel_programs]),
        ticket,
        n,
        c,
        pixels,
        tiles,
        splits,
        channel_programs,
        pixel_programs,
        eps,
        configuration=plan,
        COMPUTE=shape.constants()["COMPUTE"],
        BLOCK=plan.block_p,
        BLOCK_TILES=min(triton.next_power_of_2(tiles), 16),
        BLOCK_SPLITS=min(triton.next_power_of_2(splits), 16),
    )
    return results
