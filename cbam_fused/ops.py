"""The five operations as `torch.ops.cbam_fused.*`, and one autograd function over their composite.

`cbam_fused.schemas` states every argument. The operations, and those of the Triton kernels
(`cbam_fused.triton_backend`), have fake implementations (meta tensors, torch.compile, torch.export)
whose strides equal the real ones, and no autograd of their own: `Cbam` spans the whole gate.
"""

import contextlib

import torch
from torch.autograd.graph import increment_version

from cbam_fused import library, reference, synchronised, triton_backend
from cbam_fused.backends import Backend
from cbam_fused.layout import dense
from cbam_fused.reference_gates import compute_dtype
from cbam_fused.schemas import NAMESPACE, SCHEMAS


def _fake_inference(x, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2, *_others):
    return torch.empty_like(dense(x))


def _fake_attend(
    x,
    mlp_weight1,
    mlp_bias1,
    mlp_weight2,
    mlp_bias2,
    conv_weight,
    conv_bias,
    batch_statistics,
    running_mean,
    running_var,
    momentum,
    pool,
    maps,
    ties,
):
    n, c, height, width = x.shape
    pools = 2 if pool == "light" else pool.count("+") + 1
    branches = 1 if pool == "light" else pools
    reduced = 0 if mlp_weight1 is None else mlp_weight1.shape[0]
    spatial = conv_weight is not None
    compute = compute_dtype(x.dtype)

    def new(shape, exists=True, dtype=compute):
        return x.new_empty(shape if exists else [0], dtype=dtype)

    statistics = spatial and batch_statistics
    return (
        new([n, c]),
        new([n, pools, c]),
        new([n, branches, reduced]),
        new([n, c], "max" in pool or pool == "light", torch.int32),
        new([n, 2, height, width], spatial),
        new([n, height, width], spatial, torch.int32),
        new([n, height, width], spatial),
        new([1], statistics),
        new([1], statistics),
    )


def _fake_apply(x, *_others):
    return torch.empty_like(dense(x))


def _fake_backward_reduce(
    grad, x, y, channel_gate, logits, norm_weight, norm_bias, norm_mean, norm_var, eps, activation
):
    n, c, height, width = x.shape
    spatial = logits is not None
    return (
        torch.empty_like(dense(x)) if activation != "none" else x.new_empty([0]),
        channel_gate.new_empty([n, c]),
        channel_gate.new_empty([n, height, width] if spatial else [0]),
        channel_gate.new_empty([2] if spatial and norm_mean is not None else [0]),
    )


def _fake_backward_input(
    grad,
    x,
    channel_gate,
    descriptors,
    hidden,
    pixel_ties,
    pooled,
    channel_ties,
    logits,
    channel_sums,
    norm_grad,
    norm_sums,
    norm_count,
    mlp_weight1,
    mlp_weight2,
    conv_weight,
    *_others,
):
    c = x.shape[1]

    def like(parameter, placeholder):
        source = placeholder if parameter is None else parameter
        return source.new_empty([0] if parameter is None else parameter.shape)

    reduced = [0] if mlp_weight1 is None else [mlp_weight1.shape[0]]
    return (
        torch.empty_like(dense(x)),
        like(mlp_weight1, mlp_weight2),
        mlp_weight2.new_empty(reduced),
        mlp_weight2.new_empty(mlp_weight2.shape),
        mlp_weight2.new_empty([c]),
        channel_gate.new_empty([0] if conv_weight is None else conv_weight.shape),
        channel_gate.new_empty([0 if conv_weight is None else 1]),
    )


_FAKES = {
    "cbam_inference": _fake_inference,
    "cbam_attend": _fake_attend,
    "cbam_apply": _fake_apply,
    "cbam_backward_reduce": _fake_backward_reduce,
    "cbam_backward_input": _fake_backward_input,
}

for _name in SCHEMAS:
    if not library.loaded:
        torch.library.impl(
            f"{NAMESPACE}::{_name}", "CompositeExplicitAutograd", getattr(reference, _name)
        )
    for _namespace in (NAMESPACE, triton_backend.NAMESPACE):
        torch.library.register_fake(f"{_namespace}::{_name}", _FAKES[_name])


