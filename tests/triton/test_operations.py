"""The kernels as operations of PyTorch: schemas, fake results, and whatever watches operations."""

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import cbam_fused
from cbam_fused import backends, triton_backend
from cbam_fused.schemas import SCHEMAS
from tests.arguments import RESULTS, arguments
from tests.calls import call
from tests.cases import BY_NAME
from tests.fingerprint import fingerprint

LAYOUTS = ("nchw", "channels_last")


def registered(operation):
    return getattr(getattr(torch.ops, triton_backend.NAMESPACE), operation).default


def hashes(operation, results):
    results = (results,) if isinstance(results, torch.Tensor) else results
    return fingerprint(dict(zip(RESULTS[operation], results, strict=True)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["residual_relu", "no_spatial", "light_even", "single_layer"])
@pytest.mark.parametrize("operation", SCHEMAS)
def test_opcheck(operation, name, layout):
    values = arguments(BY_NAME[name].gate(torch.bfloat16, layout))[operation]
    torch.library.opcheck(registered(operation), values)


def test_opcheck_with_running_statistics():
    gate = BY_NAME["plain"].gate()
    values = list(arguments(gate)["cbam_attend"])
    first = next(i for i, value in enumerate(values) if value is True) + 1
    values[first : first + 3] = torch.zeros(1), torch.ones(1), 0.5
    torch.library.opcheck(registered("cbam_attend"), tuple(values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", SCHEMAS)
def test_the_operation_is_the_kernels(operation, layout):
    values = arguments(BY_NAME["residual_relu"].gate(torch.float32, layout))[operation]
    direct = getattr(backends.get("triton"), operation)(*values)
    assert hashes(operation, registered(operation)(*values)) == hashes(operation, direct)


def gate_function(gate):
    def function(x):
        with cbam_fused.use_backend("triton"):
            return call(cbam_fused.cbam, replace_x(gate, x))

    return function


def replace_x(gate, x):
    return type(gate)(**(vars(gate) | {"x": x}))


def test_a_tracer_sees_the_operation():
    gate = BY_NAME["frozen"].gate()
    function = gate_function(gate)
    expected = function(gate.x)
    traced = make_fx(function)(gate.x)
    assert "cbam_fused_triton.cbam_inference" in traced.code
    assert torch.equal(traced(gate.x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated, and of constants
        scripted = torch.jit.trace(function, gate.x, check_trace=False)
    assert "cbam_fused_triton::cbam_inference" in str(scripted.graph)
    assert torch.equal(scripted(gate.x), expected)


def test_export_and_fake_tensors():
    gate = BY_NAME["frozen"].gate()

    class Module(torch.nn.Module):
        def forward(self, x):
            return gate_function(gate)(x)

    program = torch.export.export(Module(), (gate.x,))
    assert "cbam_fused_triton.cbam_inference" in program.graph_module.code
    assert torch.equal(program.module()(gate.x), Module()(gate.x))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = gate_function(gate)(mode.from_tensor(gate.x))
    assert (fake.shape, fake.stride()) == (gate.x.shape, gate.x.stride())


def test_other_devices_are_refused():
    message = "backend triton is not usable for tensors on meta: its interpreter runs on a cpu"
    with pytest.raises(RuntimeError, match=message):
        backends.get("triton", torch.device("meta"))


def test_on_a_cpu_triton_is_used_only_when_asked_for():
    assert backends.choose(torch.device("cpu"))[0].name != "triton"
    with cbam_fused.use_backend("triton"):
        assert backends.choose(torch.device("cpu"))[0].name == "triton"
