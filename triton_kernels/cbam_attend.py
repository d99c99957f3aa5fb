"""cbam_attend, phase 1 of the gate: Mc and the pooled maps, then

    logits z = conv(pooled) [N, H, W]; with batch statistics, the mean and variance of z over N H W

x [N, C, H, W] any float; small tensors in the compute dtype, ties int32.
Traffic: x twice (`pool_pixels`, `gate_pool_channels`); `logits_kernel` reads the pooled maps only.

Three launches; for small samples two, `sample` in place of the first two, and x once.
`logits_kernel`: one program per sample and tile of pixels. With batch statistics the last program
to finish combines those of all tiles, and updates the running ones.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from cbam_fused.reference_gates import compute_dtype
from cbam_fused.triton_kernels.configurations import configuration, whole_sample
from cbam_fused.triton_kernels.gate_pool_channels import gate_pool_channels
from cbam_fused.triton_kernels.geometry import Geometry, geometry
from cbam_fused.triton_kernels.launch import aligned, launch
from cbam_fused.triton_kernels.pool_pixels import Pool, pool_pixels
from cbam_fused.triton_kernels.primitives import convolve, divide, is_last
from cbam_fused.triton_kernels.sample import attend_sample


@triton.jit
def _combine_splits(
    pooled_splits_ptr, ties_splits_ptr, pixel, live, pixels, splits, TIES: tl.constexpr
):
    """Maximum, sum and ties at ``pixel`` over all splits of one sample, in ascending order."""
    source = pooled_splits_ptr + pixel
    best = tl.load(source, mask=live, other=0.0)
    total = tl.load(source + pixels, mask=live, other=0.0)
    tie = tl.zeros_like(pixel)
    if TIES != "none":
        tie = tl.load(ties_splits_ptr + pixel, mask=live, other=0)
    for split in tl.range(1, splits):
        value = tl.load(source + split * 2 * pixels, mask=live, other=0.0)
        total += tl.load(source + (split * 2 + 1) * pixels, mask=live, other=0.0)
        if TIES != "none":
            its_tie = tl.load(ties_splits_ptr + split * pixels + pixel, mask=live, other=0)
            if TIES == "even":
                tie += tl.where(value == best, its_tie, 0)
            tie = tl.where((value > best) | ((value != value) & (best == best)), its_tie, tie)
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    return best, total, tie


@triton.jit
def _move_towards(running_ptr, value, momentum):
    """Moves a running statistic, of any float type, towards that of the batch."""
    if running_ptr is not None:
        moved = tl.load(running_ptr).to(tl.float64) * (1.0 - momentum) + value * momentum
        if running_ptr.dtype.element_ty == tl.float64:
            tl.store(running_ptr, moved)
        else:
            single = moved.to(tl.float32)  # no processor rounds float64 to 16 bits
            tl.store(running_ptr, single.to(running_ptr.dtype.element_ty))


@triton.jit
def _combine_statistics(
    partial_statistics_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    n,
    pixels,
    tiles,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Mean and variance of all logits, from the mean and the squared deviations of each tile."""
    programs = n * tiles
    count = n.to(tl.float64) * pixels
    first = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], COMPUTE)
    for start in tl.range(0, programs, BLOCK):
        program = start + first
        size = tl.minimum(pixels - program % tiles * BLOCK_P, BLOCK_P)
        source = partial_statistics_ptr + program * 2
        mean = tl.load(source, mask=program < programs, other=0.0, cache_modifier=".cg")
        sums += mean * size
    total_mean = divide(tl.sum(sums, axis=0), count.to(COMPUTE))
    deviations = tl.zeros([BLOCK], COMPUTE)
    for start in tl.range(0, programs, BLOCK):
        program = start + first
        live = program < programs
        size = tl.minimum(pixels - program % tiles * BLOCK_P, BLOCK_P)
        source = partial_statistics_ptr + program * 2
        mean = tl.load(source, mask=live, other=0.0, cache_modifier=".cg")
        squares = tl.load(source + 1, mask=live, other=0.0, cache_modifier=".cg")
        between = (mean - total_mean) * (mean - total_mean) * size
        deviations += squares + tl.where(live, between, 0.0)
    total = tl.sum(deviations, axis=0)
    tl.store(norm_mean_ptr, total_mean)
    tl.store(norm_var_ptr, divide(total, count.to(COMPUTE)))
    _move_towards(running_mean_ptr, total_mean.to(tl.float64), momentum)
    _move_towards(running_var_ptr, total.to(tl.float64) / (count - 1.0), momentum)


