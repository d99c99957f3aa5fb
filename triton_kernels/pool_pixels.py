"""pool_pixels: x pooled over H*W, and the MLP's first layer as far as each block of channels goes.

Descriptors [N, P, C]; pixel_ties [N, C]; the products of each channel block's descriptors with the
first layer's weight, [N, channel blocks, B, R], which `gate_pool_channels` adds up.
Traffic: x once.
One program per channel block and group of samples; a group shares the weights that are loaded.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbam_fused.reference_gates import compute_dtype
from cbam_fused.triton_kernels.configurations import configuration
from cbam_fused.triton_kernels.launch import geometry, launch, rows_per_step
from cbam_fused.triton_kernels.primitives import (
    aligned_shape,
    divide,
    reduce_maximum,
    square_root,
    tile_offsets,
    update_maximum,
)


@triton.jit
def _store_product(product_ptr, value, weight, live):
    """The product of ``value`` [samples, channels] and ``weight`` [outputs, channels]."""
    product = tl.sum(value[:, None, :] * weight[None, :, :], axis=2)
    tl.store(product_ptr, product, mask=live)


@triton.jit(
    do_not_specialize=["n", "c", "pixels", "outputs"],
    do_not_specialize_on_alignment=["weight_ptr"],
)
def pool_pixels_kernel(
    x_ptr,  # [N, C, HW], or [N, HW, C] if CHANNELS_LAST
    weight_ptr,  # [outputs, C]: mlp_weight1, or mlp_weight2 where that is absent
    descriptors_ptr,  # [N, P, C]
    pixel_ties_ptr,  # [N, C] or None
    partial_products_ptr,  # [N, channel blocks, B, outputs]
    ticket_ptr,  # [1], zeroed for a later launch, or None
    n,
    c,
    pixels,
    outputs,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    AVG: tl.constexpr,
    MAX: tl.constexpr,
    LP: tl.constexpr,
    LSE: tl.constexpr,
    LIGHT: tl.constexpr,
    HIDDEN: tl.constexpr,
    TIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    c, pixels = aligned_shape(c, pixels, CHANNELS_LAST, ALIGN)
    blocks = tl.cdiv(c, BLOCK_C)
    block = tl.program_id(0) % blocks
    first_sample = tl.program_id(0) // blocks * BLOCK_N
    if ticket_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(ticket_ptr, 0)

    sample = tl.arange(0, BLOCK_N)[:, None, None]
    channel = (block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :, None]
    first_pixel = tl.arange(0, BLOCK_P)[None, None, :]
    live_rows = (first_sample + sample < n) & (channel < c)
    source = x_ptr + first_sample.to(tl.int64) * c * pixels
    total = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], COMPUTE)
    squares = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], COMPUTE)
    exponentials = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], COMPUTE)  # of x - best
    best = tl.full([BLOCK_N, BLOCK_C, BLOCK_P], float("-inf"), COMPUTE)
    tie = tl.zeros([BLOCK_N, BLOCK_C, BLOCK_P], tl.int32)
    if TIES == "first":
        tie += first_pixel
    for start in tl.range(0, pixels, BLOCK_P, num_stages=NUM_STAGES):
        pixel = start + first_pixel
        live = live_rows & (pixel < pixels)
        offsets = tile_offsets(channel, pixel, c, pixels, CHANNELS_LAST, WIDE)
        value = tl.load(source + (sample * (c * pixels) + offsets), mask=live, other=0.0)
        value = value.to(COMPUTE)
        if AVG:
            total += value
        if LP:
            squares += value * value
        if MAX or LSE:
            value = tl.where(live, value, float("-inf"))
            previous = best
            best, tie = update_maximum(best, tie, value, pixel, live, TIES)
            if LSE:
                shift = tl.where(best == float("-inf"), 0.0, best)
                exponentials = exponentials * tl.exp(previous - shift) + tl.exp(value - shift)

    # Everything [BLOCK_N, BLOCK_C] from here on.
    sample = first_sample + tl.arange(0, BLOCK_N)[:, None]
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    live = (sample < n) & (channel < c)
    POOLS: tl.constexpr = AVG + MAX + LP + LSE
    descriptor = descriptors_ptr + sample.to(tl.int64) * POOLS * c + channel
    average = tl.zeros([BLOCK_N, BLOCK_C], COMPUTE)
    maximum, norm, log_sum = average, average, average
    if AVG:
        average = divide(tl.sum(total, axis=2), pixels.to(COMPUTE))
        tl.store(descriptor, average, mask=live)
        average = tl.where(live, average, 0.0)
    if MAX or LSE:
        maximum, tied = reduce_maximum(best, tie, 2, TIES)
        if LSE:
            weights = tl.exp(best - maximum[:, :, None])
            log_sum = maximum + tl.log(tl.sum(exponentials * weights, axis=2))
            tl.store(descriptor + (AVG + MAX + LP) * c, log_sum, mask=live)
            log_sum = tl.where(live, log_sum, 0.0)
        if MAX:
            tl.store(descriptor + AVG * c, maximum, mask=live)
            if TIES != "none":
                tl.store(pixel_ties_ptr + sample.to(tl.int64) * c + channel, tied, mask=live)
        maximum = tl.where(live, maximum, 0.0)
    if LP:
        norm = square_root(tl.sum(squares, axis=2))
        tl.store(descriptor + (AVG + MAX) * c, norm, mask=live)
        norm = tl.where(live, norm, 0.0)

    mixed = average
    if LIGHT:
        mixed = 0.5 * average + 0.5 * maximum
    elif not HIDDEN:
        if MAX:
            mixed += maximum
        if LP:
            mixed += norm
        if LSE:
            mixed += log_sum
    BRANCHES: tl.constexpr = 1 if LIGHT or not HIDDEN else POOLS
    sample_stride = blocks.to(tl.int64) * BRANCHES * outputs
    for start in tl.range(0, outputs, BLOCK_R):
        output = start + tl.arange(0, BLOCK_R)
        weight_at = output[:, None].to(tl.int64) * c + channel
        weight_live = (output[:, None] < outputs) & (channel < c)
        weight = tl.load(weight_ptr + weight_at, mask=weight_live, other=0.0).to(COMPUTE)
        product_live = (sample < n) & (output[None, :] < outputs)
        product = partial_products_ptr + block.to(tl.int64) * BRANCHES * outputs
        product += sample * sample_stride + output[None, :]
        if LIGHT or not HIDDEN:
            _store_product(product, mixed, weight, product_live)
        else:
            if AVG:
                _store_product(product, average, weight, product_live)
            if MAX:
                _store_product(product + AVG * outputs, maximum, weight, product_live)
            if LP:
                _store_product(product + (AVG + MAX) * outputs, norm, weight, product_live)
            if LSE:
                at = product + (AVG + MAX + LP) * outputs
                _store_product(at, log_sum, weight, product_live)


class Pool(NamedTuple):
    """What is pooled over H*W: `cbam_fused.schemas`' pool, in parts."""

    avg: bool
    max: bool
    lp: bool
    lse: bool
    light: bool

    @classmethod
    def parse(cls, pool: str) -> "Pool":
        if pool == "light":
            return cls(True, True, False, False, True)
        return cls(*(kind in pool.split("+") for kind in ("avg", "max", "lp", "lse")), False)

    @property
    def descriptors(self) -> int:
        return self.avg + self.max + self.lp + self.lse

    @property
    def branches(self) -> int:
        return 1 if self.light else self.descriptors

    def constants(self) -> dict[str, bool]:
        """The compile-time arguments of a kernel that pools."""
        return {field.upper(): value for field, value in self._asdict().items()}


