"""The gate inside what PyTorch wraps around models: torch.compile, functional_call, checkpoint."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cbam_fused
from cbam_fused import reference
from cbam_fused.testing import check_close
from tests.calls import DIFFERENTIABLE
from tests.cases import BY_NAME


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(torch.nn.Module):
    """A gate with the parameters of a case, among operations that a compiler can fuse and that do
    not round.
    """

    def __init__(self, gate, function=cbam_fused.cbam):
        super().__init__()
        self.function = function
        self.add = gate.residual is not None
        for name in DIFFERENTIABLE[1:-1]:
            value = getattr(gate, name)
            self.register_parameter(
                name, None if value is None else torch.nn.Parameter(value.clone())
            )
        for name in ("running_mean", "running_var"):
            initial = torch.full((1,), 0.5, dtype=gate.mlp_weight2.dtype)
            self.register_buffer(name, initial if gate.batch_statistics else getattr(gate, name))
        options = ("batch_statistics", "eps", "pool", "maps", "ties", "activation")
        self.options = {name: getattr(gate, name) for name in options}

    def forward(self, x):
        tensors = [getattr(self, name) for name in DIFFERENTIABLE[1:-1]]
        residual = x.roll(1, 1) if self.add else None
        y = self.function(
            0.5 * x,
            *tensors,
            self.running_mean,
            self.running_var,
            residual=residual,
            **self.options,
        )
        return 2 * y


def step(function, block, x) -> dict[str, Tensor]:
    """y and all gradients of one training step, by name, and the buffers after it."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    y = function(x)
    y.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    buffers = {name: b.clone() for name, b in block.named_buffers()}
    return {"y": y.detach(), "x": x.grad} | gradients | buffers


def assert_same(actual, expected):
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"not bitwise equal: {', '.join(different)}"
    for name in ("y", "x"):
        assert actual[name].stride() == expected[name].stride()


@pytest.fixture
def with_fused(fused):
    with cbam_fused.use_backend(fused.name):
        yield


@pytest.mark.parametrize(
    "name", ["plain", "frozen", "residual_relu", "no_spatial", "light_even", "all_pools"]
)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_training_compiles_as_one_graph(with_fused, name, layout):
    gate = BY_NAME[name].gate(torch.float32, layout)
    eager, compiled = Block(gate), Block(gate)
    function = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same(step(function, compiled, gate.x), step(eager, eager, gate.x))


@pytest.mark.parametrize("name", ["frozen", "residual_relu6", "no_spatial"])
def test_inference_compiles_as_one_graph(with_fused, name):
    gate = BY_NAME[name].gate()
    block = Block(gate).requires_grad_(False)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(gate.x), block(gate.x))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_one_graph_for_all_sizes(with_fused, layout, training):
    case = BY_NAME["residual_relu" if training else "frozen"]
    block = Block(case.gate()).requires_grad_(training)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, height, width in ((2, 9, 10), (5, 9, 10), (3, 12, 7), (4, 6, 31)):
        x = replace(case, shape=(n, case.shape[1], height, width)).gate(torch.float32, layout).x
        if training:
            before = {name: b.clone() for name, b in block.named_buffers()}
            actual = step(compiled, block, x)
            block.load_state_dict(before, strict=False)
            assert_same(actual, step(block, block, x))
        else:
            assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_x_is_its_own_residual(with_fused, training):
    gate = BY_NAME["plain"].gate()
    x = gate.x.requires_grad_(training)

    def function(x):
        options = {"residual": x, "batch_statistics": training}
        return cbam_fused.cbam(x, *gate.mlp, *gate.conv, **options)

    expected, y = function(x), torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, expected)
    if training:
        (grad,), (expected_grad,) = (torch.autograd.grad(v.sum(), x) for v in (y, expected))
        assert torch.equal(grad, expected_grad)


def test_inductor(with_fused):
    gate = BY_NAME["residual_relu"].gate()
    eager, compiled = Block(gate), Block(gate)
    function = torch.compile(compiled, fullgraph=True)
    assert_same(step(function, compiled, gate.x), step(eager, eager, gate.x))


def test_the_reference_backend_compiles():
    """Its operations are PyTorch's, which a compiler may reorder."""
    gate = BY_NAME["frozen"].gate()
    with cbam_fused.use_backend("reference"):
        block = Block(gate)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        actual = step(compiled, block, gate.x)
    eager, exact = Block(gate, reference.cbam), Block(gate.to(torch.float64), reference.cbam)
    eager_results = step(eager, eager, gate.x)
    for name, expected in step(exact, exact, gate.x.double()).items():
        check_close(name, actual[name], eager_results[name], expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant):
    gate = BY_NAME["frozen"].gate()
    plain, recomputed = Block(gate), Block(gate)
    with cbam_fused.use_backend(backend.name):
        actual = step(
            lambda x: checkpoint(recomputed, x, use_reentrant=use_reentrant), recomputed, gate.x
        )
        assert_same(actual, step(plain, plain, gate.x))


def test_functional_call(backend):
    gate = BY_NAME["frozen"].gate()
    block, other = Block(gate), Block(BY_NAME["frozen"].gate(draw=1))
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    with cbam_fused.use_backend(backend.name):
        y = torch.func.functional_call(block, state, (gate.x,))
        assert torch.equal(y, other(gate.x))
        assert not torch.equal(y, block(gate.x))
