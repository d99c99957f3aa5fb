"""Fused blocks under what people do to models: copies, compilation, checkpointing, tracing."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbam_fused
from cbam_fused import fuse_, unfuse_
from cbam_fused.testing import check_close
from tests.blocks import (
    SHAPE,
    Block,
    Unit,
    branching_block,
    runs_fused,
    step,
    timm_block,
    watched,
)


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def another_process(monkeypatch):
    """What is loaded comes from a process of which this one knows nothing."""
    monkeypatch.setattr("cbam_fused.fuse.blocks._classes", {})


def test_a_copy_in_this_process_is_not_traced_again(monkeypatch):
    module = Block()
    fuse_(module)
    module.relu = nn.Tanh()
    monkeypatch.setattr("cbam_fused.fuse.blocks.trace", None)
    assert type(copy.deepcopy(module)) is type(save_and_load(module)) is type(module)


@pytest.mark.usefixtures("another_process")
@pytest.mark.parametrize("rebuild", [copy.deepcopy, copy.copy, save_and_load])
@pytest.mark.parametrize("make", [Block, Unit, timm_block])
def test_copies_stay_fused(rebuild, make):
    module = make().eval()
    base = type(module)
    fuse_(module)
    made = rebuild(module)
    assert type(made) is type(module)
    assert base.__qualname__ in repr(type(made))
    x = torch.randn(SHAPE)
    assert torch.equal(made(x), module(x))
    assert runs_fused(made)
    unfuse_(made)
    assert type(made) is base


@pytest.mark.usefixtures("another_process")
def test_a_copy_that_cannot_be_traced_is_the_original_class():
    module = Block()
    fuse_(module)
    module.gate = nn.Identity()
    assert type(copy.deepcopy(module)) is Block
    del module.gate
    assert type(copy.deepcopy(module)) is Block


def test_a_block_swapped_again_is_copied_as_it_is():
    module = Block()
    fuse_(module)
    module.__class__ = type("ShardedBlock", (type(module),), {})
    assert type(copy.deepcopy(module)) is type(module)


def test_parameters_replaced_and_checkpointing():
    module, other = Block().eval(), Block().eval()
    fuse_(module), fuse_(other)
    assert type(module) is type(other)
    x = torch.randn(SHAPE, requires_grad=True)
    assert torch.equal(torch.func.functional_call(module, other.state_dict(), (x,)), other(x))
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    y = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    torch.manual_seed(0)
    module = Unit().eval()
    own, x = copy.deepcopy(module), torch.randn(SHAPE)
    fuse_(module)
    with torch.autocast("cpu", dtype):
        assert runs_fused(module, x)
        check_close("output", module(x), own(x), own.double()(x.double()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [branching_block, Unit, timm_block])
def test_compile(make, training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = make().train(training)
    x = torch.randn(SHAPE)
    fuse_(module, strict=True)
    expected = step(copy.deepcopy(module), x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with watched() as calls:
        actual = step(compiled, x)
    assert calls == [(True, "relu")]
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name.replace("_orig_mod.", "")], msg=name)


def test_other_threads_run_while_a_block_is_traced(monkeypatch):
    module, other, x = Block(), Unit().eval(), torch.randn(SHAPE)
    expected, results = other(x), []

    def main(self, x):
        thread = threading.Thread(target=lambda: results.append(other(torch.ones_like(y) * y)))
        thread.start()
        thread.join()
        return self.norm(self.conv(x))

    y = x
    monkeypatch.setattr(Block, "main", main)
    assert fuse_(module).fused[0].epilogue == "add + relu"
    assert len(results) == 2
    assert all(torch.equal(result, expected) for result in results)


def test_fx_tracing():
    module = Block().eval()
    fuse_(module)
    traced = torch.fx.symbolic_trace(module)
    assert sum(node.target is cbam_fused.cbam for node in traced.graph.nodes) == 1
    x = torch.randn(SHAPE)
    torch.testing.assert_close(traced(x), module(x))
