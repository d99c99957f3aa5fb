"""What torch.compile, torch.export and every caller rely on: schemas, fake results, strides,
devices.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cbam_fused
from cbam_fused import backends, library
from cbam_fused.schemas import NAMESPACE, SCHEMAS
from tests.arguments import RESULTS, arguments
from tests.calls import call, require_grad
from tests.cases import BY_NAME, LAYOUTS
from tests.usable import USABLE

NAMES = (
    "residual_relu",
    "no_spatial",
    "all_pools",
    "light_even",
    "single_layer",
    "residual_x",
    "frozen",
    "n0",
    "hw1",
)
IN_EVERY_LAYOUT = [(name, "nchw") for name in NAMES] + [
    ("residual_relu", layout) for layout in LAYOUTS if layout != "nchw"
]


def test_the_library_is_loaded():
    """Without it half of the tests would be skipped in silence."""
    assert library.loaded, library.reason


@pytest.mark.parametrize("operation", SCHEMAS)
def test_the_registered_schema_is_the_written_one(operation):
    registered = getattr(getattr(torch.ops, NAMESPACE), operation).default._schema
    assert registered == torch._C.parse_schema(f"{NAMESPACE}::{operation}{SCHEMAS[operation]}")
    written = {a.name for a in registered.arguments if a.alias_info and a.alias_info.is_write}
    assert written == ({"running_mean", "running_var"} if operation == "cbam_attend" else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "layout"), IN_EVERY_LAYOUT)
@pytest.mark.parametrize("operation", SCHEMAS)
def test_opcheck(operation, name, layout, dtype):
    values = arguments(BY_NAME[name].gate(dtype, layout))[operation]
    torch.library.opcheck(getattr(torch.ops.cbam_fused, operation).default, values)


def described(results):
    results = (results,) if isinstance(results, torch.Tensor) else results
    return [(list(r.shape), r.dtype, r.stride()) for r in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "layout"), IN_EVERY_LAYOUT)
@pytest.mark.parametrize("operation", SCHEMAS)
def test_fake_results_are_like_the_real_ones(backend, operation, name, layout, dtype):
    values = arguments(BY_NAME[name].gate(dtype, layout))[operation]
    real = described(getattr(backend, operation)(*values))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in values]
        expected = described(getattr(torch.ops.cbam_fused, operation)(*fake))
    assert dict(zip(RESULTS[operation], real, strict=True)) == dict(
        zip(RESULTS[operation], expected, strict=True)
    )


@pytest.mark.parametrize("operation", SCHEMAS)
def test_operations_on_meta_tensors(operation):
    values = arguments(BY_NAME["residual_relu"].gate(torch.bfloat16, "channels_last"))[operation]
    function = getattr(torch.ops.cbam_fused, operation)
    on_meta = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in values]
    assert described(function(*on_meta)) == described(function(*values))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gate_on_meta_tensors(layout):
    gate = BY_NAME["residual_relu"].gate(torch.float32, layout)
    gate = require_grad(
        replace(
            gate, **{k: v.to("meta") for k, v in vars(gate).items() if isinstance(v, torch.Tensor)}
        )
    )
    y = call(cbam_fused.cbam, gate)
    y.backward(gate.grad)
    assert described(y) == described(torch.empty_like(gate.x))
    assert described(gate.x.grad) == described(gate.x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["residual_relu", "frozen", "hw1", "c1"])
def test_y_is_in_the_layout_of_x(backend, name, layout):
    """NCHW for NCHW, channels_last for channels_last, NCHW for anything else; so is the gradient of
    x.
    """
    gate = BY_NAME[name].gate(torch.float32, layout)
    dense = gate.x.is_contiguous() or gate.x.is_contiguous(memory_format=torch.channels_last)
    expected = torch.empty_like(gate.x if dense else gate.x.contiguous()).stride()
    with cbam_fused.use_backend(backend.name):
        assert call(cbam_fused.cbam, gate).stride() == expected
        gate = require_grad(gate)
        y = call(cbam_fused.cbam, gate)
        (x_grad,) = torch.autograd.grad(y, gate.x, gate.grad)
    assert y.stride() == expected
    assert x_grad.stride() == expected


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match=r"cbam_fused: backend must be one of .*; got 'gpu'"):
        backends.get("gpu")


def test_use_backend_nests_and_ends():
    device = torch.device("cpu")
    automatic = backends.choose(device)[0].name
    with cbam_fused.use_backend("reference"):
        assert backends.choose(device)[0].name == "reference"
        with cbam_fused.use_backend(None):
            assert backends.choose(device)[0].name == automatic
        assert backends.choose(device)[0].name == "reference"
    assert backends.choose(device)[0].name == automatic


def test_backward_uses_the_backend_of_its_forward(backend):
    gate = require_grad(BY_NAME["plain"].gate())
    with cbam_fused.use_backend(backend.name):
        y = call(cbam_fused.cbam, gate)
        (expected,) = torch.autograd.grad(y, gate.x, gate.grad, retain_graph=True)
    for other in USABLE:
        with cbam_fused.use_backend(other):
            (actual,) = torch.autograd.grad(y, gate.x, gate.grad, retain_graph=True)
        assert torch.equal(actual, expected)
