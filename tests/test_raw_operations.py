"""The compiled operations, called directly: what does not fit raises before anything is read."""

import pytest
import torch

from cbam_fused import backends
from tests.arguments import RESULTS, arguments
from tests.cases import BY_NAME

pytestmark = pytest.mark.skipif("cpu" not in backends.available(), reason="no compiled library")


def call(operation: str, **changed):
    """The operation on arguments that fit, but for those changed."""
    op = getattr(torch.ops.cbam_fused, operation).default
    return op(*(fitting(operation) | changed).values())


def fitting(operation: str) -> dict:
    values = arguments(BY_NAME["residual_relu"].gate())[operation]
    return dict(zip(names(operation), values, strict=True))


def names(operation: str) -> list[str]:
    op = getattr(torch.ops.cbam_fused, operation).default
    return [argument.name for argument in op._schema.arguments]


def tensors(operation: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in fitting(operation).items() if isinstance(v, torch.Tensor)}


TENSORS = [(operation, name) for operation in RESULTS for name in tensors(operation)]


@pytest.mark.parametrize(("operation", "name"), TENSORS, ids="-".join)
def test_a_tensor_that_does_not_fit(operation, name):
    tensor = tensors(operation)[name]
    for other in (tensor.unsqueeze(0), tensor.long()):
        with pytest.raises(RuntimeError, match=rf"{operation}: {name} must be .*; got "):
            call(operation, **{name: other})


@pytest.mark.parametrize(("operation", "name"), TENSORS, ids="-".join)
def test_a_tensor_on_another_device(operation, name):
    """The dispatcher calls the kernels for a GPU where any tensor is on one."""
    values = fitting(operation) | {name: tensors(operation)[name].to("meta")}
    op = getattr(torch.ops.cbam_fused, operation).default
    kernels = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=rf"{operation}: \w+ must be on the device of x"):
        op.redispatch(kernels, *values.values())


@pytest.mark.parametrize("operation", ["cbam_inference", "cbam_attend", "cbam_backward_input"])
@pytest.mark.parametrize("pool", ["", "avg+bogus", "avg++max", "avg+avg", "max+avg"])
def test_a_pool_that_is_none(operation, pool):
    with pytest.raises(RuntimeError, match=r"cbam: pool must be .*; got "):
        call(operation, pool=pool)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("cbam_inference", "maps"),
        ("cbam_attend", "ties"),
        ("cbam_apply", "activation"),
        ("cbam_backward_reduce", "activation"),
        ("cbam_backward_input", "maps"),
    ],
)
def test_an_unknown_option(operation, name):
    with pytest.raises(RuntimeError, match=rf"cbam: {name} must be .*; got other"):
        call(operation, **{name: "other"})


def test_no_hidden_units_and_indices_outside():
    c = tensors("cbam_attend")["x"].shape[1]
    empty = {"mlp_weight1": torch.empty(0, c), "mlp_bias1": torch.empty(0)}
    with pytest.raises(RuntimeError, match="mlp_weight1 must have at least 1 row"):
        call("cbam_attend", mlp_weight2=torch.empty(c, 0), **empty)
    ties = tensors("cbam_backward_input")["channel_ties"]
    with pytest.raises(RuntimeError, match="channel_ties must hold indices below C"):
        call("cbam_backward_input", channel_ties=ties + 1000)
