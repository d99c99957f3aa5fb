"""CUDA graphs: a captured gate computes, at every replay, what a call would."""

from dataclasses import replace

import pytest
import torch

import cbam_fused
from tests.calls import DIFFERENTIABLE, call, require_grad
from tests.cases import BY_NAME
from tests.gpu import require_gpu

require_gpu()


@pytest.fixture(autouse=True)
def chosen(backend):
    """Every test here runs with every backend."""
    with cbam_fused.use_backend(backend.name):
        yield


LAYOUTS = ("nchw", "channels_last")
SHAPE = (4, 64, 14, 14)


def capture(function):
    """The graph of `function`, and what it returned: tensors that each replay writes."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["frozen", "residual_relu6", "no_spatial", "all_pools"])
def test_inference(name, layout):
    case = replace(BY_NAME[name], shape=SHAPE, norm="frozen")
    gate = case.gate(torch.bfloat16, layout)
    graph, y = capture(lambda: call(cbam_fused.cbam, gate))
    for draw in range(1, 4):
        gate.x.copy_(case.gate(torch.bfloat16, layout, draw).x)
        graph.replay()
        assert torch.equal(y, call(cbam_fused.cbam, gate))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "residual_relu", "relu_ties_even"])
def test_training_step(name, layout):
    case = replace(BY_NAME[name], shape=SHAPE)
    gate = require_grad(case.gate(torch.float32, layout))
    leaves = [getattr(gate, n) for n in DIFFERENTIABLE if getattr(gate, n) is not None]

    def step():
        y = call(cbam_fused.cbam, gate)
        return [y.detach(), *torch.autograd.grad(y, leaves, gate.grad)]

    graph, results = capture(step)
    for draw in range(1, 4):
        other = case.gate(torch.float32, layout, draw)
        with torch.no_grad():
            gate.x.copy_(other.x)
            gate.grad.copy_(other.grad)
        graph.replay()
        for actual, expected in zip(results, step(), strict=True):
            assert torch.equal(actual, expected)


def test_running_statistics_move_at_every_replay():
    gate = replace(BY_NAME["plain"], shape=SHAPE).gate()
    mean, var = torch.zeros(1), torch.ones(1)
    captured = replace(gate, running_mean=mean, running_var=var)
    graph, _ = capture(lambda: call(cbam_fused.cbam, captured))
    mean.zero_()
    var.fill_(1)
    for _ in range(3):
        graph.replay()
    called = replace(gate, running_mean=torch.zeros(1), running_var=torch.ones(1))
    for _ in range(3):
        call(cbam_fused.cbam, called)
    assert torch.equal(mean, called.running_mean)
    assert torch.equal(var, called.running_var)
    assert not torch.equal(mean, torch.zeros(1))


@pytest.mark.alone
def test_a_thousand_replays():
    case = replace(BY_NAME["plain"], shape=(8, 256, 28, 28), hidden=16)
    gate = require_grad(case.gate(torch.bfloat16))
    leaves = [gate.x, gate.mlp_weight1, gate.conv_weight, gate.norm_weight]

    def step():
        y = call(cbam_fused.cbam, gate)
        return [y.detach(), *torch.autograd.grad(y, leaves, gate.grad)]

    expected = step()
    graph, results = capture(step)
    different = torch.zeros(len(expected), dtype=torch.int64)
    for _ in range(1000):
        graph.replay()
        different += torch.stack(
            [(a != b).any() for a, b in zip(results, expected, strict=True)]
        ).long()
    assert not different.any(), different.tolist()
