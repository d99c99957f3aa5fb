"""Device functions that several kernels share.

Values are cast to COMPUTE, float32 or float64, right after they are loaded. Tiles of x are
[samples, channels, pixels]; 'live' is the mask of what lies inside.
"""

import triton
import triton.language as tl

# Arguments of a kernel that are parameters: their addresses may be any, and no kernel is compiled
# for those that are a multiple of 16.
NORM = ["norm_weight_ptr", "norm_bias_ptr", "norm_mean_ptr", "norm_var_ptr"]


@triton.jit
def multiple(value, DIVISOR: tl.constexpr):
    """``value``, which DIVISOR divides, in a form that tells the compiler so."""
    return value // DIVISOR * DIVISOR


@triton.jit
def aligned_shape(c, pixels, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """(c, pixels), the one that is the length of a row known to be a multiple of ALIGN."""
    if CHANNELS_LAST:
        c = multiple(c, ALIGN)
    else:
        pixels = multiple(pixels, ALIGN)
    return c, pixels


@triton.jit
def tile_offsets(channel, pixel, c, pixels, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets in one sample of x at ``channel`` and ``pixel``, two tensors that broadcast."""
    if WIDE:
        channel, pixel = channel.to(tl.int64), pixel.to(tl.int64)
    if CHANNELS_LAST:
        offsets = pixel * c + channel
    else:
        offsets = channel * pixels + pixel
    return offsets


@triton.jit
def divide(numerator, denominator):
    """The quotient, rounded once."""
    if numerator.dtype == tl.float32:
        quotient = tl.div_rn(numerator, denominator.to(tl.float32))
    else:
        quotient = numerator / denominator
    return quotient


@triton.jit
def square_root(value):
    """The square root, rounded once."""
    if value.dtype == tl.float32:
        root = tl.sqrt_rn(value)
    else:
        root = tl.sqrt(value)
    return root


@triton.jit
def sigmoid(value):
    exponential = 1.0 + tl.exp(-value)
    return divide(tl.full(value.shape, 1.0, value.dtype), exponential)


# Maxima. NaN is the largest value, as in PyTorch, and the first NaN the first maximum. TIES says
# what is kept beside a maximum: "first", its first index; "even", the number of its places; "none".


@triton.jit
def update_maximum(best, tie, value, index, live, TIES: tl.constexpr):
    """``best`` and ``tie`` after ``value`` at ``index``; value is -inf where not live.

    They begin as -inf, and the lowest index ("first") or 0.
    """
    if TIES == "first":
        larger = (value > best) | ((value != value) & (best == best))
        best, tie = tl.where(larger, value, best), tl.where(larger, index, tie)
    elif TIES == "even":
        tie = tl.where(value > best, 1, tie + ((value == best) & live).to(tl.int32))
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    else:
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    return best, tie


@triton.jit
def _swap_order(bits):
    """Bits of a float <-> an integer in the same order."""
    if bits.dtype == tl.int64:
        swapped = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        swapped = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return swapped


@triton.jit
def _ordered_key(value):
    """An integer that orders as ``value`` does: both zeros equal, NaN above all."""
    zero_merged = value + 0.0
    if value.dtype == tl.float64:
        key = _swap_order(zero_merged.to(tl.int64, bitcast=True))
        key = tl.where(value != value, 0x7FFFFFFFFFFFFFFF, key)
    else:
        key = _swap_order(zero_merged.to(tl.int32, bitcast=True))
        key = tl.where(value != value, 0x7FFFFFFF, key)
    return key


@triton.jit
def reduce_maximum(best, tie, AXIS: tl.constexpr, TIES: tl.constexpr):
    """The maximum along AXIS of what `update_maximum` gathered, and its tie (0 if "none").

    The built-in reductions drop NaN, so integers are reduced.
    """
    key = _ordered_key(best)
    top = tl.max(key, axis=AXIS)
    maximum = _swap_order(top).to(best.dtype, bitcast=True)
    has_maximum = key == tl.expand_dims(top, AXIS)
    if TIES == "first":
        reduced = tl.min(tl.where(has_maximum, tie, 0x7FFFFFFF), axis=AXIS)
    elif TIES == "even":
        reduced = tl.sum(tl.where(has_maximum, tie, 0), axis=AXIS)
        reduced = tl.where(maximum != maximum, 0, reduced)
    else:
        reduced = tl.zeros_like(top).to(tl.int32)
    return maximum, reduced


@triton.jit
def sum_partials(first_ptr, live, partials, stride, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """The sum of ``partials`` tensors, ``stride`` elements apart, the first at ``first_ptr``.

    first_ptr and live are [samples, elements]; BLOCK partials are loaded together.
    """
    SAMPLES: tl.constexpr = first_ptr.shape[0]
    ELEMENTS: tl.constexpr = first_ptr.shape[1]
    total = tl.zeros([SAMPLES, BLOCK, ELEMENTS], COMPUTE)
    for start in tl.range(0, partials, BLOCK):
        partial = (start + tl.arange(0, BLOCK))[None, :, None]
        source = first_ptr[:, None, :] + partial.to(tl.int64) * stride
        total += tl.load(source, mask=live[:, None, :] & (partial < partials), other=0.0)
    return tl.sum(total, axis=1)


# The spatial gate.


@triton.jit
def convolve(
    maps_ptr,  # [2, H, W], the pooled maps of one sample
    weight_ptr,  # [M, K, K]
    bias_ptr,  # [1] or None
    pixel,
    live,
    h,
    w,
    K: tl.constexpr,
    LIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The logits at ``pixel``, summed in one fixed order, tap by tap. LIGHT: one map, half of each.

    The maps may have been written by this program, before a barrier.
    """
    row = pixel // w
    column = pixel - row * w
    logits = tl.zeros_like(pixel).to(COMPUTE)
    for ky in tl.range(0, K):
        y = row + (ky - K // 2)
        inside_row = live & (y >= 0) & (y < h)
        for kx in tl.static_range(K):
            x = column + (kx - K // 2)
            inside = inside_row & (x >= 0) & (x < w)
            source = maps_ptr + y * w + x
            first = tl.load(source, mask=inside, other=0.0)
            second = tl.load(source + h * w, mask=inside, other=0.0)
            tap = tl.load(weight_ptr + ky * K + kx).to(COMPUTE)
            if LIGHT:
                logits = tl.fma(0.5 * first + 0.5 * second, tap + tl.zeros_like(first), logits)
            else:
                next_tap = tl.load(weight_ptr + (K + ky) * K + kx).to(COMPUTE)
                logits = tl.fma(first, tap + tl.zeros_like(first), logits)
                logits = tl.fma(second, next_tap + tl.zeros_like(first), logits)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr).to(COMPUTE)
    return logits


@triton.jit
def spatial_gate(
    logits,
    norm_weight_ptr,  # [1] or None
    norm_bias_ptr,  # [1] or None
    norm_mean_ptr,  # [1] or None: no norm
    norm_var_ptr,  # [1] or None
    eps,  # float64
    COMPUTE: tl.constexpr,
):
    """Ms = sigmoid(norm(logits)): the norm is folded into a scale and a shift."""
    if norm_mean_ptr is not None:
        scale = inverse_deviation(norm_var_ptr, eps, COMPUTE)
        if norm_weight_ptr is not None:
            scale = tl.load(norm_weight_ptr).to(COMPUTE) * scale
        shift = -tl.load(norm_mean_ptr).to(COMPUTE) * scale
        if norm_bias_ptr is not None:
            shift = tl.load(norm_bias_ptr).to(COMPUTE) + shift
        logits = logits * scale + shift
    return sigmoid(logits)


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """The activation; NaN stays. Rounding before or after it gives the same."""
    if ACTIVATION != "none":
        value = tl.where(value <= 0.0, 0.0, value)
    if ACTIVATION == "relu6":
        value = tl.where(value >= 6.0, 6.0, value)
    return value


# The last program to finish combines what all have written.


@triton.jit
def is_last(ticket_ptr, programs):
    """Whether this program is the last of ``programs`` to come here; counts from a zeroed ticket.

    What any program stored before its call is visible to the last one after it, if loaded with
    ``cache_modifier=".cg"`` (the first-level cache of another multiprocessor may be stale).
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    return last


# The backward of the spatial gate.


@triton.jit
def inverse_deviation(norm_var_ptr, eps, COMPUTE: tl.constexpr):
    """1 / sqrt(var + eps); eps is float64."""
    var = (tl.load(norm_var_ptr).to(tl.float64) + eps).to(COMPUTE)
    return divide(tl.full([], 1.0, COMPUTE), square_root(var))


@triton.jit
def normalise(logits, norm_mean_ptr, norm_var_ptr, eps, COMPUTE: tl.constexpr):
    mean = tl.load(norm_mean_ptr).to(COMPUTE)
    return (logits - mean) * inverse_deviation(norm_var_ptr, eps, COMPUTE)


@triton.jit
def norm_backward(
    norm_grad_ptr,  # [HW]
    logits_ptr,  # [HW]
    pixel,
    live,
    norm_weight_ptr,  # [1] or None
    norm_mean_ptr,  # [1] or None: no norm
    norm_var_ptr,  # [1] or None
    eps,  # float64
    norm_sums_ptr,  # [2], or None: the statistics are constants
    norm_count,
    COMPUTE: tl.constexpr,
):
    """The gradient of the logits at ``pixel``, 0 where not live."""
    grad = tl.load(norm_grad_ptr + pixel, mask=live, other=0.0)
    if norm_mean_ptr is not None:
        scale = inverse_deviation(norm_var_ptr, eps, COMPUTE)
        if norm_sums_ptr is not None:
            count = norm_count.to(COMPUTE)
            logits = tl.load(logits_ptr + pixel, mask=live, other=0.0)
            normalised = (logits - tl.load(norm_mean_ptr).to(COMPUTE)) * scale
            grad -= divide(tl.load(norm_sums_ptr), count)
            grad -= normalised * divide(tl.load(norm_sums_ptr + 1), count)
        if norm_weight_ptr is not None:
            scale = tl.load(norm_weight_ptr).to(COMPUTE) * scale
        grad = tl.where(live, grad * scale, 0.0)
    return grad


@triton.jit
def share_evenly(rest, share, count):
    """The gradients of all places and of each maximum besides, where ``count`` maxima share
    ``share``. A maximum that is NaN counts none, and makes the gradient of all places NaN.
    """
    has_maximum = count > 0
    share = tl.where(has_maximum, divide(share, tl.maximum(count, 1).to(share.dtype)), 0.0)
    return tl.where(has_maximum, rest, float("nan")), share
