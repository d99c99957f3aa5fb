"""The specification of CBAM against what others compute; the operations against its autograd."""

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from cbam_fused import reference, reference_gates
from cbam_fused.testing import Gate
from tests.cases import BY_NAME, CASES
from tests.peers import PEERS, randomise
from tests.rounding import check_equal

DOUBLE = torch.float64


def elements(*tensors: Tensor | None) -> int:
    return sum(t.numel() for t in tensors if t is not None)


def with_ties() -> Tensor:
    """On a coarse grid, after a ReLU: equal maxima everywhere, but no plane of zeros only."""
    x = (torch.randn(3, 12, 5, 6, dtype=DOUBLE) * 2).round().relu() / 2
    assert x.flatten(2).amax(2).min() > 0
    return x


DATA = {"random": lambda: torch.randn(3, 12, 5, 6, dtype=DOUBLE), "ties": with_ties}


def gradients(y: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradients of `inputs` for a fixed gradient of y."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    grads = torch.autograd.grad(y, list(inputs.values()), grad)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_cbam_is_what_others_compute(peer, training, data):
    module = randomise(peer.build()).train(training)
    x = DATA[data]().requires_grad_()
    arguments = peer.arguments(module)
    if getattr(module, "residual", False):
        arguments |= {"residual": x, "activation": "relu"}
    inputs = {"x": x, **dict(module.named_parameters())}

    expected = gradients(module(x), inputs)
    actual = gradients(reference.cbam(x, **arguments), inputs)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for statistic in ("running_mean", "running_var"):
                expected[statistic] = getattr(norm, statistic)
                actual[statistic] = arguments[statistic]
    check_equal(actual, expected, elements(*inputs.values()))


# The written-out backward against autograd.


def leaves(gate: Gate) -> dict[str, Tensor]:
    """The tensors of `gate` that have a gradient, each a leaf of its own."""
    names = [f.name for f in fields(Gate) if f.name not in ("grad", "running_mean", "running_var")]
    tensors = {name: getattr(gate, name) for name in names}
    return {
        n: t.detach().clone().requires_grad_() for n, t in tensors.items() if isinstance(t, Tensor)
    }


def by_autograd(gate: Gate, cbam: Callable[..., Tensor] = reference.cbam) -> dict[str, Tensor]:
    """y and all gradients, by name, from the specification."""
    inputs = leaves(gate)
    options = {f.name: getattr(gate, f.name) for f in fields(Gate) if f.name != "grad"}
    y = cbam(**(options | inputs))
    grads = torch.autograd.grad(y, list(inputs.values()), gate.grad)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def by_operations(gate: Gate) -> dict[str, Tensor]:
    """The same from the operations: attend, apply, backward_reduce, backward_input."""
    gate_options, x = (gate.pool, gate.maps, gate.ties), gate.x
    channel_gate, *kept, logits, mean, var = reference.cbam_attend(
        x, *gate.mlp, *gate.conv, gate.batch_statistics, None, None, 0.0, *gate_options
    )
    logits = None if gate.conv_weight is None else logits
    if not gate.batch_statistics:
        mean, var = gate.running_mean, gate.running_var
    norm = (gate.norm_weight, gate.norm_bias, mean, var, gate.eps)
    y = reference.cbam_apply(x, channel_gate, logits, *norm, gate.residual, gate.activation)
    masked_grad, channel_sums, norm_grad, norm_sums = reference.cbam_backward_reduce(
        gate.grad, x, y, channel_gate, logits, *norm, gate.activation
    )
    grad = gate.grad if gate.activation == "none" else masked_grad
    gradients = reference.cbam_backward_input(
        grad, x, channel_gate, *kept, logits, channel_sums, norm_grad,
        norm_sums if gate.batch_statistics else None, x.numel() // x.shape[1],
        gate.mlp_weight1, gate.mlp_weight2, gate.conv_weight, *norm, *gate_options,
    )  # fmt: skip
    mlp = ("mlp_weight1", "mlp_bias1", "mlp_weight2", "mlp_bias2")
    names = ("x", *mlp, "conv_weight", "conv_bias")
    results = {"y": y, **dict(zip(names, gradients, strict=True)), "residual": grad}
    if mean is not None:
        results |= {"norm_bias": norm_sums[0:1], "norm_weight": norm_sums[1:2]}
    return {n: r for n, r in results.items() if n == "y" or getattr(gate, n) is not None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operations_are_the_autograd_of_cbam(case):
    gate = case.gate(DOUBLE)
    check_equal(by_operations(gate), by_autograd(gate), elements(*leaves(gate).values()))


@pytest.mark.parametrize(
    "name", ["frozen", "no_norm", "no_spatial", "light_even", "residual_relu6"]
)
def test_inference_is_the_forward_of_cbam(name):
    gate = BY_NAME[name].gate(DOUBLE)
    norm = (gate.norm_weight, gate.norm_bias, gate.running_mean, gate.running_var, gate.eps)
    options = (gate.residual, gate.pool, gate.maps, gate.activation)
    y = reference.cbam_inference(gate.x, *gate.mlp, *gate.conv, *norm, *options)
    assert torch.equal(y, by_autograd(gate)["y"])


SMOOTH = ("plain", "all_pools", "light", "single_layer", "residual_relu6", "no_spatial", "c2")


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives_are_those_of_finite_differences(name):
    gate = replace(BY_NAME[name], shape=(2, min(BY_NAME[name].shape[1], 4), 3, 2)).gate(DOUBLE)
    inputs = leaves(gate)
    options = {f.name: getattr(gate, f.name) for f in fields(Gate) if f.name != "grad"}

    def function(*tensors):
        return reference.cbam(**(options | dict(zip(inputs, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


# Rules that no comparison of whole gates pins down.


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("peak", [2.0, math.nan], ids=["value", "nan"])
@pytest.mark.parametrize("ties", ["first", "even"])
def test_who_receives_the_gradient_of_a_maximum(ties, peak, layout):
    x = torch.zeros(1, 3, 4, 5, dtype=DOUBLE)
    x[0, :, 1, 3] = x[0, :, 3, 0] = peak
    x = x.contiguous(memory_format=layout).requires_grad_()
    expected = torch.zeros_like(x)
    if ties == "first":
        expected[0, :, 1, 3] = 1
    else:
        expected[0, :, 1, 3] = expected[0, :, 3, 0] = 0.5
        if math.isnan(peak):
            expected.fill_(math.nan)
    descriptors, pixel_ties = reference_gates.pool_pixels(x, "max", ties)
    (grad,) = torch.autograd.grad(descriptors, x, torch.ones_like(descriptors))
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
    places = 0 if math.isnan(peak) else 2
    assert pixel_ties.tolist() == [[1 * 5 + 3 if ties == "first" else places] * 3]

    first = (1, 0, 0) if ties == "first" else (1 / 3, 1 / 3, 1 / 3)
    pooled, channel_ties = reference_gates.pool_channels(x, "max_mean", ties)
    (grad,) = torch.autograd.grad(pooled[0, 0, 1, 3], x)
    expected = torch.tensor(first, dtype=DOUBLE)
    if math.isnan(peak) and ties == "even":
        expected.fill_(math.nan)
    torch.testing.assert_close(grad[0, :, 1, 3], expected, rtol=0, atol=0, equal_nan=True)
    assert channel_ties[0, 1, 3] == (0 if ties == "first" else 3 * (not math.isnan(peak)))


def test_gradient_of_an_lp_pool_at_zero_is_zero():
    x = torch.zeros(2, 3, 4, 5, dtype=DOUBLE, requires_grad=True)
    descriptors, _ = reference_gates.pool_pixels(x, "lp", "first")
    (grad,) = torch.autograd.grad(descriptors.sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_in_16_bits_are_rounded_once(dtype):
    half = BY_NAME["residual"].gate(dtype)
    wide = replace(half, x=half.x.float(), residual=half.residual.float(), grad=half.grad.float())
    actual, expected = by_autograd(half), by_autograd(wide)
    for name, value in expected.items():
        assert torch.equal(actual[name], value.to(actual[name].dtype)), name


def test_activation_sees_the_rounded_value():
    """5.99 is 6 in bfloat16, where ReLU6 is closed: y alone tells the gradient's mask."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    residual = torch.tensor([5.99], dtype=torch.float32).view(1, 1, 1, 1).requires_grad_()
    weight = torch.zeros(1, 1)
    y = reference.cbam(x, None, None, weight, None, residual=residual, activation="relu6")
    assert y.item() == 6
    assert torch.autograd.grad(y.sum(), residual)[0].item() == 0


@pytest.mark.parametrize("name", ["plain", "residual_relu", "single_layer"])
def test_autocast_changes_nothing(name):
    gate = BY_NAME[name].gate(torch.float32)
    inputs = (gate.x, *gate.mlp, *gate.conv)
    options = {"pool": gate.pool, "maps": gate.maps}
    operations, y = by_operations(gate), reference.cbam(*inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference.cbam(*inputs, **options), y)
        for result, value in by_operations(gate).items():
            assert torch.equal(value, operations[result]), result


@pytest.mark.parametrize("layout", ["channels_last", "mixed", "sliced", "permuted", "expanded"])
@pytest.mark.parametrize("name", ["residual_relu", "no_spatial"])
def test_strides_change_nothing_but_the_strides_of_the_result(name, layout):
    gate = BY_NAME[name].gate(DOUBLE, layout)
    tensors = {n: getattr(gate, n) for n in ("x", "residual", "grad")}
    compact = {n: t.contiguous() for n, t in tensors.items() if t is not None}
    actual = by_operations(gate)
    expected = by_operations(replace(gate, **compact))
    check_equal(actual, expected, elements(*leaves(gate).values()))
    last = gate.x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    for result in ("y", "x"):
        assert actual[result].is_contiguous(memory_format=memory_format), result
    if gate.activation != "none":
        assert actual["residual"].is_contiguous(memory_format=memory_format)


def test_an_empty_batch_has_zero_gradients_and_no_statistics():
    gate = BY_NAME["plain"].gate(DOUBLE)
    mean, var = torch.tensor([3.0], dtype=DOUBLE), torch.tensor([5.0], dtype=DOUBLE)
    parameters = (*gate.mlp, gate.conv_weight, gate.norm_weight, gate.norm_bias)
    inputs = [p.requires_grad_() for p in parameters]
    *mlp, conv_weight, norm_weight, norm_bias = inputs
    y = reference.cbam(
        gate.x[:0],
        *mlp,
        conv_weight,
        None,
        norm_weight,
        norm_bias,
        mean,
        var,
        batch_statistics=True,
    )
    assert y.shape == (0, *gate.x.shape[1:])
    assert (mean.item(), var.item()) == (3, 5)
    for grad in torch.autograd.grad(y.sum(), inputs):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_batch_statistics_of_one_value_are_an_error():
    weight, norm = torch.zeros(4, 4), (torch.zeros(1), torch.ones(1))
    arguments = (None, None, weight, None, torch.zeros(1, 2, 3, 3), None, None, None, *norm)
    with pytest.raises(
        ValueError, match=r"^cbam: x must have N \* H \* W > 1 .*; got float32 \[1, 4, 1, 1\]"
    ):
        reference.cbam(torch.zeros(1, 4, 1, 1), *arguments, batch_statistics=True)
    assert (norm[0].item(), norm[1].item()) == (0, 1)


@pytest.mark.parametrize("name", ["all_pools", "light_even"])
def test_whole_gate_and_operations_are_one_graph(name):
    gate = BY_NAME[name].gate(DOUBLE)
    terms, expected = elements(*leaves(gate).values()), by_autograd(gate)
    cbam = torch.compile(reference.cbam, fullgraph=True, dynamic=True, backend="aot_eager")
    check_equal(by_autograd(gate, cbam), expected, terms)
    operations = torch.compile(by_operations, fullgraph=True, backend="eager")
    check_equal(operations(gate), expected, terms)
