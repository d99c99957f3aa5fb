"""Parameters in the dtype of x or in the compute dtype: the operations take both as they are."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cbam_fused
from cbam_fused import backends
from tests.calls import DIFFERENTIABLE, PARAMETERS, call, require_grad
from tests.cases import BY_NAME

LOW = [torch.bfloat16, torch.float16]
CASES = ["plain", "frozen", "residual_relu", "no_spatial_relu", "light"]


def in_dtype(gate, names, dtype):
    values = {name: getattr(gate, name) for name in names}
    return replace(gate, **{k: v.detach().to(dtype) for k, v in values.items() if v is not None})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wide", ["mlp", "conv", "norm", "running"])
def test_a_wider_copy_gives_the_same(backend, name, dtype, wide):
    """Widening is exact: so are the results, and the gradients up to their last rounding."""
    gate = in_dtype(BY_NAME[name].gate(dtype), PARAMETERS, dtype)
    wider = in_dtype(gate, [n for n in PARAMETERS if n.startswith(wide)], torch.float32)
    gates = [require_grad(gate), require_grad(wider)]
    with cbam_fused.use_backend(backend.name):
        y, wide_y = (call(cbam_fused.cbam, g) for g in gates)
        assert torch.equal(y, wide_y)
        for result, g in zip((y, wide_y), gates, strict=True):
            result.backward(g.grad)
    for field in DIFFERENTIABLE:
        own, other = (getattr(g, field) for g in gates)
        if own is not None:
            assert own.grad.dtype == own.dtype
            assert torch.equal(own.grad, other.grad.to(own.dtype)), field


class Recorded(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in backends.available(), reason="no compiled library")
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_cast(parameters):
    gate = in_dtype(BY_NAME["frozen"].gate(torch.bfloat16), PARAMETERS, parameters)
    with cbam_fused.use_backend("cpu"), torch.inference_mode(), Recorded() as recorded:
        call(cbam_fused.cbam, gate)
    assert recorded.names == ["cbam_inference"]
