"""The public functional form of the CBAM gate.

Checks, autocast, the choice of a backend, running statistics.
"""

import torch
from torch import Tensor

from cbam_fused import backends, checks
from cbam_fused.layout import dense
from cbam_fused.ops import Cbam
from cbam_fused.reference_gates import cast, compute_dtype
from cbam_fused.synchronised import Group


def cbam(
    x: Tensor,
    mlp_weight1: Tensor | None,
    mlp_bias1: Tensor | None,
    mlp_weight2: Tensor,
    mlp_bias2: Tensor | None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    batch_statistics: bool = False,
    process_group: Group | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: str = "avg+max",
    maps: str = "max_mean",
    ties: str = "first",
    activation: str = "none",
) -> Tensor:
    """CBAM (Woo et al., ECCV 2018, section 3): channel gate, then spatial gate, fused.

    ``y = act(x * Mc * Ms + residual)`` with ``Mc = sigmoid(MLP(pool(x)))`` per channel and
    ``Ms = sigmoid(norm(conv(max and mean over channels of x * Mc)))`` per pixel. Sums, gates and
    the norm are computed in float32 (float64 for a float64 x), whatever the dtype of x.
    Differentiable once, in x, residual and all parameters.

    Args:
        x: ``[N, C, H, W]``, NCHW or channels_last (others are copied), float32, float16, bfloat16
            or float64. Under autocast an x that is not float64 is cast to the autocast dtype;
            parameters are not.
        mlp_weight1: ``[R, C]`` or ``[R, C, 1, 1]``; None: no hidden layer.
        mlp_bias1: ``[R]`` or None.
        mlp_weight2: ``[C, R]`` or ``[C, R, 1, 1]``; ``[C, C]`` where mlp_weight1 is None.
        mlp_bias2: ``[C]`` or None.
        conv_weight: ``[1, 2, k, k]``, k odd (``[1, 1, k, k]`` for ``maps="light"``); None: channel
            gate only.
        conv_bias: ``[1]`` or None.
        norm_weight, norm_bias: ``[1]`` or None, of the batch norm behind the convolution.
        running_mean, running_var: ``[1]``. Without ``batch_statistics`` they normalise, and without
            them there is no norm; with it they are updated in place (unbiased variance), if given.
        residual: as x in shape; added after the gate. ``residual=x`` gives ``x + gate(x)``.
        batch_statistics: normalise with the mean and variance over this batch, as a batch norm in
            training does.
        process_group: with ``batch_statistics``: the batch is that of all processes of this
            `torch.distributed.ProcessGroup`, as for a SyncBatchNorm; each must make the call, and
            go through its backward pass. Parameters' gradients are those of this process's part.
            None: the batch is this process's.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        pool: what is pooled over H*W: ``avg``, ``max``, ``lp`` (p = 2), ``lse`` joined by ``+``,
            each a branch of the MLP; or ``light``: one branch ``0.5 avg + 0.5 max``.
        maps: order of the two pooled maps, ``max_mean`` (official) or ``mean_max``; or ``light``:
            one map ``0.5 mean + 0.5 max``.
        ties: the gradient of a maximum goes to the ``first`` index (as ``max(dim)``) or is spread
            ``even`` (as ``amax``).
        activation: ``none``, ``relu`` or ``relu6``, after the residual.

    Returns:
        y, in shape and dtype as x; in its strides too if x is NCHW or channels_last, else
        contiguous NCHW.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected
            and what came.
        RuntimeError: a second derivative is asked for.
    """
    mlp = (mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2)
    conv = (conv_weight, conv_bias)
    affine = (norm_weight, norm_bias)
    statistics = (running_mean, running_var)
    parameters = (*mlp, *conv, *affine, *statistics)
    options = (batch_statistics, momentum, eps, pool, maps, ties, activation)
    pool, as_is, device = checks.remembered(x, parameters, *options)
    if device and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        if isinstance(residual, Tensor) and residual.is_floating_point():
            residual = residual.to(dtype)
        x = x.to(dtype)
        as_is = False
    checks.residual(x, residual)
    if conv_weight is None:
        batch_statistics = False
        affine = statistics = (None, None)
    elif batch_statistics:
        checks.batch(x, running_mean, running_var, process_group)

    if not as_is:
        compute = compute_dtype(x.dtype)
        if not checks.mlp_as_is(x, mlp):
            mlp = tuple(cast(p, compute) for p in mlp)
        conv = tuple(cast(p, compute) for p in conv)
        affine = tuple(cast(p, compute) for p in affine)
        if not batch_statistics:
            statistics = tuple(cast(p, compute) for p in statistics)

    backend = backends.chosen(x.device)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *mlp, *conv, *affine, residual)
    )
    if not differentiable and not batch_statistics:
        return backend.cbam_inference(
            x, *mlp, *conv, *affine, *statistics, eps, residual, pool, maps, activation
        )
    if residual is x and torch.compiler.is_compiling():
        residual = x.view_as(x)  # dynamo takes no tensor for two arguments
    return Cbam.apply(
        dense(x),
        *mlp,
        *conv,
        *affine,
        *statistics,
        residual,
        backend,
        batch_statistics,
        momentum,
        eps,
        pool,
        maps,
        ties,
        activation,
        process_group,
    )
