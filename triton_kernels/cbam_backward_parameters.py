"""The small kernels of cbam_backward_input: the MLP's backward, and all parameter gradients.

With dMc [N, C] the gradient of the channel gate and B branches, dg = dMc Mc (1 - Mc) and

    total_grad = dg W2                        the gradient of the sum of the branches' hidden units
    hidden_grad[b] = total_grad where hidden[b] > 0, else 0
    branches_grad[b] = hidden_grad[b] W1
    dW2 = dg^T sum_b hidden[b]                db2 = B sum_n dg
    dW1 = sum_b hidden_grad[b]^T branch[b]    db1 = sum_n,b hidden_grad[b]

Without a first layer total_grad is the gradient of every branch, and dW2 = dg^T sum_b branch[b].
A branch is one descriptor, or 0.5 avg + 0.5 max for pool="light".

Traffic: no x-sized tensor.
Two launches: `gate_backward`, one program per group of samples and block of W2's columns, and
`parameter_gradients`, whose programs each make a block of one of the results.
"""

import triton
import triton.language as tl
from torch import Tensor

from cbam_fused.triton_kernels.configurations import configuration
from cbam_fused.triton_kernels.geometry import Geometry
from cbam_fused.triton_kernels.launch import launch
from cbam_fused.triton_kernels.pool_pixels import Pool
from cbam_fused.triton_kernels.primitives import sum_partials

_COLUMNS = 16  # of W2 that a program of gate_backward multiplies with
_OUTER = {"BLOCK_V": 32, "BLOCK_I": 4, "BLOCK_J": 32}  # vectors, rows and columns of a weight
_BRANCHES = {"VECTORS": 4, "BLOCK_R": 32, "BLOCK_C": 32}  # of a block of branches_grad
_CONVOLUTION = {"BLOCK_PARTIALS": 256, "BLOCK_TAPS": 16}


