"""How close is close enough: the tolerance rule, and a whole gate, forward and backward, under it.

The rule has no constant to choose. Against the result in float64, the largest error of an
implementation may not exceed twice the largest error of the same computation by eager PyTorch in
the implementation's own dtype, plus two units in the last place of the result. NaN and infinities
must be where eager PyTorch has them. Nothing here is more precise than float64: for an
implementation in float64, eager's error is taken from float32 (`scale_error`).

A maximum is a decision, and so is the mask of a ReLU: rounding may legitimately move it.
`check_gate` therefore makes these decisions once, hands them to every implementation, and checks
separately that the implementation's own choice is within rounding of the maximum.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cbam_fused import backends
from cbam_fused.backends import Backend
from cbam_fused.ops import compute_dtype


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The distance between neighbouring values of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    if magnitude < info.smallest_normal:
        return info.smallest_normal * info.eps
    return math.ldexp(info.eps, math.frexp(magnitude)[1] - 1)


def _coordinate(flat_index: int, shape: torch.Size) -> list[int]:
    return [int(i) for i in torch.unravel_index(torch.tensor(flat_index, device="cpu"), shape)]


def _check_masks(name: str, actual: Tensor, eager: Tensor) -> None:
    kinds = {"NaN": torch.isnan, "+inf": torch.isposinf, "-inf": torch.isneginf}
    for kind, has in kinds.items():
        wrong = has(actual) != has(eager)
        if wrong.any():
            first = int(wrong.flatten().nonzero()[0])
            raise AssertionError(
                f"{name}: {kind} differs from eager in {int(wrong.sum())} of {wrong.numel()} "
                f"places, first at "
                f"{_coordinate(first, wrong.shape)}: got {actual.flatten()[first].item():.9g}, "
                f"eager has {eager.flatten()[first].item():.9g}"
            )


class Closeness(NamedTuple):
    """The largest error of a result, and what it may be at most."""

    error: float
    bound: float


def check_close(name: str, actual: Tensor, eager: Tensor, expected: Tensor) -> Closeness:
    """Holds `actual` to the tolerance rule; returns how close it came.

    Args:
        name: what is compared, for the message.
        actual: the implementation's result, of any shape, in a floating dtype.
        eager: the same computation by eager PyTorch, in the same dtype.
        expected: the same in float64.

    Raises:
        AssertionError: shape or dtype differ; NaN or infinities lie elsewhere than in eager; or the
            largest error exceeds the bound. The message gives the worst coordinate, the values
            there, the error and the bound.
    """
    if expected.dtype != torch.float64:
        raise ValueError(f"{name}: expected must be in float64; got {expected.dtype}")
    for label, other in (("eager", eager), ("expected", expected)):
        if actual.shape != other.shape:
            raise AssertionError(f"{name}: shape {list(actual.shape)}, {label} {list(other.shape)}")
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, eager {eager.dtype}")
    actual, eager, expected = actual.detach(), eager.detach(), expected.detach()
    errors = [(result.double() - expected).abs_() for result in (actual, eager)]
    magnitudes = expected.abs()
    if not all(math.isfinite(values.sum().item()) for values in (*errors, magnitudes)):
        _check_masks(name, actual, eager)
        finite = torch.isfinite(eager) & torch.isfinite(expected)
        errors = [torch.where(finite, error, 0.0) for error in errors]
        magnitudes = torch.where(finite, magnitudes, 0.0)
    if not actual.numel():
        return Closeness(0.0, 0.0)

    error, eager_error, magnitude = (v.max().item() for v in (*errors, magnitudes))
    unit = ulp(actual.dtype, magnitude)
    bound = 2 * eager_error + 2 * unit
    if error > bound:
        worst = int(errors[0].argmax())
        raise AssertionError(
            f"{name}: worst at {_coordinate(worst, actual.shape)} of {list(actual.shape)}: "
            f"got {actual.flatten()[worst].item():.9g}, expected "
            f"{expected.flatten()[worst].item():.17g}, error {error:.3g} > bound {bound:.3g} "
            f"(twice eager's {eager_error:.3g} plus 2 ulp of {unit:.3g})"
        )
    return Closeness(error, bound)


def scale_error(eager: Tensor, exact: Tensor, expected: Tensor) -> Tensor:
    """What stands for eager's result where `expected` is an eager result of the same precision,
    float64, itself.

    It lies twice as far from `expected` as eager float32 does from `exact`, in units of the
    precision of each: the rule allows any result twice eager's error, and `expected` is one such
    result too, so that the two may lie four times that error apart. (In extended precision, the
    float64 reference was found further from the exact result than the kernels were.)

    Args:
        eager: a float32 result.
        exact: the same computation on the same numbers in float64.
        expected: the float64 result whose error cannot be measured directly.
    """
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    error = 2 * ratio * (eager.double() - exact)
    return torch.where(error.isfinite(), expected + error, expected)


@dataclass(frozen=True)
class Gate:
    """One gate with its input and the gradient of its output; fields as the arguments of
    `cbam_fused.cbam`.
    """

    x: Tensor
    mlp_weight1: Tensor | None
    mlp_bias1: Tensor | None
    mlp_weight2: Tensor
    mlp_bias2: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    residual: Tensor | None
    grad: Tensor
    batch_statistics: bool = False
    eps: float = 1e-5
    pool: str = "avg+max"
    maps: str = "max_mean"
    ties: str = "first"
    activation: str = "none"

    def to(self, dtype: torch.dtype) -> "Gate":
        """The same gate with every tensor in `dtype`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(dtype) for k, v in values.items() if isinstance(v, Tensor)})

    @property
    def mlp(self) -> tuple[Tensor | None, ...]:
        return self.mlp_weight1, self.mlp_bias1, self.mlp_weight2, self.mlp_bias2

    @property
    def conv(self) -> tuple[Tensor | None, ...]:
        return self.conv_weight, self.conv_bias