def _no_grad() -> contextlib.AbstractContextManager:
    """`torch.no_grad`; where gradients are off already nothing, which takes less time."""
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes gradients through, tied to what they were computed from.

    So differentiating them again raises.
    """

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "cbam: a second derivative is not implemented by the fused operations; "
            "use cbam_fused.reference.cbam for double backward"
        )


class Cbam(torch.autograd.Function):
    """The whole gate: forward = attend, apply; backward = backward_reduce, backward_input.

    With batch statistics the running ones, if given, are updated in place; with a process group
    the batch is that of all its processes. Saves x, y where an activation follows, and maps of at
    most N*H*W or N*C values.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        mlp_weight1,
        mlp_bias1,
        mlp_weight2,
        mlp_bias2,
        conv_weight,
        conv_bias,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        residual,
        backend: Backend,
        batch_statistics: bool,
        momentum: float,
        eps: float,
        pool: str,
        maps: str,
        ties: str,
        activation: str,
        group: synchronised.Group | None,
    ):
        if not batch_statistics:
            group = None
        local = batch_statistics and group is None
        updated = (running_mean, running_var) if local else (None, None)
        attended = backend.cbam_attend(
            x,
            mlp_weight1,
            mlp_bias1,
            mlp_weight2,
            mlp_bias2,
            conv_weight,
            conv_bias,
            batch_statistics,
            *updated,
            momentum,
            pool,
            maps,
            ties,
        )
        if updated[0] is not None and not torch.compiler.is_compiling():
            increment_version(updated)  # so that an older graph that saved them notices
        channel_gate, *kept, logits, norm_mean, norm_var = attended
        share = None  # of the values of all processes, those that are this one's
        if group is not None:
            count = logits.numel()
            norm_mean, norm_var, total = synchronised.merge(norm_mean, norm_var, count, group)
            running = (running_mean, running_var)
            synchronised.update_running(*running, norm_mean, norm_var, total, momentum)
            share = (count / total.clamp(min=1)).to(norm_mean.dtype)
        if conv_weight is None:
            logits = None
        if not batch_statistics:
            norm_mean, norm_var = running_mean, running_var
        norm = (norm_weight, norm_bias, norm_mean, norm_var)
        y = backend.cbam_apply(x, channel_gate, logits, *norm, eps, residual, activation)

        # Biases only tie the gradients to all that they depend on (see _FirstDerivativeOnly).
        ctx.save_for_backward(
            *(x, y if activation != "none" else None, channel_gate, *kept, logits, *norm),
            *(mlp_weight1, mlp_weight2, conv_weight, mlp_bias1, mlp_bias2, conv_bias, share),
        )
        ctx.backend, ctx.batch_statistics, ctx.eps = backend, batch_statistics, eps
        ctx.group = group
        ctx.pool, ctx.maps, ctx.ties, ctx.activation = pool, maps, ties, activation
        return y

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        x, y, channel_gate, *kept, logits = saved[:9]
        norm, (mlp_weight1, mlp_weight2, conv_weight) = saved[9:13], saved[13:16]
        with _no_grad():
            masked_grad, channel_sums, norm_grad, norm_sums = ctx.backend.cbam_backward_reduce(
                grad, x, y, channel_gate, logits, *norm, ctx.eps, ctx.activation
            )
            residual_grad = masked_grad if ctx.activation != "none" else grad
            all_sums = norm_sums
            if ctx.group is not None:  # divided by the count of this process they are the means
                all_sums = synchronised.add(norm_sums, ctx.group) * saved[-1]
            x_grad, *mlp_grads, conv_weight_grad, conv_bias_grad = ctx.backend.cbam_backward_input(
                residual_grad,
                x,
                channel_gate,
                *kept,
                logits,
                channel_sums,
                None if logits is None else norm_grad,
                all_sums if ctx.batch_statistics else None,
                x.shape[0] * x.shape[2] * x.shape[3],
                mlp_weight1,
                mlp_weight2,
                conv_weight,
                *norm,
                ctx.eps,
                ctx.pool,
                ctx.maps,
                ctx.ties,
            )
            norm_grads = (norm_sums[1:], norm_sums[:1])
            grads = (x_grad, *mlp_grads, conv_weight_grad, conv_bias_grad, *norm_grads)
            grads = (*grads, None, None, residual_grad)
            grads = tuple(
                g if needed else None
                for g, needed in zip(grads, ctx.needs_input_grad[:12], strict=True)
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _FirstDerivativeOnly.apply(len(grads), *grads, grad, *saved)
        return *grads, *(None,) * 9