@triton.jit(
    do_not_specialize=["n", "c", "h", "w", "tiles", "splits"],
    do_not_specialize_on_alignment=[
        *("conv_weight_ptr", "conv_bias_ptr", "running_mean_ptr", "running_var_ptr")
    ],
)
def logits_kernel(
    pooled_ptr,  # [N, 2, H, W]; written here if there are several splits
    channel_ties_ptr,  # [N, H, W], likewise; or None
    pooled_splits_ptr,  # [N, splits, 2, H, W], maximum and sum, or None for one split
    ties_splits_ptr,  # [N, splits, H, W] or None
    conv_weight_ptr,  # [M, K, K]
    conv_bias_ptr,  # [1] or None
    logits_ptr,  # [N, H, W]
    partial_statistics_ptr,  # [N, tiles, 2], or None without batch statistics
    norm_mean_ptr,  # [1] or None
    norm_var_ptr,  # [1] or None
    running_mean_ptr,  # [1] or None, as the next
    running_var_ptr,
    ticket_ptr,  # [1], 0 at the start, or None without batch statistics
    momentum: tl.float64,
    n,
    c,
    h,
    w,
    tiles,
    splits,
    K: tl.constexpr,
    LIGHT: tl.constexpr,
    MAX_MAP: tl.constexpr,
    TIES: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_STATISTICS: tl.constexpr,
):
    pixels = h * w
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first_pixel = tl.program_id(0) % tiles * BLOCK_P
    pixel = first_pixel + tl.arange(0, BLOCK_P)
    live = pixel < pixels
    maps_ptr = pooled_ptr + sample * 2 * pixels
    if pooled_splits_ptr is not None:  # then one tile covers the plane
        place = sample * splits * pixels
        its_ties_ptr = ties_splits_ptr
        if TIES != "none":
            its_ties_ptr += place
        splits_ptr = pooled_splits_ptr + 2 * place
        maximum, total, tie = _combine_splits(
            splits_ptr, its_ties_ptr, pixel, live, pixels, splits, TIES
        )
        tl.store(maps_ptr + MAX_MAP * pixels + pixel, maximum, mask=live)
        mean = divide(total, c.to(COMPUTE))
        tl.store(maps_ptr + (1 - MAX_MAP) * pixels + pixel, mean, mask=live)
        if TIES != "none":
            tl.store(channel_ties_ptr + sample * pixels + pixel, tie, mask=live)
        tl.debug_barrier()

    logits = convolve(
        maps_ptr, conv_weight_ptr, conv_bias_ptr, pixel, live, h, w, K, LIGHT, COMPUTE
    )
    tl.store(logits_ptr + sample * pixels + pixel, logits, mask=live)

    if partial_statistics_ptr is not None:
        size = tl.minimum(pixels - first_pixel, BLOCK_P)
        mean = divide(tl.sum(tl.where(live, logits, 0.0), axis=0), size.to(COMPUTE))
        deviation = tl.where(live, logits - mean, 0.0)
        target = partial_statistics_ptr + tl.program_id(0) * 2
        tl.store(target, mean)
        tl.store(target + 1, tl.sum(deviation * deviation, axis=0))
        if is_last(ticket_ptr, n * tiles):
            _combine_statistics(
                partial_statistics_ptr,
                norm_mean_ptr,
                norm_var_ptr,
                running_mean_ptr,
                running_var_ptr,
                momentum,
                n,
                pixels,
                tiles,
                BLOCK_P,
                BLOCK_STATISTICS,
                COMPUTE,
            )


