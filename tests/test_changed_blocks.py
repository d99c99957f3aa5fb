"""Fused blocks that were changed, or in which something acts: they run as they are written."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from cbam_fused import fuse_, unfuse_
from tests import official
from tests.blocks import (
    SHAPE,
    Block,
    C,
    block,
    branching_block,
    runs_fused,
    step,
    timm_block,
    watched,
)


def _hooks():
    registrations = (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    )
    for part in ("gate", "relu", "drop_path"):
        for name in registrations:
            yield pytest.param(part, name, id=f"{part}-{name}")


def dropping_block():
    """With a drop path, and nothing in place, which hooks on the backward do not allow."""
    module = block(lambda self, x: self.relu(self.drop_path(self.gate(self.main(x))) + x))()
    module.relu, module.drop_path = nn.ReLU(), DropPath(0.1)
    return module


@pytest.mark.parametrize(("part", "register"), [*_hooks()])
def test_hooks_in_the_tail_run(part, register):
    module = dropping_block().eval()
    fuse_(module)
    assert runs_fused(module)
    calls = []
    handle = getattr(module.get_submodule(part), register)(lambda *_: calls.append(1))
    with watched() as fused:
        step(module, torch.randn(SHAPE))
    assert calls
    assert fused == [(False, "none")]
    handle.remove()
    assert runs_fused(module)


def test_hooks_elsewhere_in_the_block_run_with_the_fused_tail():
    module, calls = timm_block(), []
    fuse_(module)
    for part in (module, module.conv1, module.bn2):
        part.register_forward_hook(lambda part, *_: calls.append(part))
    assert runs_fused(module)
    assert calls == [module.conv1, module.bn2, module]


def test_hooks_on_all_modules_run():
    module, seen = Block(), []
    fuse_(module)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert not runs_fused(module)
    finally:
        handle.remove()
    assert module.relu in seen


def _set_forward(part):
    part.forward = lambda x: -x


def _changes():
    """What may be done to a fused block; all are to be honoured."""
    return {
        "relu_replaced": lambda m: setattr(m, "act2", nn.Tanh()),
        "relu_own_forward": lambda m: _set_forward(m.act2),
        "gate_own_forward": lambda m: _set_forward(m.se),
        "gate_replaced": lambda m: setattr(m, "se", nn.Identity()),
        "gate_removed": lambda m: setattr(m, "se", None),
        "gate_unfused": lambda m: unfuse_(m.se),
        "drop_path_added": lambda m: setattr(m, "drop_path", nn.Tanh()),
        "downsample_added": lambda m: setattr(m, "downsample", nn.Conv2d(C, C, 1)),
        "aa_replaced": lambda m: setattr(m, "aa", nn.Tanh()),
        "child_removed": lambda m: delattr(m, "drop_block") or setattr(m, "drop_block", torch.tanh),
        "own_layer": lambda m: m.se.channel.register_forward_hook(lambda *_: None),
    }


@pytest.mark.parametrize("change", _changes())
def test_a_changed_block_runs_as_it_was(change):
    torch.manual_seed(0)
    module, x = timm_block().eval(), torch.randn(SHAPE)
    own = copy.deepcopy(module)
    fuse_(module)
    assert runs_fused(module)
    _changes()[change](module)
    if change != "gate_unfused":
        _changes()[change](own)
    if "downsample" in change:
        own.downsample = module.downsample
    assert not runs_fused(module, x)
    torch.testing.assert_close(module(x), own(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, _: m.sizes.__setitem__(0, 0),
        lambda m, _: setattr(m, "mode", "off"),
        lambda m, _: setattr(m, "mode", ["off"]),
        lambda m, _: setattr(m, "function", torch.tanh),
        lambda m, _: setattr(m, "bias", 1.0),
        lambda m, _: setattr(m, "bias", nn.Parameter(torch.ones(1))),
        lambda m, _: m.register_buffer("bias", torch.ones(1)),
        lambda m, _: setattr(m, "rest", torch.tanh),
        lambda _, patch: patch.setattr(Block, "main", lambda self, x: self.conv(x)),
    ],
)
def test_what_the_forward_read_is_compared(change, monkeypatch):
    torch.manual_seed(0)
    module, x = branching_block().eval(), torch.randn(SHAPE)
    fuse_(module)
    assert runs_fused(module)
    base = type(module).__mro__[1]
    module.unrelated = "no matter"
    assert runs_fused(module)
    change(module, monkeypatch)
    assert not runs_fused(module)
    assert torch.equal(module(x), base.forward(module, x))


class Derived(Block):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("cls", [Derived, Block, nn.ReLU, nn.Conv2d, official.CBAM])
def test_a_forward_replaced_on_a_class_is_used(cls, monkeypatch):
    module, calls = Derived(), []
    fuse_(module)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: calls.append(1) or own(self, x))
    assert not runs_fused(module)
    assert calls


def test_layers_of_a_projection_are_compared():
    module = Block(project=True)
    fuse_(module)
    module.project[1] = nn.BatchNorm2d(C)
    assert runs_fused(module)
    module.project.append(nn.Tanh())
    assert not runs_fused(module)


def test_conversion_of_norms_keeps_the_epilogue():
    module = Block(project=True)
    fuse_(module)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module).eval()
    assert isinstance(module.norm, nn.SyncBatchNorm)
    assert runs_fused(module)


def test_drop_path_acts_in_training():
    torch.manual_seed(0)
    module = timm_block(drop_path=DropPath(0.5))
    row = fuse_(module).fused[0]
    assert row.alone == "but not while drop_path drops paths, which is in training mode"
    x = torch.randn(8, C, 5, 6)
    own = copy.deepcopy(module)
    unfuse_(own)
    torch.manual_seed(1)
    with watched() as calls:
        y = module(x)
    assert calls == [(False, "none")]
    torch.manual_seed(1)
    torch.testing.assert_close(y, own(x))
    module.drop_path.drop_prob = 0.0
    assert runs_fused(module)
    module.drop_path.drop_prob = 0.5
    assert runs_fused(module.eval())


def test_a_shortcut_that_is_broadcast_or_promoted():
    module = block(lambda self, x: self.relu(self.gate(x) + self.project(x)))()
    module.project = nn.AdaptiveAvgPool2d(1)
    own, x = copy.deepcopy(module), torch.randn(SHAPE)
    fuse_(module)
    assert not runs_fused(module, x)
    torch.testing.assert_close(module(x), own(x))
    module = block(lambda self, x: self.relu(self.gate(x) + x))().eval()
    own = copy.deepcopy(module)
    fuse_(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == own(x).dtype == torch.float32
        assert not runs_fused(module, x)
        assert runs_fused(module.bfloat16(), x.bfloat16())


def test_a_shortcut_that_is_a_number():
    module = block(lambda self, x: self.relu(self.gate(x) + x.size(0)))()
    own, x = copy.deepcopy(module), torch.randn(SHAPE)
    fuse_(module)
    assert not runs_fused(module, x)
    torch.testing.assert_close(module(x), own(x))