class Attended(NamedTuple):
    """The results of `cbam_attend`; shapes in `cbam_fused.schemas`."""

    channel_gate: Tensor
    descriptors: Tensor
    hidden: Tensor
    pixel_ties: Tensor
    pooled: Tensor
    channel_ties: Tensor
    logits: Tensor
    norm_mean: Tensor
    norm_var: Tensor


class Decisions(NamedTuple):
    """What rounding may move: where the maxima are, and the y whose sign masks the gradient."""

    pixel_ties: Tensor
    channel_ties: Tensor
    y: Tensor


def attend(backend: Backend, gate: Gate) -> Attended:
    """`cbam_attend` of `gate` by `backend`."""
    statistics = (gate.batch_statistics, None, None, 0.0)
    results = backend.cbam_attend(
        gate.x, *gate.mlp, *gate.conv, *statistics, gate.pool, gate.maps, gate.ties
    )
    return Attended(*results)


def layer_grad(weight_grad: Tensor, bias_grad: Tensor) -> Tensor:
    """A layer's gradient as one vector, judged as one: behind batch statistics that of a bias is
    nothing but rounding.
    """
    return torch.cat([weight_grad.flatten(), bias_grad])


def run_gate(
    backend: Backend, gate: Gate, decisions: Decisions | None = None
) -> tuple[dict[str, Tensor], Attended]:
    """The gate forward and backward through the operations of `backend`, with `decisions` in place
    of its own.

    Returns the results by name (y, the gradients of x and of each parameter present, the residual's
    gradient) and what `cbam_attend` gave.
    """
    attended = attend(backend, gate)
    logits = attended.logits if gate.conv_weight is not None else None
    statistics = (gate.running_mean, gate.running_var)
    if gate.batch_statistics:
        statistics = (attended.norm_mean, attended.norm_var)
    norm = (gate.norm_weight, gate.norm_bias, *statistics, gate.eps)
    y = backend.cbam_apply(
        gate.x, attended.channel_gate, logits, *norm, gate.residual, gate.activation
    )
    pixel_ties, channel_ties, mask_y = decisions or (attended.pixel_ties, attended.channel_ties, y)
    masked_grad, channel_sums, norm_grad, norm_sums = backend.cbam_backward_reduce(
        gate.grad,
        gate.x,
        None if gate.activation == "none" else mask_y.to(gate.x.dtype),
        attended.channel_gate,
        logits,
        *norm,
        gate.activation,
    )
    grad = gate.grad if gate.activation == "none" else masked_grad
    gradients = backend.cbam_backward_input(
        grad,
        gate.x,
        attended.channel_gate,
        attended.descriptors,
        attended.hidden,
        pixel_ties,
        attended.pooled,
        channel_ties,
        logits,
        channel_sums,
        None if logits is None else norm_grad,
        norm_sums if gate.batch_statistics else None,
        gate.x.shape[0] * gate.x.shape[2] * gate.x.shape[3],
        gate.mlp_weight1,
        gate.mlp_weight2,
        gate.conv_weight,
        *norm,
        gate.pool,
        gate.maps,
        gate.ties,
    )
    names = ("x", "mlp_weight1", "mlp_bias1", "mlp_weight2", "mlp_bias2")
    results = {"y": y}
    for name, gradient in zip(names, gradients, strict=False):
        if getattr(gate, name) is not None:
            results[f"{name} grad"] = gradient
    conv_grad = layer_grad(*gradients[5:])
    if gate.conv_weight is not None:
        results["conv grad"] = conv_grad if gate.conv_bias is not None else conv_grad[:-1]
    if gate.norm_weight is not None:
        results["norm grad"] = norm_sums
    if gate.residual is not None:
        results["residual grad"] = grad
    return results, attended