class Pooled(NamedTuple):
    """What the pass leaves for the next ones."""

    descriptors: Tensor  # [N, P, C]
    pixel_ties: Tensor  # [N, C], [0] without a maximum or without ties
    partial_products: Tensor  # [N, channel blocks, B, R], or [N, channel blocks, 1, C]


def pool_pixels(
    x: Tensor,
    mlp_weight1: Tensor | None,
    mlp_weight2: Tensor,
    pool: Pool,
    ties: str,
    ticket: Tensor | None,
) -> Pooled:
    """Pools x, which is aligned; zeroes ``ticket``. Without a first layer the products are those of
    the second with the sum of the branches.
    """
    shape = geometry(x)
    hidden = mlp_weight1 is not None
    weight = mlp_weight1 if hidden else mlp_weight2
    outputs = weight.shape[0]
    plan = configuration("pool_pixels_kernel", shape)
    blocks = triton.cdiv(shape.c, plan.block_c)
    compute = compute_dtype(x.dtype)
    ties = ties if pool.max else "none"
    descriptors = x.new_empty([shape.n, pool.descriptors, shape.c], dtype=compute)
    pixel_ties = x.new_empty([shape.n, shape.c] if ties != "none" else [0], dtype=torch.int32)
    branches = pool.branches if hidden else 1
    partial_products = x.new_empty([shape.n, blocks, branches, outputs], dtype=compute)
    launch(
        pool_pixels_kernel,
        plan.groups(shape) * blocks,
        x,
        weight.contiguous(),
        descriptors,
        pixel_ties if ties != "none" else None,
        partial_products,
        ticket,
        shape.n,
        shape.c,
        shape.pixels,
        outputs,
        configuration=plan,
        **shape.constants(),
        **pool.constants(),
        HIDDEN=hidden,
        TIES=ties,
        BLOCK_N=plan.block_n,
        BLOCK_C=plan.block_c,
        BLOCK_P=plan.block_p,
        BLOCK_R=rows_per_step(outputs, plan.block_n * plan.block_c, plan.num_warps),
        NUM_STAGES=plan.num_stages,
    )
    return Pooled(descriptors, pixel_ties, partial_products)
