"""Autocast: x in the autocast dtype, the gate and its parameters in float32."""

from dataclasses import replace

import pytest
import torch

import cbam_fused
from tests.calls import DIFFERENTIABLE, call, differentiate, require_grad
from tests.cases import BY_NAME

LOW = [torch.bfloat16, torch.float16]


def autocast(dtype: torch.dtype | None = None, enabled: bool = True) -> torch.autocast:
    """Autocast of the default device."""
    return torch.autocast(torch.get_default_device().type, dtype, enabled)


@pytest.fixture(autouse=True)
def chosen(backend):
    """Every test here runs with every backend."""
    with cbam_fused.use_backend(backend.name):
        yield backend


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "frozen", "residual_relu", "no_spatial_relu", "single_layer"]
)
def test_is_a_cast_of_x_and_nothing_else(dtype, name):
    gate = require_grad(BY_NAME[name].gate())
    with autocast(dtype):
        y = call(cbam_fused.cbam, gate)
    y.backward(gate.grad.to(dtype))

    residual = None if gate.residual is None else gate.residual.detach().to(dtype)
    low = replace(gate, x=gate.x.detach().to(dtype), residual=residual, grad=gate.grad.to(dtype))
    expected = require_grad(low)
    expected_y = call(cbam_fused.cbam, expected)
    expected_y.backward(expected.grad)

    assert y.dtype == dtype
    assert torch.equal(y, expected_y)
    for field in DIFFERENTIABLE:
        own = getattr(gate, field)
        if own is not None:
            assert own.grad.dtype == own.dtype == torch.float32, field
            assert torch.equal(own.grad, getattr(expected, field).grad.float()), field


def test_the_other_low_precision_is_cast_too():
    gate = BY_NAME["residual_relu"].gate(torch.float16)
    with autocast(torch.bfloat16):
        y = call(cbam_fused.cbam, gate)
    assert y.dtype == torch.bfloat16
    low = replace(gate, x=gate.x.bfloat16(), residual=gate.residual.bfloat16())
    assert torch.equal(y, call(cbam_fused.cbam, low))


def test_float64_is_left_alone():
    gate = BY_NAME["residual_relu"].gate(torch.float64)
    with autocast(torch.bfloat16):
        y = call(cbam_fused.cbam, gate)
    assert torch.equal(y, call(cbam_fused.cbam, gate))


def test_switched_off_inside():
    gate = BY_NAME["residual_relu"].gate()
    with autocast(torch.bfloat16), autocast(enabled=False):
        y = call(cbam_fused.cbam, gate)
    assert torch.equal(y, call(cbam_fused.cbam, gate))


def test_backward_inside_the_context_is_the_same():
    gate = BY_NAME["residual_relu"].gate(torch.bfloat16)
    expected = differentiate(cbam_fused.cbam, gate)
    with autocast(torch.bfloat16):
        actual = differentiate(cbam_fused.cbam, gate)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_compiles(chosen):
    if chosen.name == "reference":
        pytest.skip("a compiler may reorder its operations")
    torch._dynamo.reset()
    gate = require_grad(BY_NAME["frozen"].gate())
    device = torch.get_default_device().type

    def function(x):
        with torch.autocast(device, torch.bfloat16):
            return call(cbam_fused.cbam, replace(gate, x=x))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    y = compiled(gate.x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, function(gate.x))