def check_channel_choice(gate: Gate, attended: Attended) -> None:
    """Asserts that the channel each pixel's maximum was taken from holds a maximum, within rounding
    of x * Mc.
    """
    if gate.conv_weight is None or gate.ties != "first":
        return
    u = gate.x.double() * attended.channel_gate.double()[:, :, None, None]
    chosen = u.gather(1, attended.channel_ties.long()[:, None]).squeeze(1)
    largest = u.amax(1)
    if not torch.equal(chosen.isnan(), largest.isnan()):
        raise AssertionError(
            "channel_ties: a NaN is the maximum, and the choice is not a NaN, or the reverse"
        )
    info = torch.finfo(compute_dtype(gate.x.dtype))
    rounding = info.eps * largest.abs() + info.smallest_normal * info.eps
    wrong = largest.isfinite() & (largest - chosen > rounding)
    if wrong.any():
        first = int(wrong.flatten().nonzero()[0])
        raise AssertionError(
            f"channel_ties: at {_coordinate(first, largest.shape)} of [N, H, W] the chosen "
            f"channel holds "
            f"{chosen.flatten()[first].item():.17g}, the maximum is "
            f"{largest.flatten()[first].item():.17g}"
        )


def check_gate(backend: Backend, *gates: Gate) -> None:
    """Runs gates forward and backward through `backend` and holds every result to the tolerance
    rule.

    Several gates of equal shapes and options (draws of the same random data) are judged together:
    the largest error over them all. One draw says little of how large the rounding error of a
    single number is.

    Raises:
        AssertionError: a result is off; the message names it and its worst coordinate.
    """
    reference = backends.get("reference")
    runs = []
    for gate in gates:
        decisions, eager, expected = _run_reference(reference, gate)
        if gate.x.dtype == torch.float64:
            _, single, exact = _run_reference(reference, gate.to(torch.float32))
            eager = {
                name: scale_error(single[name], exact[name], expected[name]) for name in expected
            }
        actual, attended = run_gate(backend, gate, decisions)
        check_channel_choice(gate, attended)
        runs.append((actual, eager, expected))
    for name in runs[0][0]:
        check_close(name, *(torch.stack([run[i][name] for run in runs]) for i in range(3)))


def _run_reference(reference: Backend, gate: Gate) -> tuple[Decisions, dict, dict]:
    """The decisions of the eager gate, its results, and those of float64 with these decisions."""
    eager, attended = run_gate(reference, gate)
    decisions = Decisions(attended.pixel_ties, attended.channel_ties, eager["y"])
    expected, _ = run_gate(reference, gate.to(torch.float64), decisions)
    return decisions, eager, expected
