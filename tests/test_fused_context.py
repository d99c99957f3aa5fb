"""`fused`: a model whose gates are fused within a with block."""

import copy

import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import nn

from cbam_fused import fuse_, fused, unfuse_
from cbam_fused.fuse.swap import fusion_of
from tests import official
from tests.gates import resnet


def model_of_two():
    return nn.Sequential(official.CBAM(32), CbamModule(32)).eval()


def classes(model):
    return [type(module) for module in model.modules()]


def test_gates_are_fused_within_and_restored_after():
    model, x = model_of_two(), torch.randn(2, 32, 5, 5)
    before, state, y = classes(model), model.__dict__.copy(), model(x)
    with fused(model) as report:
        assert len(report.fused) == 2
        assert all(fusion_of(gate) for gate in model)
        torch.testing.assert_close(model(x), y)
    assert classes(model) == before
    assert model.__dict__ == state
    assert torch.equal(model(x), y)


def test_blocks_are_restored_too():
    model = resnet("cbam").eval()
    before = classes(model)
    with fused(model) as report:
        assert {gate.epilogue for gate in report.gates} == {"add + relu"}
        assert len({type(block) for block in model.layer1} & set(before)) == 0
    assert classes(model) == before
    with fused(model, epilogue=False) as report:
        assert {gate.epilogue for gate in report.gates} == {""}


def test_gates_are_restored_after_an_exception():
    model = model_of_two()
    before = classes(model)
    with pytest.raises(KeyError, match="within"), fused(model):
        raise KeyError("within")
    assert classes(model) == before


def test_what_was_fused_before_stays_fused():
    model = model_of_two()
    fuse_(model, lambda _, name: name == "0")
    before = classes(model)
    with fused(model, strict=True) as report:
        assert [gate.status for gate in report.gates] == ["already fused", "fused"]
    assert classes(model) == before


def test_what_is_fused_or_unfused_within_stays_so():
    model = model_of_two()
    with fused(model, lambda _, name: name == "0"):
        unfuse_(model)
        fuse_(model, lambda _, name: name == "1")
        copied = copy.deepcopy(model)
    assert [fusion_of(gate) is not None for gate in model] == [False, True]
    assert len(unfuse_(copied)) == 1


def test_blocks_nest():
    model = model_of_two()
    with fused(model, lambda _, name: name == "0"):
        with fused(model):
            assert all(fusion_of(gate) for gate in model)
        assert [fusion_of(gate) is not None for gate in model] == [True, False]
    assert not any(fusion_of(gate) for gate in model)


def test_the_model_itself_and_a_gate_taken_out_are_restored():
    gate = official.CBAM(32)
    with fused(gate):
        assert type(gate) is not official.CBAM
    assert type(gate) is official.CBAM
    model = nn.Sequential(gate)
    with fused(model):
        model[0] = nn.Identity()
    assert type(gate) is official.CBAM


def test_options_are_those_of_fuse():
    model = nn.Sequential(nn.ReLU())
    with (
        pytest.raises(RuntimeError, match=r"^fuse_: strict, and there is"),
        fused(model, strict=True),
    ):
        pass
    gate = official.CBAM(32)
    with fused(gate, verify=False) as report:
        assert report.fused[0].reason == "not verified, as asked"


def test_a_class_swapped_again_within_is_not_restored():
    model = model_of_two()

    def swap_again():
        cls = type(model[1])
        model[1].__class__ = type("Sharded", (cls,), {})

    message = "^fused: the class of 1 was swapped again, for Sharded; nothing was restored"
    with pytest.raises(RuntimeError, match=message), fused(model):
        swap_again()
    assert all(fusion_of(gate) for gate in model)


def test_not_a_module():
    message = "^fused: model must be a torch.nn.Module; got int$"
    with pytest.raises(TypeError, match=message), fused(3):
        pass