def spatial_logits(
    shape: Geometry,
    pooled,
    channel_ties,
    conv_weight,
    conv_bias,
    maps: str,
    ties: str,
    *,
    ticket=None,
    running=(None, None),
    momentum: float = 0.0,
):
    """(pooled, channel_ties, logits, norm_mean, norm_var) from what `gate_pool_channels` left.

    With a ``ticket``, zeroed, also the batch statistics, and the ``running`` ones are updated.
    """
    n, splits = shape.n, pooled.shape[1]
    plan = configuration("logits_kernel", shape)
    if splits > 1 and plan.tiles(shape) > 1:  # a program convolves only what it has combined itself
        plan = replace(plan, block_p=triton.next_power_of_2(shape.pixels))
    tiles, compute = plan.tiles(shape), pooled.dtype
    if splits > 1:
        all_pooled, all_ties = pooled, channel_ties
        pooled = pooled.new_empty([n, 2, shape.pixels])
        channel_ties = channel_ties.new_empty([n, shape.pixels] if ties != "none" else [0])
    logits = pooled.new_empty([n, shape.h, shape.w])
    statistics = ticket is not None
    norm_mean, norm_var = (pooled.new_empty([1] if statistics else [0]) for _ in range(2))
    if statistics and logits.numel() == 0:
        norm_mean.zero_()
        norm_var.zero_()
    partial_statistics = pooled.new_empty([n, tiles, 2]) if statistics else None
    launch(
        logits_kernel,
        n * tiles,
        pooled,
        channel_ties if ties != "none" and splits > 1 else None,
        all_pooled if splits > 1 else None,
        all_ties if ties != "none" and splits > 1 else None,
        conv_weight.contiguous(),
        conv_bias,
        logits,
        partial_statistics,
        norm_mean if statistics else None,
        norm_var if statistics else None,
        *running,
        ticket,
        momentum,
        n,
        shape.c,
        shape.h,
        shape.w,
        tiles,
        splits,
        configuration=plan,
        K=conv_weight.shape[-1],
        LIGHT=maps == "light",
        MAX_MAP=maximum_map(maps),
        TIES=ties,
        COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
        BLOCK_P=plan.block_p,
        BLOCK_STATISTICS=1024,
    )
    plane = [n, shape.h, shape.w]
    channel_ties = channel_ties.view(plane) if ties != "none" else channel_ties
    return pooled.view(n, 2, shape.h, shape.w), channel_ties, logits, norm_mean, norm_var


def maximum_map(maps: str) -> int:
    """Which of the two pooled maps is the maximum."""
    return 1 if maps == "mean_max" else 0


def cbam_attend(
    x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, conv_weight, conv_bias,
    batch_statistics, running_mean, running_var, momentum, pool, maps, ties,
):  # fmt: skip
    """Phase 1: the channel gate, and the logits of the spatial gate with their statistics."""
    x = aligned(x)
    shape, pools = geometry(x), Pool.parse(pool)
    spatial = conv_weight is not None
    statistics = spatial and batch_statistics
    ticket = x.new_empty([1], dtype=torch.int32) if statistics else None
    mlp = (mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2)
    plan = whole_sample(shape, mlp_weight2.numel())
    if plan is not None:
        descriptors, pixel_ties, gated = attend_sample(
            *(plan, x, mlp, pools, maximum_map(maps), ties, ticket), spatial=spatial
        )
    else:
        pooled_pixels = pool_pixels(x, mlp_weight1, mlp_weight2, pools, ties, ticket)
        descriptors, pixel_ties = pooled_pixels.descriptors, pooled_pixels.pixel_ties
        gated = gate_pool_channels(
            *(x, pooled_pixels.partial_products, *mlp[1:], pools, maximum_map(maps), ties),
            hidden_layer=mlp_weight1 is not None,
            spatial=spatial,
            keep_hidden=True,
        )
    if spatial:
        results = spatial_logits(
            shape,
            gated.pooled,
            gated.channel_ties,
            conv_weight,
            conv_bias,
            maps,
            ties,
            ticket=ticket,
            running=(running_mean, running_var) if statistics else (None, None),
            momentum=momentum,
        )
    else:
        empty = [x.new_empty([0], dtype=compute_dtype(x.dtype)) for _ in range(4)]
        results = (empty[0], gated.channel_ties, *empty[1:])
    return (
        gated.channel_gate,
        descriptors,
        gated.hidden,
        pixel_ties,
        *results,
    )