@triton.jit(
    do_not_specialize=["n", "c", "width", "tiles"],
    do_not_specialize_on_alignment=["mlp_weight2_ptr"],
)
def gate_backward_kernel(
    channel_sums_ptr,  # [N, C]
    tile_sums_ptr,  # [N, tiles, C], or None without a spatial gate
    channel_gate_ptr,  # [N, C]
    mlp_weight2_ptr,  # [C, WIDTH]
    gate_logits_grad_ptr,  # [N, C], out: dg
    total_grad_ptr,  # [N, WIDTH], out
    n,
    c,
    width,
    tiles,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    # dg is computed again for every block of columns, and stored by the first.
    column_blocks = tl.cdiv(width, BLOCK_R)
    column = tl.program_id(0) % column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    sample = tl.program_id(0) // column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    sample = sample.to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_R], COMPUTE)
    for start in tl.range(0, c, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)[None, :]
        live = (sample < n) & (channel < c)
        grad = tl.load(channel_sums_ptr + sample * c + channel, mask=live, other=0.0)
        if tile_sums_ptr is not None:
            source = tile_sums_ptr + sample * tiles * c + channel
            grad += sum_partials(source, live, tiles, c, BLOCK_TILES, COMPUTE)
        gate = tl.load(channel_gate_ptr + sample * c + channel, mask=live, other=0.0)
        grad *= gate * (1.0 - gate)
        if tl.program_id(0) % column_blocks == 0:
            tl.store(gate_logits_grad_ptr + sample * c + channel, grad, mask=live)
        source = mlp_weight2_ptr + channel * width + column[:, None]
        weight_live = (channel < c) & (column[:, None] < width)
        weight = tl.load(source, mask=weight_live, other=0.0).to(COMPUTE)
        # A few long sums that every gradient of the first layer is made of: what the products lose
        # to rounding is added, too.
        first, second = tl.broadcast(grad[:, None, :], weight[None, :, :])
        product = first * second
        lost = tl.fma(first, second, -product)
        lost = tl.where(lost == lost, lost, 0.0)  # of an infinite product
        total += tl.sum(product, axis=2) + tl.sum(lost, axis=2)
    live = (sample < n) & (column[None, :] < width)
    tl.store(total_grad_ptr + sample * width + column[None, :], total, mask=live)


@triton.jit
def load_branch(
    descriptors_ptr,  # [N, P, C]
    vector,  # n * B + b, int64
    channel,
    live,
    c,
    LIGHT: tl.constexpr,
):
    """Inputs of the MLP."""
    if LIGHT:
        source = descriptors_ptr + vector * 2 * c + channel
        average = tl.load(source, mask=live, other=0.0)
        branch = 0.5 * average + 0.5 * tl.load(source + c, mask=live, other=0.0)
    else:
        branch = tl.load(descriptors_ptr + vector * c + channel, mask=live, other=0.0)
    return branch


@triton.jit
def load_hidden_grad(
    hidden_ptr,  # [N, B, R]
    total_grad_ptr,  # [N, R]
    vector,  # n * B + b, int64
    unit,
    live,
    reduced,
    BRANCHES: tl.constexpr,
):
    """Gradients of hidden units, through the ReLU."""
    hidden = tl.load(hidden_ptr + vector * reduced + unit, mask=live, other=0.0)
    source = total_grad_ptr + vector // BRANCHES * reduced + unit
    return tl.where(hidden <= 0.0, 0.0, tl.load(source, mask=live, other=0.0))


@triton.jit
def weight2_gradient(
    block,
    gate_logits_grad_ptr,  # [N, C]
    descriptors_ptr,  # [N, P, C]
    hidden_ptr,  # [N, B, R] or None
    mlp_weight2_grad_ptr,  # [C, WIDTH], out
    mlp_bias2_grad_ptr,  # [C], out
    n,
    c,
    width,
    LIGHT: tl.constexpr,
    BRANCHES: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A block of dW2, and of db2 where it is the first of its rows."""
    blocks = tl.cdiv(width, BLOCK_J)
    row = block // blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    column = block % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    weight_grad = tl.zeros([BLOCK_I, BLOCK_J], COMPUTE)
    bias_grad = tl.zeros([BLOCK_I], COMPUTE)
    for start in tl.range(0, n, BLOCK_V):
        sample = (start + tl.arange(0, BLOCK_V)[:, None]).to(tl.int64)
        live = (sample < n) & (row[None, :] < c)
        grad = tl.load(gate_logits_grad_ptr + sample * c + row[None, :], mask=live, other=0.0)
        live = (sample < n) & (column[None, :] < width)
        total = tl.zeros([BLOCK_V, BLOCK_J], COMPUTE)
        for branch in tl.static_range(BRANCHES):
            vector = sample * BRANCHES + branch
            if hidden_ptr is None:
                total += load_branch(descriptors_ptr, vector, column[None, :], live, c, LIGHT)
            else:
                source = hidden_ptr + vector * width + column[None, :]
                total += tl.load(source, mask=live, other=0.0)
        weight_grad += tl.sum(grad[:, :, None] * total[:, None, :], axis=0)
        bias_grad += tl.sum(grad, axis=0)
    live = (row[:, None] < c) & (column[None, :] < width)
    target = mlp_weight2_grad_ptr + row[:, None] * width + column[None, :]
    tl.store(target, weight_grad, mask=live)
    if block % blocks == 0:
        tl.store(mlp_bias2_grad_ptr + row, BRANCHES * bias_grad, mask=row < c)


@triton.jit
def weight1_gradient(
    block,
    descriptors_ptr,  # [N, P, C]
    hidden_ptr,  # [N, B, R]
    total_grad_ptr,  # [N, R]
    mlp_weight1_grad_ptr,  # [R, C], out
    mlp_bias1_grad_ptr,  # [R], out
    n,
    c,
    reduced,
    LIGHT: tl.constexpr,
    BRANCHES: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A block of dW1, and of db1 where it is the first of its rows."""
    blocks = tl.cdiv(c, BLOCK_J)
    row = block // blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    column = block % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    weight_grad = tl.zeros([BLOCK_I, BLOCK_J], COMPUTE)
    bias_grad = tl.zeros([BLOCK_I], COMPUTE)
    for start in tl.range(0, n * BRANCHES, BLOCK_V):
        vector = (start + tl.arange(0, BLOCK_V)[:, None]).to(tl.int64)
        exists = vector < n * BRANCHES
        live = exists & (row[None, :] < reduced)
        grad = load_hidden_grad(
            hidden_ptr, total_grad_ptr, vector, row[None, :], live, reduced, BRANCHES
        )
        live = exists & (column[None, :] < c)
        branch = load_branch(descriptors_ptr, vector, column[None, :], live, c, LIGHT)
        weight_grad += tl.sum(grad[:, :, None] * branch[:, None, :], axis=0)
        bias_grad += tl.sum(grad, axis=0)
    live = (row[:, None] < reduced) & (column[None, :] < c)
    target = mlp_weight1_grad_ptr + row[:, None] * c + column[None, :]
    tl.store(target, weight_grad, mask=live)
    if block % blocks == 0:
        tl.store(mlp_bias1_grad_ptr + row, bias_grad, mask=row < reduced)


@triton.jit
def branch_gradients(
    block,
    hidden_ptr,  # [N, B, R]
    total_grad_ptr,  # [N, R]
    mlp_weight1_ptr,  # [R, C]
    branches_grad_ptr,  # [N, B, C], out
    n,
    c,
    reduced,
    BRANCHES: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of channels of branches_grad, of a few vectors that share what is read of W1."""
    blocks = tl.cdiv(c, BLOCK_C)
    channel = block % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    vector = (block // blocks * VECTORS + tl.arange(0, VECTORS)[:, None]).to(tl.int64)
    exists = vector < n * BRANCHES
    total = tl.zeros([VECTORS, BLOCK_C], COMPUTE)
    for start in tl.range(0, reduced, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)[None, :]
        live = exists & (unit < reduced)
        grad = load_hidden_grad(hidden_ptr, total_grad_ptr, vector, unit, live, reduced, BRANCHES)
        row = start + tl.arange(0, BLOCK_R)[:, None]
        live = (row < reduced) & (channel < c)
        weight = tl.load(mlp_weight1_ptr + row * c + channel, mask=live, other=0.0).to(COMPUTE)
        total += tl.sum(grad[:, :, None] * weight[None, :, :], axis=1)
    tl.store(branches_grad_ptr + vector * c + channel, total, mask=exists & (channel < c))


@triton.jit
def convolution_gradient(
    block,
    partial_conv_ptr,  # [partials, taps + 1]
    conv_weight_grad_ptr,  # [taps], out
    conv_bias_grad_ptr,  # [1], out
    partials,
    taps,
    COMPUTE: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """A block of the convolution's taps; its bias follows the last."""
    tap = (block * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS))[None, :]
    source = partial_conv_ptr + tap
    sums = sum_partials(source, tap <= taps, partials, taps + 1, BLOCK_PARTIALS, COMPUTE)
    tl.store(conv_weight_grad_ptr + tap, sums, mask=tap < taps)
    tl.store(conv_bias_grad_ptr + (tap - taps), sums, mask=tap == taps)


@triton.jit(
    do_not_specialize=[
        *("n", "c", "width", "partials", "taps"),
        *("weight2_blocks", "weight1_blocks", "branch_blocks"),
    ],
    do_not_specialize_on_alignment=["mlp_weight1_ptr"],
)
def parameter_gradients_kernel(
    gate_logits_grad_ptr,  # [N, C]
    total_grad_ptr,  # [N, WIDTH]
    descriptors_ptr,  # [N, P, C]
    mlp_weight2_grad_ptr,  # [C, WIDTH], out
    mlp_bias2_grad_ptr,  # [C], out
    hidden_ptr,  # [N, B, R], or None without a first layer, as the next four
    mlp_weight1_ptr,  # [R, C]
    mlp_weight1_grad_ptr,  # [R, C], out
    mlp_bias1_grad_ptr,  # [R], out
    branches_grad_ptr,  # [N, B, C], out
    partial_conv_ptr,  # [partials, taps + 1], or None without a spatial gate, as the next two
    conv_weight_grad_ptr,  # [taps], out
    conv_bias_grad_ptr,  # [1], out
    n,
    c,
    width,
    partials,
    taps,
    weight2_blocks,
    weight1_blocks,
    branch_blocks,
    LIGHT: tl.constexpr,
    BRANCHES: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    # The programs: weight2_blocks, weight1_blocks, branch_blocks, and those of the convolution.
    block = tl.program_id(0)
    if block < weight2_blocks:
        weight2_gradient(
            block, gate_logits_grad_ptr, descriptors_ptr, hidden_ptr,
            mlp_weight2_grad_ptr, mlp_bias2_grad_ptr, n, c, width,
            LIGHT, BRANCHES, COMPUTE, BLOCK_V, BLOCK_I, BLOCK_J,
        )  # fmt: skip
    block -= weight2_blocks
    if hidden_ptr is not None:
        if (block >= 0) & (block < weight1_blocks):
            weight1_gradient(
                block, descriptors_ptr, hidden_ptr, total_grad_ptr,
                mlp_weight1_grad_ptr, mlp_bias1_grad_ptr, n, c, width,
                LIGHT, BRANCHES, COMPUTE, BLOCK_V, BLOCK_I, BLOCK_J,
            )  # fmt: skip
        block -= weight1_blocks
        if (block >= 0) & (block < branch_blocks):
            branch_gradients(
                block, hidden_ptr, total_grad_ptr, mlp_weight1_ptr, branches_grad_ptr,
                n, c, width, BRANCHES, COMPUTE, VECTORS, BLOCK_R, BLOCK_C,
            )  # fmt: skip
        block -= branch_blocks
    if partial_conv_ptr is not None:  # known when compiled, unlike the next
        if block >= 0:
            convolution_gradient(
                block, partial_conv_ptr, conv_weight_grad_ptr, conv_bias_grad_ptr,
                partials, taps, COMPUTE, BLOCK_PARTIALS, BLOCK_TAPS,
            )  # fmt: skip


def parameters_backward(
    shape: Geometry,
    pool: Pool,
    channel_sums: Tensor,
    tile_sums: Tensor | None,
    partial_conv: Tensor | None,
    channel_gate: Tensor,
    descriptors: Tensor,
    hidden: Tensor,
    mlp_weight1: Tensor | None,
    mlp_weight2: Tensor,
    conv_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    """branches_grad, and the gradients of the MLP's and the convolution's weights and biases.

    branches_grad is [N, B, C]; without a first layer [N, 1, C], which serves every branch.
    tile_sums [N, tiles, C] are added to channel_sums [N, C]; partial_conv [N, tiles, taps + 1] is
    added up. Both are None without a spatial gate.
    """
    n, c = shape.n, shape.c
    spatial, layered = conv_weight is not None, mlp_weight1 is not None
    width = mlp_weight1.shape[0] if layered else c
    compute = shape.constants()["COMPUTE"]

    dg = channel_gate.new_empty([n, c])
    total_grad = channel_gate.new_empty([n, width])
    tiles = tile_sums.shape[1] if spatial else 0
    plan = configuration("gate_backward_kernel", shape)
    launch(
        gate_backward_kernel,
        plan.groups(shape) * triton.cdiv(width, _COLUMNS),
        channel_sums,
        tile_sums,
        channel_gate,
        mlp_weight2.contiguous(),
        dg,
        total_grad,
        n,
        c,
        width,
        tiles,
        configuration=plan,
        COMPUTE=compute,
        BLOCK_N=plan.block_n,
        BLOCK_C=plan.block_c,
        BLOCK_R=_COLUMNS,
        BLOCK_TILES=min(triton.next_power_of_2(tiles), 16) if spatial else 1,
    )

    parameter_grads = (
        mlp_weight2.new_empty(mlp_weight1.shape if layered else [0]),
        mlp_weight2.new_empty([width if layered else 0]),
        mlp_weight2.new_empty(mlp_weight2.shape),
        mlp_weight2.new_empty([c]),
        channel_gate.new_empty(conv_weight.shape if spatial else [0]),
        channel_gate.new_empty([1 if spatial else 0]),
    )
    mlp_weight1_grad, mlp_bias1_grad, mlp_weight2_grad, mlp_bias2_grad, *conv_grads = (
        parameter_grads
    )
    branches_grad = (
        channel_gate.new_empty([n, pool.branches, c]) if layered else total_grad[:, None]
    )

    def blocks(rows: int, columns: int, block_rows: int, block_columns: int) -> int:
        return triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns)

    outer = _OUTER["BLOCK_I"], _OUTER["BLOCK_J"]
    vectors = n * pool.branches
    weight2_blocks = blocks(c, width, *outer)
    weight1_blocks = blocks(width, c, *outer) if layered else 0
    branch_blocks = blocks(vectors, c, _BRANCHES["VECTORS"], _BRANCHES["BLOCK_C"]) if layered else 0
    taps = conv_weight.numel() if spatial else 0
    conv_blocks = triton.cdiv(taps + 1, _CONVOLUTION["BLOCK_TAPS"]) if spatial else 0
    launch(
        parameter_gradients_kernel,
        weight2_blocks + weight1_blocks + branch_blocks + conv_blocks,
        dg,
        total_grad,
        descriptors,
        mlp_weight2_grad,
        mlp_bias2_grad,
        *((hidden, mlp_weight1.contiguous()) if layered else (None, None)),
        *((mlp_weight1_grad, mlp_bias1_grad, branches_grad) if layered else (None, None, None)),
        *((partial_conv, *conv_grads) if spatial else (None, None, None)),
        n,
        c,
        width,
        n * tiles,
        taps,
        weight2_blocks,
        weight1_blocks,
        branch_blocks,
        configuration=configuration("parameter_gradients_kernel", shape),
        LIGHT=pool.light,
        BRANCHES=pool.branches,
        COMPUTE=compute,
        **_OUTER,
        **_BRANCHES,
        **_CONVOLUTION,
    )
    return branches_grad, *parameter_grads
