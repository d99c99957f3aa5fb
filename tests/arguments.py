"""The arguments of each operation, made from a gate, the same for every backend and in every
precision.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cbam_fused import backends
from cbam_fused.backends import Backend
from cbam_fused.ops import compute_dtype
from cbam_fused.testing import Attended, Gate, attend, check_close, layer_grad, scale_error
from tests.ties import maxima

# The names of each operation's results, for messages.
RESULTS = {
    "cbam_inference": ("y",),
    "cbam_attend": Attended._fields,
    "cbam_apply": ("y",),
    "cbam_backward_reduce": ("masked_grad", "channel_sums", "norm_grad", "norm_sums"),
    "cbam_backward_input": (
        "x_grad",
        "mlp_weight1_grad",
        "mlp_bias1_grad",
        "mlp_weight2_grad",
        "mlp_bias2_grad",
        "conv_weight_grad",
        "conv_bias_grad",
    ),
}


def saved(gate: Gate) -> Attended:
    """What `cbam_attend` leaves for the other operations, from float64.

    The channel gate is rounded to 8 bits: for an x of 16 bits its product with x is exact, so that
    the maximum over channels and its ties are the same in every precision.
    """
    compute = compute_dtype(gate.x.dtype)
    exact = attend(backends.get("reference"), gate.to(torch.float64))
    channel_gate = exact.channel_gate.bfloat16().double()
    pooled, channel_ties = exact.pooled, exact.channel_ties
    if gate.conv_weight is not None:
        u = gate.x.double() * channel_gate[:, :, None, None]
        maps = [u.amax(1), u.mean(1)]
        pooled = torch.stack(maps[::-1] if gate.maps == "mean_max" else maps, 1)
        channel_ties = maxima(u, 1, gate.ties)
    return Attended(
        channel_gate.to(compute),
        exact.descriptors.to(compute),
        exact.hidden.to(compute),
        exact.pixel_ties,
        pooled.to(compute),
        channel_ties,
        exact.logits.to(compute),
        exact.norm_mean.to(compute),
        exact.norm_var.to(compute),
    )


def arguments(gate: Gate) -> dict[str, tuple]:
    """The arguments of every operation, by its name."""
    reference, kept = backends.get("reference"), saved(gate)
    logits = kept.logits if gate.conv_weight is not None else None
    statistics = (gate.running_mean, gate.running_var)
    if gate.batch_statistics:
        statistics = (kept.norm_mean, kept.norm_var)
    norm = (gate.norm_weight, gate.norm_bias, *statistics, gate.eps)
    options = (gate.pool, gate.maps)

    apply = (gate.x, kept.channel_gate, logits, *norm, gate.residual, gate.activation)
    y = reference.cbam_apply(*apply) if gate.activation != "none" else None
    reduce = (gate.grad, gate.x, y, kept.channel_gate, logits, *norm, gate.activation)
    masked_grad, channel_sums, norm_grad, norm_sums = reference.cbam_backward_reduce(*reduce)
    return {
        "cbam_inference": (
            gate.x,
            *gate.mlp,
            *gate.conv,
            *norm,
            gate.residual,
            *options,
            gate.activation,
        ),
        "cbam_attend": (
            gate.x,
            *gate.mlp,
            *gate.conv,
            gate.batch_statistics,
            None,
            None,
            0.0,
            *options,
            gate.ties,
        ),
        "cbam_apply": apply,
        "cbam_backward_reduce": reduce,
        "cbam_backward_input": (
            gate.grad if gate.activation == "none" else masked_grad,
            gate.x,
            kept.channel_gate,
            kept.descriptors,
            kept.hidden,
            kept.pixel_ties,
            kept.pooled,
            kept.channel_ties,
            logits,
            channel_sums,
            None if logits is None else norm_grad,
            norm_sums if gate.batch_statistics else None,
            gate.x.shape[0] * gate.x.shape[2] * gate.x.shape[3],
            gate.mlp_weight1,
            gate.mlp_weight2,
            gate.conv_weight,
            *norm,
            *options,
            gate.ties,
        ),
    }


def double(values: tuple) -> tuple:
    """The same arguments with every floating tensor in float64."""
    return tuple(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values
    )


def results(operation: str, values: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What an operation returned that is subject to rounding, by name; the convolution's gradient
    as one vector.
    """
    values = (values,) if isinstance(values, Tensor) else values
    named = dict(zip(RESULTS[operation], values, strict=True))
    if operation == "cbam_backward_input":
        named["conv_grad"] = layer_grad(named.pop("conv_weight_grad"), named.pop("conv_bias_grad"))
    return {name: value for name, value in named.items() if value.is_floating_point()}


def _stacked(
    backend: Backend, operation: str, draws: list[dict], convert=tuple
) -> dict[str, Tensor]:
    """The results of an operation by name, all draws of each in one tensor."""
    function = getattr(backend, operation)
    runs = [results(operation, function(*convert(draw[operation]))) for draw in draws]
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def check_operation(
    backend: Backend, operation: str, dtype: torch.dtype, draws: Callable[[torch.dtype], list[dict]]
) -> None:
    """Holds every result of an operation for an x of `dtype` to the tolerance rule.

    Args:
        draws: from a dtype, the `arguments` of each draw; those of float32 are asked for to judge
            float64.
    """
    reference = backends.get("reference")
    actual = _stacked(backend, operation, draws(dtype))
    expected = _stacked(reference, operation, draws(dtype), double)
    if dtype == torch.float64:
        single = draws(torch.float32)
        eager = _stacked(reference, operation, single)
        exact = _stacked(reference, operation, single, double)
        eager = {name: scale_error(eager[name], exact[name], expected[name]) for name in expected}
    else:
        eager = _stacked(reference, operation, draws(dtype))
    for name in expected:
        check_close(f"{operation}: {name}", actual[name], eager[name], expected[name])
