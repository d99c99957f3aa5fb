"""The differentiable gate: whole backward passes under the tolerance rule, gradcheck, and what
autograd is promised.
"""

from dataclasses import replace

import pytest
import torch

import cbam_fused
from cbam_fused import backends, reference
from cbam_fused.testing import attend, check_close, check_gate, layer_grad, run_gate
from tests.calls import DIFFERENTIABLE, call, differentiate, require_grad
from tests.cases import BY_NAME, CASES, RUNS, run_id


@pytest.mark.parametrize(
    "run", [r for r in RUNS if r[2] in ("nchw", "mixed", "sliced")], ids=run_id
)
def test_whole_gate_is_within_rounding(fused, run):
    case, dtype, layout = run
    check_gate(fused, *case.gates(dtype, layout))


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_autograd_runs_the_operations(backend, run):
    """Through autograd come, bit for bit, the results of the operations one after the other."""
    case, dtype, layout = run
    gate = case.gate(dtype, layout)
    # The operations are given x as NCHW or channels_last; of anything else they are given a copy.
    dense = gate.x if layout in ("channels_last", "mixed") else gate.x.contiguous()
    results, _ = run_gate(backend, replace(gate, x=dense))
    with cbam_fused.use_backend(backend.name):
        actual = differentiate(cbam_fused.cbam, gate)
    expected = {name: results.get(name if name == "y" else f"{name} grad") for name in actual}
    if gate.conv_weight is not None:
        taps = gate.conv_weight.numel()
        conv_grad = results["conv grad"].to(gate.conv_weight.dtype)
        expected["conv_weight"] = conv_grad[:taps].reshape(gate.conv_weight.shape)
        expected["conv_bias"] = conv_grad[taps:]
    if gate.norm_weight is not None:
        norm_grad = results["norm grad"].to(gate.norm_weight.dtype)
        expected["norm_bias"], expected["norm_weight"] = norm_grad.split(1)
    if gate.residual is gate.x:
        expected["x"] = expected["residual"] = results["x grad"] + results["residual grad"]
    for name, gradient in actual.items():
        torch.testing.assert_close(
            gradient,
            expected[name],
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_autograd_on_the_reference(fused, case):
    """No operation of the reference's backward is involved: only its forward pass and PyTorch's
    autograd.
    """
    runs = []
    for gate in case.gates(torch.float32, "nchw"):
        exact = gate.to(torch.float64)
        maxima = [attend(backends.get("reference"), g).channel_ties for g in (gate, exact)]
        if not torch.equal(*maxima):
            continue  # rounding moved a maximum
        with cbam_fused.use_backend(fused.name):
            actual = differentiate(cbam_fused.cbam, gate)
        eager = differentiate(reference.cbam, gate)
        runs.append((actual, eager, differentiate(reference.cbam, exact)))
    assert runs, "rounding moved a maximum in every draw"
    for results in (r for run in runs for r in run):
        if "conv_bias" in results:
            results["conv"] = layer_grad(results.pop("conv_weight"), results.pop("conv_bias"))
        if "norm_bias" in results:
            results["norm"] = layer_grad(results.pop("norm_weight"), results.pop("norm_bias"))
    for name in runs[0][0]:
        check_close(name, *(torch.stack([run[i][name] for run in runs]) for i in range(3)))


GRADCHECK = (
    "plain", "frozen", "no_norm", "no_affine", "no_bias", "conv_bias", "no_spatial",
    "no_spatial_relu", "k1", "k3",
    "avg", "max", "lp", "lse", "all_pools", "single_layer", "light", "residual", "residual_relu",
    "residual_relu6",
    "residual_x", "relu_alone",
)  # fmt: skip


@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(backend, name, ties):
    case = replace(BY_NAME[name], shape=(2, 3, 3, 4), ties=ties)
    hidden = None if case.hidden is None else 2
    kernel_size = None if case.kernel_size is None else min(case.kernel_size, 3)
    gate = require_grad(replace(case, hidden=hidden, kernel_size=kernel_size).gate(torch.float64))
    names = [n for n in DIFFERENTIABLE if getattr(gate, n) is not None]
    if gate.residual is gate.x:
        names.remove("residual")

    def function(*tensors):
        changed = replace(gate, **dict(zip(names, tensors, strict=True)))
        if gate.residual is gate.x:
            changed = replace(changed, residual=changed.x)
        return call(cbam_fused.cbam, changed)

    with cbam_fused.use_backend(backend.name):
        assert torch.autograd.gradcheck(function, [getattr(gate, n) for n in names])


@pytest.mark.parametrize(
    "names",
    [("x",), ("residual",), DIFFERENTIABLE[1:-1], ("mlp_weight2", "conv_weight"), ("norm_bias",)],
)
def test_gradients_do_not_depend_on_which_are_asked_for(backend, names):
    gate = BY_NAME["residual_relu"].gate()
    with cbam_fused.use_backend(backend.name):
        everything = differentiate(cbam_fused.cbam, gate)
        some = differentiate(cbam_fused.cbam, gate, names)
    for name, gradient in some.items():
        assert torch.equal(gradient, everything[name]), name


def test_gradient_of_a_sum_of_a_branch_not_used(backend):
    """The result need not be used: its gradient is then absent, and so are the others."""
    gate = require_grad(BY_NAME["plain"].gate())
    with cbam_fused.use_backend(backend.name):
        y = call(cbam_fused.cbam, gate)
    used = gate.x * 2
    grads = torch.autograd.grad((used + 0 * y).sum(), [gate.x, gate.mlp_weight1])
    assert torch.equal(grads[0], torch.full_like(gate.x, 2))
    assert torch.equal(grads[1], torch.zeros_like(gate.mlp_weight1))


SECOND_DERIVATIVE = "cbam: a second derivative is not implemented"


def first_derivative(backend, name):
    gate = require_grad(BY_NAME[name].gate())
    with cbam_fused.use_backend(backend.name):
        y = call(cbam_fused.cbam, gate)
    grad = gate.grad.clone().requires_grad_()
    inputs = [gate.x, gate.mlp_weight1, gate.conv_weight]
    return gate, grad, torch.autograd.grad(y, inputs, grad, create_graph=True)


@pytest.mark.parametrize("name", ["plain", "frozen", "residual_relu"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    "towards", ["x", "mlp_weight1", "mlp_weight2", "conv_weight", "norm_weight", "grad"]
)
def test_second_derivative_is_an_error(backend, name, which, towards):
    """A gradient penalty must not be silently wrong, whatever is differentiated."""
    gate, grad, gradients = first_derivative(backend, name)
    target = grad if towards == "grad" else getattr(gate, towards)
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        torch.autograd.grad(gradients[which].square().sum(), target)


def test_gradient_penalty_is_an_error_on_backward(backend):
    gate, _, gradients = first_derivative(backend, "plain")
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        gradients[0].norm().backward()
    assert gate.x.grad is None


PARAMETERS = ("mlp_weight1", "mlp_bias1", "mlp_weight2", "mlp_bias2", "conv_weight", "conv_bias",
              "norm_weight", "norm_bias")  # fmt: skip


def assert_second_derivative_is_an_error(backend, gate, leaf):
    with cbam_fused.use_backend(backend.name):
        y = call(cbam_fused.cbam, gate)
    (gradient,) = torch.autograd.grad(y, leaf, gate.grad, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        gradient.square().sum().backward()


@pytest.mark.parametrize("only", PARAMETERS)
def test_second_derivative_is_an_error_with_one_parameter_trainable(backend, only):
    gate = replace(BY_NAME["residual_relu"], mlp_bias=True, conv_bias=True).gate()
    parameter = getattr(gate, only).requires_grad_()
    assert_second_derivative_is_an_error(backend, gate, parameter)


def test_second_derivative_is_an_error_for_a_transposed_x(backend):
    """x is copied to a dense layout; its gradient still depends on x itself."""
    gate = BY_NAME["plain"].gate()
    x = gate.x.clone().requires_grad_()
    turned = replace(gate, x=x.transpose(2, 3), grad=gate.grad.transpose(2, 3))
    assert_second_derivative_is_an_error(backend, turned, x)


def test_no_grad_and_inference_mode(backend):
    gate = require_grad(BY_NAME["residual_relu6"].gate())
    with cbam_fused.use_backend(backend.name):
        expected = call(cbam_fused.cbam, gate)
        with torch.no_grad():
            plain = call(cbam_fused.cbam, gate)
        with torch.inference_mode():
            inference = call(cbam_fused.cbam, gate)
            training = call(cbam_fused.cbam, BY_NAME["plain"].gate())
    assert expected.requires_grad
    assert not plain.requires_grad
    assert not inference.requires_grad
    assert inference.is_inference()
    assert training.is_inference()
    for y in (plain, inference):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("name", "count"), [("plain", 1), ("residual", 1), ("residual_relu", 2), ("relu_ties_even", 1)]
)
def test_saved_for_backward(backend, name, count, layout):
    """One tensor as large as x, x itself; y too where an activation follows. The rest is maps."""
    case = replace(BY_NAME[name], shape=(2, 32, 9, 10))
    gate = require_grad(case.gate(torch.float32, layout))
    saved = []
    with (
        cbam_fused.use_backend(backend.name),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = call(cbam_fused.cbam, gate)
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= gate.x.numel()}
    assert len(large) == count
    assert gate.x.untyped_storage().data_ptr() in large
    assert count == 1 or y.untyped_storage().data_ptr() in large
    n, c, height, width = case.shape
    limit = max(2 * n * height * width, case.hidden * c, 2 * n * c)
    assert all(t.numel() <= limit for t in saved if t.untyped_storage().data_ptr() not in large)


def test_running_statistics_move_as_those_of_a_batch_norm(backend):
    case = BY_NAME["plain"]
    norm = torch.nn.BatchNorm2d(1, momentum=0.3).double()
    mean, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for draw in range(3):
        gate = replace(case.gate(torch.float64, draw=draw), running_mean=mean, running_var=var)
        norm(attend(backends.get("reference"), gate).logits[:, None])
        tensors = [getattr(gate, name) for name in DIFFERENTIABLE[:-1]]
        with cbam_fused.use_backend(backend.name):
            cbam_fused.cbam(*tensors, mean, var, batch_statistics=True, momentum=0.3)
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(var, norm.running_var, rtol=1e-13, atol=0)


def test_running_statistics_of_a_frozen_norm_stay(backend):
    gate = require_grad(BY_NAME["frozen"].gate())
    before = gate.running_mean.clone(), gate.running_var.clone()
    with cbam_fused.use_backend(backend.name):
        call(cbam_fused.cbam, gate).sum().backward()
    assert torch.equal(gate.running_mean, before[0])
    assert torch.equal(gate.running_var, before[1])
