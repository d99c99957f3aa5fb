"""Fused models saved in one process and loaded in another, where the code may be another version.

What is loaded stays fused where it computes the same, and else runs the forward it has there.
"""

import contextlib
import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from timm.layers.cbam import CbamModule, ChannelAttn
from timm.models.resnet import BasicBlock
from torch import nn

from cbam_fused import fuse_
from cbam_fused.fuse.swap import fusion_of
from tests import official
from tests.blocks import SHAPE, C, runs_fused, timm_block


@pytest.fixture
def another_process(monkeypatch):
    """What is loaded comes from a process of which this one knows nothing."""

    def start():
        monkeypatch.setattr("cbam_fused.fuse.gates._process", "another")
        monkeypatch.setattr("cbam_fused.fuse.gates._classes", {})
        monkeypatch.setattr("cbam_fused.fuse.blocks._classes", {})

    return start


def saved(model, **options):
    file = io.BytesIO()
    torch.save(model, file, **options)
    return file


def load(file, **options):
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


def scaled(own):
    """A forward of another version: twice what `own` returns."""
    return lambda self, x: 2 * own(self, x)


def _another_epilogue(self, x):
    """A forward of another version of timm's block, without a downsample."""
    y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
    return self.act2(self.se(y) - x)


def _another_order(self, x):
    """Another epilogue that can be fused: the shortcut added without a ReLU."""
    return self.se(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))) + x


def _another_child(self, x):
    """It reads a child that what was saved has not."""
    return self.act2(self.se(self.norm2(self.conv1(x))) + x)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_code_stays_fused(another_process, legacy):
    model = timm_block().eval()
    fuse_(model, strict=True)
    file = saved(model, _use_new_zipfile_serialization=not legacy)
    another_process()
    made = load(file)
    assert runs_fused(made)
    x = torch.randn(SHAPE)
    assert torch.equal(made(x), model(x))
    assert type(copy.deepcopy(made).se) is type(made.se)


@pytest.mark.parametrize(
    ("make", "changed", "name"),
    [
        (lambda: CbamModule(C), CbamModule, "forward"),
        (lambda: CbamModule(C), ChannelAttn, "forward"),
        (lambda: official.CBAM(C, 4, ["lse"]), official, "logsumexp_2d"),
    ],
    ids=["its_own", "a_layers", "a_function"],
)
def test_a_gate_of_another_version_runs_its_own_forward(
    make, changed, name, another_process, monkeypatch
):
    torch.manual_seed(0)
    gate = make().eval()
    own, x = copy.deepcopy(gate), torch.randn(SHAPE)
    fuse_(gate, strict=True)
    before, file = gate(x), saved(gate)
    another_process()
    function = getattr(changed, name)
    other = scaled(function) if name == "forward" else lambda z: function(z) + 1
    monkeypatch.setattr(changed, name, other)
    message = f"a {type(own).__name__} that was saved fused is not fused here, but runs its own for"
    with pytest.warns(UserWarning, match=message):
        made = load(file)
    assert fusion_of(made) is None
    assert torch.equal(made(x), own(x))
    assert not torch.allclose(made(x), before)


def test_a_gate_whose_code_changed_and_computes_the_same_stays_fused(another_process, monkeypatch):
    gate = CbamModule(C)
    fuse_(gate, strict=True)
    file = saved(gate)
    another_process()
    own = CbamModule.forward
    monkeypatch.setattr(CbamModule, "forward", lambda self, x: own(self, x))
    assert fusion_of(load(file)).forward is CbamModule.forward


def test_a_copy_made_after_a_forward_was_replaced_is_compared(monkeypatch):
    gate = CbamModule(C).eval()
    fuse_(gate, strict=True)
    monkeypatch.setattr(CbamModule, "forward", scaled(CbamModule.forward))
    with pytest.warns(UserWarning, match="runs its own forward: its own forward computes someth"):
        made = copy.deepcopy(gate)
    x = torch.randn(SHAPE)
    assert torch.equal(made(x), gate(x))


def test_what_cannot_be_compared_is_not_fused(another_process):
    gate = CbamModule(C)
    fuse_(gate, strict=True)
    file = saved(gate)
    another_process()
    with pytest.warns(
        UserWarning, match="runs its own forward: its parameters are on the meta dev"
    ):
        made = load(file, map_location="meta")
    assert type(made) is CbamModule


@pytest.mark.parametrize(
    ("forward", "fused"),
    [(_another_epilogue, False), (_another_order, True), (_another_child, False)],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["copy", "another_process"])
def test_a_block_of_another_version_runs_its_own_forward(
    forward, fused, elsewhere, another_process, monkeypatch
):
    torch.manual_seed(0)
    module = timm_block().eval()
    own, x = copy.deepcopy(module), torch.randn(SHAPE)
    fuse_(module, strict=True)
    file = saved(module)
    monkeypatch.setattr(BasicBlock, "forward", forward)
    if elsewhere:
        another_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = load(file)
    assert isinstance(made, BasicBlock)
    assert fusion_of(made.se)
    raised = (
        pytest.raises(AttributeError) if forward is _another_child else contextlib.nullcontext()
    )
    with raised:
        assert runs_fused(made, x) == (fused and elsewhere)
        torch.testing.assert_close(made(x), own(x))


def test_in_a_process_that_knows_nothing(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 1), timm_block()).eval()
    fuse_(model, strict=True)
    x = torch.randn(2, 3, 6, 6)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch; from tests.blocks import runs_fused;"
        "model, x, y = torch.load(sys.argv[1], weights_only=False);"
        "assert runs_fused(model, x); assert torch.equal(model(x), y)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)
