"""cbam_backward_input: the second pass of the backward, dx and the parameters' gradients. With dz
the gradient of the logits, ds_max and ds_mean those of the pooled maps, share a maximum's part:

    dz = backward of the norm              ds = transposed convolution of dz
    a[n, c, hw] = ds_mean / C + ds_max share_c              the gradient of u = x * Mc from the maps
    dMc = channel_sums + sum_hw x a        MLP's backward -> the descriptors' gradients
    dx = Mc (g Ms + a) + davg / HW + dmax share_hw + dlp x / lp + dlse exp(x - lse)

Traffic: x and grad once, dx written once; x once more for ties "even", lp or lse.
Four launches: `maps_backward`, the two of `cbam_backward_parameters`, `input_gradient`; the first
and the last have one program per sample, pixel tile and split of the channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbam_fused.triton_kernels.cbam_backward_parameters import parameters_backward
from cbam_fused.triton_kernels.configurations import configuration
from cbam_fused.triton_kernels.geometry import geometry
from cbam_fused.triton_kernels.launch import aligned, aligned_like, launch
from cbam_fused.triton_kernels.pool_pixels import Pool
from cbam_fused.triton_kernels.primitives import (
    NORM,
    aligned_shape,
    divide,
    norm_backward,
    share_evenly,
    spatial_gate,
    tile_offsets,
)

_GATHERED_PER_THREAD = 8  # gradients of logits that a thread of maps_backward loads at a time


@triton.jit(
    do_not_specialize=["n", "c", "h", "w", "tiles", "norm_count"],
    do_not_specialize_on_alignment=[
        *("norm_weight_ptr", "norm_mean_ptr", "norm_var_ptr", "conv_weight_ptr"),
    ],
)
def maps_backward_kernel(
    x_ptr,  # [N, C, HW], or [N, HW, C] if CHANNELS_LAST
    channel_gate_ptr,  # [N, C]
    pooled_ptr,  # [N, 2, HW]
    channel_ties_ptr,  # [N, HW]
    logits_ptr,  # [N, HW]
    norm_grad_ptr,  # [N, HW]
    norm_sums_ptr,  # [2], or None: the norm's statistics are constants
    norm_weight_ptr,  # [1] or None, as the two that follow
    norm_mean_ptr,
    norm_var_ptr,
    conv_weight_ptr,  # [M, K, K]
    pixel_grads_ptr,  # [N, 2, HW], out: ds_mean / C, and ds_max of each maximum
    partial_conv_ptr,  # [N, tiles, M * K * K + 1], out: dz's products with the maps, and its sum
    tile_sums_ptr,  # [N, tiles, C], out: sum_hw x a of each tile
    n,
    c,
    h,
    w,
    tiles,
    norm_count,
    eps: tl.float64,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    LIGHT: tl.constexpr,
    MAX_MAP: tl.constexpr,
    TIES: tl.constexpr,
    K: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    c, pixels = aligned_shape(c, h * w, CHANNELS_LAST, ALIGN)
    splits = tl.cdiv(c, SPLIT_C)
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    first_channel = rest % splits * SPLIT_C
    end_channel = tl.minimum(first_channel + SPLIT_C, c)
    # From the last sample to the first: the last ones are what the pass before left in the cache.
    n = (n - 1 - rest // splits).to(tl.int64)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    live_pixel = pixel < pixels
    norm_grad_ptr += n * pixels
    logits_ptr += n * pixels
    pooled_ptr += 2 * n * pixels

    # Tap t of the convolution led from a pixel to the logit t before it. So one gather of dz serves
    # both the pixel's gradient (times the weights, summed over taps) and the weights' (times the
    # maps, summed over pixels).
    AREA: tl.constexpr = K * K
    TAPS: tl.constexpr = AREA if LIGHT else 2 * AREA
    first_map = tl.load(pooled_ptr + pixel, mask=live_pixel, other=0.0)
    second_map = tl.load(pooled_ptr + pixels + pixel, mask=live_pixel, other=0.0)
    if LIGHT:
        first_map = 0.5 * first_map + 0.5 * second_map
    first_grad = tl.zeros([BLOCK_P], COMPUTE)
    second_grad = tl.zeros([BLOCK_P], COMPUTE)
    partial_conv_ptr += (n * tiles + tile) * (TAPS + 1)
    row = pixel // w
    column = pixel - row * w
    for start in tl.range(0, AREA, BLOCK_TAPS):
        tap = start + tl.arange(0, BLOCK_TAPS)
        live_tap = tap < AREA
        down = tap // K - K // 2
        right = tap % K - K // 2
        source_row = row[None, :] - down[:, None]
        source_column = column[None, :] - right[:, None]
        live = live_tap[:, None] & live_pixel[None, :]
        live = live & (source_row >= 0) & (source_row < h)
        live = live & (source_column >= 0) & (source_column < w)
        place = pixel[None, :] - (down * w + right)[:, None]
        logits_grad = norm_backward(
            norm_grad_ptr, logits_ptr, place, live,
            norm_weight_ptr, norm_mean_ptr, norm_var_ptr, eps, norm_sums_ptr, norm_count, COMPUTE,
        )  # fmt: skip
        weight = tl.load(conv_weight_ptr + tap, mask=live_tap, other=0.0).to(COMPUTE)
        first_grad += tl.sum(logits_grad * weight[:, None], axis=0)
        if first_channel == 0:
            sums = tl.sum(logits_grad * first_map[None, :], axis=1)
            tl.store(partial_conv_ptr + tap, sums, mask=live_tap)
        if not LIGHT:
            weight = tl.load(conv_weight_ptr + AREA + tap, mask=live_tap, other=0.0).to(COMPUTE)
            second_grad += tl.sum(logits_grad * weight[:, None], axis=0)
            if first_channel == 0:
                sums = tl.sum(logits_grad * second_map[None, :], axis=1)
                tl.store(partial_conv_ptr + AREA + tap, sums, mask=live_tap)
    logits_grad = norm_backward(
        norm_grad_ptr, logits_ptr, pixel, live_pixel,
        norm_weight_ptr, norm_mean_ptr, norm_var_ptr, eps, norm_sums_ptr, norm_count, COMPUTE,
    )  # fmt: skip
    if first_channel == 0:
        tl.store(partial_conv_ptr + TAPS, tl.sum(logits_grad, axis=0))

    tie = tl.load(channel_ties_ptr + n * pixels + pixel, mask=live_pixel, other=1)
    if LIGHT:
        mean_grad = 0.5 * first_grad
        max_grad = mean_grad
    elif MAX_MAP == 0:
        mean_grad, max_grad = second_grad, first_grad
    else:
        mean_grad, max_grad = first_grad, second_grad
    mean_grad = divide(mean_grad, c.to(COMPUTE))
    if TIES == "even":
        mean_grad, max_grad = share_evenly(mean_grad, max_grad, tie)
        maximum = tl.load(pooled_ptr + MAX_MAP * pixels + pixel, mask=live_pixel, other=0.0)
    if first_channel == 0:
        target = pixel_grads_ptr + 2 * n * pixels + pixel
        tl.store(target, mean_grad, mask=live_pixel)
        tl.store(target + pixels, max_grad, mask=live_pixel)

    sample = n * c * pixels
    for start in tl.range(first_channel, end_channel, BLOCK_C, num_stages=NUM_STAGES):
        channel = start + tl.arange(0, BLOCK_C)
        live_channel = channel < end_channel
        live = live_channel[:, None] & live_pixel[None, :]
        at = tile_offsets(channel[:, None], pixel[None, :], c, pixels, CHANNELS_LAST, WIDE)
        x = tl.load(x_ptr + sample + at, mask=live, other=0.0).to(COMPUTE)
        if TIES == "first":
            has_maximum = channel[:, None] == tie[None, :]
        else:
            gate = tl.load(channel_gate_ptr + n * c + channel, mask=live_channel, other=0.0)
            has_maximum = x * gate[:, None] == maximum[None, :]
        grad = tl.where(has_maximum, max_grad[None, :], 0.0) + mean_grad[None, :]
        sums = tl.sum(x * grad, axis=1)
        tl.store(tile_sums_ptr + (n * tiles + tile) * c + channel, sums, mask=live_channel)


@triton.jit(do_not_specialize=["c", "pixels", "tiles"], do_not_specialize_on_alignment=NORM)
def input_gradient_kernel(
    grad_ptr,  # [N, C, HW], or [N, HW, C] if CHANNELS_LAST; as x and x_grad
    x_ptr,  # None where no term needs it
    x_grad_ptr,  # out
    channel_gate_ptr,  # [N, C]
    descriptors_ptr,  # [N, P, C]
    branches_grad_ptr,  # [N, GRADS, C]
    pixel_ties_ptr,  # [N, C]
    pooled_ptr,  # [N, 2, HW], or None without a spatial gate, as all the others of it
    channel_ties_ptr,  # [N, HW]
    pixel_grads_ptr,  # [N, 2, HW]: ds_mean / C, and ds_max of each maximum
    logits_ptr,  # [N, HW]
    norm_weight_ptr,  # [1] or None, as the three that follow
    norm_bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    c,
    pixels,
    tiles,
    eps: tl.float64,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    LIGHT: tl.constexpr,
    GRADS: tl.constexpr,  # gradients of a sample: 1 that serves every descriptor, or one of each
    MAX_MAP: tl.constexpr,
    TIES: tl.constexpr,
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

    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    live_pixel = pixel < pixels
    if logits_ptr is not None:
        logits = tl.load(logits_ptr + n * pixels + pixel, mask=live_pixel, other=0.0)
        pixel_gate = spatial_gate(
            logits, norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr, eps, COMPUTE
        )[None, :]
        pixel_grads_ptr += 2 * n * pixels
        mean_grad = tl.load(pixel_grads_ptr + pixel, mask=live_pixel, other=0.0)[None, :]
        max_grad = tl.load(pixel_grads_ptr + pixels + pixel, mask=live_pixel, other=0.0)[None, :]
        if TIES == "first":
            tie = tl.load(channel_ties_ptr + n * pixels + pixel, mask=live_pixel, other=0)
        else:
            maxima_ptr = pooled_ptr + (2 * n + MAX_MAP) * pixels
            maximum = tl.load(maxima_ptr + pixel, mask=live_pixel, other=0.0)

    MAX_AT: tl.constexpr = 1 if AVG else 0
    LP_AT: tl.constexpr = AVG + MAX
    LSE_AT: tl.constexpr = AVG + MAX + LP
    POOLS: tl.constexpr = AVG + MAX + LP + LSE
    FACTOR: tl.constexpr = 0.5 if LIGHT else 1.0
    sample = n * c * pixels
    for start in tl.range(first_channel, end_channel, BLOCK_C, num_stages=NUM_STAGES):
        channel = start + tl.arange(0, BLOCK_C)
        live_channel = channel < end_channel
        live = live_channel[:, None] & live_pixel[None, :]
        at = tile_offsets(channel[:, None], pixel[None, :], c, pixels, CHANNELS_LAST, WIDE)
        total = tl.load(grad_ptr + sample + at, mask=live, other=0.0).to(COMPUTE)
        if x_ptr is not None:
            x = tl.load(x_ptr + sample + at, mask=live, other=0.0).to(COMPUTE)
        gate = tl.load(channel_gate_ptr + n * c + channel, mask=live_channel, other=0.0)[:, None]
        if logits_ptr is not None:
            if TIES == "first":
                has_maximum = channel[:, None] == tie[None, :]
            else:
                has_maximum = x * gate == maximum[None, :]
            total = total * pixel_gate + (tl.where(has_maximum, max_grad, 0.0) + mean_grad)
        total *= gate

        descriptor = descriptors_ptr + n * POOLS * c + channel
        branch_grad = branches_grad_ptr + n * GRADS * c + channel
        if AVG:
            slope = FACTOR * tl.load(branch_grad, mask=live_channel, other=0.0)
            total += divide(slope, pixels.to(COMPUTE))[:, None]
        if MAX:
            slope = tl.load(branch_grad + MAX_AT % GRADS * c, mask=live_channel, other=0.0)
            slope *= FACTOR
            count = tl.load(pixel_ties_ptr + n * c + channel, mask=live_channel, other=1)
            if TIES == "first":
                total += tl.where(pixel[None, :] == count[:, None], slope[:, None], 0.0)
            else:
                rest_slope, slope = share_evenly(tl.zeros_like(slope), slope, count)
                descriptor_max = tl.load(descriptor + MAX_AT * c, mask=live_channel, other=0.0)
                is_maximum = x == descriptor_max[:, None]
                total += tl.where(is_maximum, slope[:, None], rest_slope[:, None])
        if LP:
            slope = tl.load(branch_grad + LP_AT % GRADS * c, mask=live_channel, other=0.0)
            norm = tl.load(descriptor + LP_AT * c, mask=live_channel, other=0.0)
            nonzero = tl.where(norm == 0.0, 1.0, norm)
            slope = tl.where(norm == 0.0, 0.0, divide(slope, nonzero))
            total += slope[:, None] * x
        if LSE:
            slope = tl.load(branch_grad + LSE_AT % GRADS * c, mask=live_channel, other=0.0)
            log_sum = tl.load(descriptor + LSE_AT * c, mask=live_channel, other=0.0)
            total += slope[:, None] * tl.exp(x - log_sum[:, None])
        tl.store(x_grad_ptr + sample + at, total, mask=live)


def cbam_backward_input(
    grad: Tensor,
    x: Tensor,
    channel_gate: Tensor,
    descriptors: Tensor,
    hidden: Tensor,
    pixel_ties: Tensor,
    pooled: Tensor,
    channel_ties: Tensor,
    logits: Tensor | None,
    channel_sums: Tensor,
    norm_grad: Tensor | None,
    norm_sums: Tensor | None,
    norm_count: int,
    mlp_weight1: Tensor | None,
    mlp_weight2: Tensor,
    conv_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    pool: str,
    maps: str,
    ties: str,
) -> tuple[Tensor, ...]:
    """x_grad and the gradients of the MLP's and the convolution's weights and biases: see
    `cbam_fused.schemas`.
    """
    x = aligned(x)
    shape = geometry(x)
    n, c, pixels = shape.n, shape.c, shape.pixels
    pools = Pool.parse(pool)
    spatial = logits is not None
    channel_gate, descriptors = channel_gate.contiguous(), descriptors.contiguous()
    pixel_ties, pooled, channel_ties = (t.contiguous() for t in (pixel_ties, pooled, channel_ties))
    logits = logits.contiguous() if spatial else None
    x_grad = torch.empty_like(x)
    max_map = 1 if maps == "mean_max" else 0

    tile_sums = pixel_grads = partial_conv = None
    if spatial:
        plan = configuration("maps_backward_kernel", shape)
        tiles = plan.tiles(shape)
        tile_sums = channel_gate.new_empty([n, tiles, c])
        pixel_grads = channel_gate.new_empty([n, 2, pixels])
        partial_conv = channel_gate.new_empty([n, tiles, conv_weight.numel() + 1])
        size = conv_weight.shape[3]
        gathered = 32 * plan.num_warps * _GATHERED_PER_THREAD
        launch(
            maps_backward_kernel,
            n * plan.splits(shape) * tiles,
            x,
            channel_gate,
            pooled,
            channel_ties,
            logits,
            norm_grad.contiguous(),
            norm_sums,
            norm_weight,
            norm_mean,
            norm_var,
            conv_weight.contiguous(),
            pixel_grads,
            partial_conv,
            tile_sums,
            n,
            c,
            shape.h,
            shape.w,
            tiles,
            norm_count,
            eps,
            configuration=plan,
            **plan.tile(shape),
            LIGHT=maps == "light",
            MAX_MAP=max_map,
            TIES=ties,
            K=size,
            BLOCK_TAPS=min(triton.next_power_of_2(size * size), gathered // plan.block_p),
            NUM_STAGES=plan.num_stages,
        )
    branches_grad, *parameter_grads = parameters_backward(
        shape,
        pools,
        channel_sums.contiguous(),
        tile_sums,
        partial_conv,
        channel_gate,
        descriptors,
        hidden.contiguous(),
        mlp_weight1,
        mlp_weight2,
        conv_weight,
    )
    plan = configuration("input_gradient_kernel", shape)
    tiles = plan.tiles(shape)
    reads_x = pools.lp or pools.lse or (ties == "even" and (pools.max or spatial))
    launch(
        input_gradient_kernel,
        n * plan.splits(shape) * tiles,
        aligned_like(x, grad),
        x if reads_x else None,
        x_grad,
        channel_gate,
        descriptors,
        branches_grad,
        pixel_ties,
        pooled if spatial else None,
        channel_ties,
        pixel_grads,
        logits,
        norm_weight,
        norm_bias,
        norm_mean,
        norm_var,
        c,
        pixels,
        tiles,
        eps,
        configuration=plan,
        **plan.tile(shape),
        AVG=pools.avg,
        MAX=pools.max,
        LP=pools.lp,
        LSE=pools.lse,
        LIGHT=pools.light,
        GRADS=branches_grad.shape[1],
        MAX_MAP=max_map,
        TIES=ties,
        NUM_STAGES=plan.num_stages,
    )
    return x_grad, *parameter_grads
