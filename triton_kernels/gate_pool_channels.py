"""gate_pool_channels: Mc = sigmoid(MLP(descriptors)) [N, C], and u = x * Mc pooled over C.

pooled [N, 2, HW], maximum and mean of u; channel_ties [N, HW]; hidden [N, B, R].
Traffic: x once (not at all without a spatial gate).
One program per pixel tile, range of channels and group of samples; a group shares the weights
that are loaded. Each program first computes the gates that it needs. Several ranges, where a plane
has few pixels, leave their maxima and sums to `spatial_logits`.
Samples are walked from the last to the first: those are what `pool_pixels` left in the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbam_fused.reference_gates import compute_dtype
from cbam_fused.triton_kernels.configurations import configuration
from cbam_fused.triton_kernels.launch import geometry, launch, rows_per_step
from cbam_fused.triton_kernels.pool_pixels import Pool
from cbam_fused.triton_kernels.primitives import (
    aligned_shape,
    divide,
    reduce_maximum,
    sigmoid,
    sum_partials,
    tile_offsets,
    update_maximum,
)


@triton.jit(
    do_not_specialize=["n", "c", "pixels", "reduced", "tiles", "blocks"],
    do_not_specialize_on_alignment=["bias1_ptr", "weight2_ptr", "bias2_ptr"],
)
def gate_pool_channels_kernel(
    x_ptr,  # [N, C, HW], or [N, HW, C] if CHANNELS_LAST
    partial_products_ptr,  # [N, channel blocks, B, R], or [N, channel blocks, C] if not HIDDEN
    bias1_ptr,  # [R] or None
    weight2_ptr,  # [C, R], or None if not HIDDEN
    bias2_ptr,  # [C] or None
    hidden_ptr,  # [N, B, R] or None
    channel_gate_ptr,  # [N, C]
    scratch_ptr,  # [programs, BLOCK_N * (R + part)]
    pooled_ptr,  # [N, 2, HW], or [N, splits, 2, HW]: maximum and sum of each split; or None
    channel_ties_ptr,  # [N, HW], or [N, splits, HW]; or None
    n,
    c,
    pixels,
    reduced,
    tiles,
    blocks,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BRANCHES: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr,
    MAX_MAP: tl.constexpr,
    TIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT_C: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_GATE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    c, pixels = aligned_shape(c, pixels, CHANNELS_LAST, ALIGN)
    splits = tl.cdiv(c, SPLIT_C)
    width = tl.minimum(c, SPLIT_C)
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    first_channel = rest % splits * SPLIT_C
    end_channel = tl.minimum(first_channel + width, c)
    first_sample = (tl.cdiv(n, BLOCK_N) - 1 - rest // splits) * BLOCK_N

    index = tl.arange(0, BLOCK_N)[:, None]
    sample = first_sample + index
    live_sample = sample < n
    own_hidden_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * BLOCK_N * (reduced + width)
    own_gate_ptr = own_hidden_ptr + BLOCK_N * reduced

    if HIDDEN:
        partials = partial_products_ptr + sample.to(tl.int64) * blocks * BRANCHES * reduced
        for start in tl.range(0, reduced, BLOCK_R):
            unit = start + tl.arange(0, BLOCK_R)[None, :]
            live = live_sample & (unit < reduced)
            total = tl.zeros([BLOCK_N, BLOCK_R], COMPUTE)
            for branch in tl.static_range(BRANCHES):
                source = partials + branch * reduced + unit
                stride = BRANCHES * reduced
                hidden = sum_partials(source, live, blocks, stride, BLOCK_PARTIAL, COMPUTE)
                if bias1_ptr is not None:
                    bias = tl.load(bias1_ptr + unit, mask=unit < reduced, other=0.0)
                    hidden += bias.to(COMPUTE)
                hidden = tl.where(hidden <= 0.0, 0.0, hidden)
                total += hidden
                if hidden_ptr is not None:
                    target = hidden_ptr + (sample.to(tl.int64) * BRANCHES + branch) * reduced
                    if tile + first_channel == 0:
                        tl.store(target + unit, hidden, mask=live)
            tl.store(own_hidden_ptr + index * reduced + unit, total, mask=live)
        tl.debug_barrier()

    for start in tl.range(first_channel, end_channel, BLOCK_GATE):
        channel = start + tl.arange(0, BLOCK_GATE)[None, :]
        live = live_sample & (channel < end_channel)
        if HIDDEN:
            logits = tl.zeros([BLOCK_N, BLOCK_GATE], COMPUTE)
            row = weight2_ptr + tl.trans(channel).to(tl.int64) * reduced
            for first_unit in tl.range(0, reduced, BLOCK_R):
                unit = first_unit + tl.arange(0, BLOCK_R)[None, :]
                hidden_live = live_sample & (unit < reduced)
                hidden = tl.load(own_hidden_ptr + index * reduced + unit, hidden_live, other=0.0)
                weight_live = (tl.trans(channel) < end_channel) & (unit < reduced)
                weight = tl.load(row + unit, mask=weight_live, other=0.0).to(COMPUTE)
                logits += tl.sum(hidden[:, None, :] * weight[None, :, :], axis=2)
        else:
            source = partial_products_ptr + sample.to(tl.int64) * blocks * c + channel
            logits = sum_partials(source, live, blocks, c, BLOCK_PARTIAL, COMPUTE)
        if bias2_ptr is not None:
            bias = tl.load(bias2_ptr + channel, mask=channel < end_channel, other=0.0)
            logits += BRANCHES * bias.to(COMPUTE)
        gate = sigmoid(logits)
        tl.store(own_gate_ptr + index * width + (channel - first_channel), gate, mask=live)
        target = channel_gate_ptr + sample.to(tl.int64) * c + channel
        if tile == 0:
            tl.store(target, gate, mask=live)

    if pooled_ptr is not None:
        tl.debug_barrier()
        sample = tl.arange(0, BLOCK_N)[:, None, None]
        pixel = (tile * BLOCK_P + tl.arange(0, BLOCK_P))[None, None, :]
        first_index = (first_channel + tl.arange(0, BLOCK_C))[None, :, None]
        live_columns = (first_sample + sample < n) & (pixel < pixels)
        source = x_ptr + first_sample.to(tl.int64) * c * pixels
        total = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], COMPUTE)
        best = tl.full([BLOCK_N, BLOCK_C, BLOCK_P], float("-inf"), COMPUTE)
        tie = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], tl.int32)
        if TIES == "first":
            tie += first_index
        for start in tl.range(0, end_channel - first_channel, BLOCK_C, num_stages=NUM_STAGES):
            channel = start + first_index
            live = live_columns & (channel < end_channel)
            offsets = tile_offsets(channel, pixel, c, pixels, CHANNELS_LAST, WIDE)
            value = tl.load(source + (sample * (c * pixels) + offsets), mask=live, other=0.0)
            gate_at = own_gate_ptr + sample * width + (channel - first_channel)
            gate_live = (first_sample + sample < n) & (channel < end_channel)
            gated = value.to(COMPUTE) * tl.load(gate_at, mask=gate_live, other=0.0)
            total += gated
            gated = tl.where(live, gated, float("-inf"))
            best, tie = update_maximum(best, tie, gated, channel, live, TIES)

        # Everything [BLOCK_N, BLOCK_P] from here on.
        sample = first_sample + tl.arange(0, BLOCK_N)[:, None]
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        live = (sample < n) & (pixel < pixels)
        place = sample.to(tl.int64) * splits + first_channel // SPLIT_C
        mean = tl.sum(total, axis=1)
        if SINGLE_SPLIT:
            mean = divide(mean, c.to(COMPUTE))
        maximum, tied = reduce_maximum(best, tie, 1, TIES)
        target = pooled_ptr + place * 2 * pixels + pixel
        tl.store(target + MAX_MAP * pixels, maximum, mask=live)
        tl.store(target + (1 - MAX_MAP) * pixels, mean, mask=live)
        if TIES != "none":
            tl.store(channel_ties_ptr + place * pixels + pixel, tied, mask=live)


class Gated(NamedTuple):
    """What the pass leaves for the next ones."""

    channel_gate: Tensor  # [N, C]
    hidden: Tensor  # [N, B, R], or [0] if not asked for
    pooled: Tensor  # [N, splits, 2, HW]; of one part maximum and mean, of several maximum and sum
    channel_ties: Tensor  # [N, splits, HW] or [0]


def gate_pool_channels(
    x: Tensor,
    partial_products: Tensor,
    mlp_bias1: Tensor | None,
    mlp_weight2: Tensor,
    mlp_bias2: Tensor | None,
    pool: Pool,
    max_map: int,
    ties: str,
    *,
    hidden_layer: bool,
    spatial: bool,
    keep_hidden: bool,
) -> Gated:
    """The channel gate and, if ``spatial``, x * Mc pooled over C, from `pool_pixels`' products.

    x is aligned. max_map: which of the two pooled maps is the maximum, 0 or 1.
    """
    shape = geometry(x)
    n, c, pixels = shape.n, shape.c, shape.pixels
    plan = configuration("gate_pool_channels_kernel", shape)
    tiles, splits = plan.tiles(shape) if spatial else 1, plan.splits(shape)
    programs = plan.groups(shape) * splits * tiles
    reduced = partial_products.shape[3] if hidden_layer else 0
    compute, branches = compute_dtype(x.dtype), pool.branches
    ties = ties if spatial else "none"

    channel_gate = x.new_empty([n, c], dtype=compute)
    hidden = x.new_empty([n, branches, reduced] if keep_hidden else [0], dtype=compute)
    pooled = x.new_empty([n, splits, 2, pixels] if spatial else [0], dtype=compute)
    channel_ties = x.new_empty([n, splits, pixels] if ties != "none" else [0], dtype=torch.int32)
    width = min(c, plan.split_c)
    scratch = x.new_empty([programs, plan.block_n * (reduced + width)], dtype=compute)
    block_partial = min(triton.next_power_of_2(partial_products.shape[1]), 32)
    block_r = rows_per_step(reduced, plan.block_n * block_partial, plan.num_warps)
    step = plan.block_n * (block_r if hidden_layer else block_partial)
    launch(
        gate_pool_channels_kernel,
        programs,
        x,
        partial_products,
        mlp_bias1,
        mlp_weight2.contiguous() if hidden_layer else None,
        mlp_bias2,
        hidden if keep_hidden and hidden_layer else None,
        channel_gate,
        scratch,
        pooled if spatial else None,
        channel_ties if ties != "none" else None,
        n,
        c,
        pixels,
        reduced,
        tiles,
        partial_products.shape[1],
        configuration=plan,
        **plan.tile(shape),
        HIDDEN=hidden_layer,
        BRANCHES=branches,
        SINGLE_SPLIT=splits == 1,
        MAX_MAP=max_map if splits == 1 else 0,
        TIES=ties,
        BLOCK_N=plan.block_n,
        BLOCK_PARTIAL=block_partial,
        BLOCK_R=block_r,
        BLOCK_GATE=rows_per_step(width, step, plan.num_warps),
        NUM_STAGES=plan.num_stages,
    )
    return Gated(channel_gate, hidden, pooled, channel_ties)
