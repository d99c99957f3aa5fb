"""The gate inside what PyTorch wraps around models: torch.compile, functional_call, checkpoint."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import cbam_fused
from tests.calls import DIFFERENTIABLE, call
from tests.cases import BY_NAME


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def chosen(backend):
    """Every test here runs with every backend."""
    with cbam_fused.use_backend(backend.name):
        yield backend


class Block(torch.nn.Module):
    """A gate between two operations that a compiler can work on, its parameters those of a case."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        for name in DIFFERENTIABLE[1:-1]:
            value = getattr(gate, name)
            self.register_parameter(name, None if value is None else torch.nn.Parameter(value.clone()))
        for name in ("running_mean", "running_var"):
            initial = torch.full((1,), 0.5, dtype=gate.mlp_weight2.dtype)
            self.register_buffer(name, initial if gate.batch_statistics else getattr(gate, name))

    def forward(self, x):
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        residual = x.roll(1, 1) if self.gate.residual is not None else None
        return 2 * call(cbam_fused.cbam, replace(self.gate, x=x.tanh(), residual=residual, **own))


def step(function, block, x):
    """y and all gradients of one training step, by name, and the buffers after it."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = function(x)
    y.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    buffers = {name: b.clone() for name, b in block.named_buffers()}
    return {"y": y.detach(), "x": x.grad} | gradients | buffers


def assert_close(actual, expected):
    """Compiled and eager agree up to the order in which gradients are added; how exact they are is tested elsewhere."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["plain", "frozen", "residual_relu", "no_spatial", "light_even", "all_pools"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_training_compiles_as_one_graph(name, layout):
    gate = BY_NAME[name].gate(torch.float32, layout)
    eager, compiled = Block(gate), Block(gate)
    function = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        actual, expected = step(function, compiled, gate.x), step(eager, eager, gate.x)
        assert_close(actual, expected)
        assert actual["y"].stride() == expected["y"].stride()
        assert actual["x"].stride() == expected["x"].stride()


@pytest.mark.parametrize("name", ["frozen", "residual_relu6", "no_spatial"])
def test_inference_compiles_as_one_graph(name):
    block = Block(BY_NAME[name].gate()).requires_grad_(False)
    x = block.gate.x
    with torch.no_grad():
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, block(x))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_one_graph_for_all_sizes(layout, training):
    name = "residual_relu" if training else "frozen"
    case = BY_NAME[name]
    block = Block(case.gate(torch.float32, layout)).requires_grad_(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for n, height, width in ((2, 9, 10), (5, 9, 10), (3, 12, 7), (4, 6, 31)):
        x = replace(case, shape=(n, case.shape[1], height, width)).gate(torch.float32, layout).x
        x.requires_grad_(training)
        torch.testing.assert_close(compiled(x), block(x))
    assert counter.frame_count == 1


def test_inductor():
    gate = BY_NAME["residual_relu"].gate()
    eager, compiled = Block(gate), Block(gate)
    function = torch.compile(compiled, fullgraph=True)
    assert_close(step(function, compiled, gate.x), step(eager, eager, gate.x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    gate = BY_NAME["frozen"].gate()
    plain, recomputed = Block(gate), Block(gate)
    actual = step(lambda x: checkpoint(recomputed, x, use_reentrant=use_reentrant), recomputed, gate.x)
    expected = step(plain, plain, gate.x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_functional_call():
    gate = BY_NAME["frozen"].gate()
    block, other = Block(gate), Block(BY_NAME["frozen"].gate(draw=1))
    parameters = dict(other.named_parameters()) | dict(other.named_buffers())
    assert torch.equal(torch.func.functional_call(block, parameters, (gate.x,)), other(gate.x))
    assert not torch.equal(block(gate.x), other(gate.x))
