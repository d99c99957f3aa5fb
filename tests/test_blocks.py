"""Epilogues: gate, shortcut and ReLU of a block become one call, and which blocks do not."""

import contextlib
import copy
import random
import re

import pytest
import torch
from torch import nn

import cbam_fused
from benchmarks.saved import count_saved
from cbam_fused import fuse_, unfuse_
from tests import official
from tests.blocks import (
    FUSABLE,
    SHAPE,
    UNFUSABLE,
    Block,
    C,
    block,
    runs_fused,
    step,
    watched,
)
from tests.gates import resnet
from tests.lookalikes import LOOKALIKES


@pytest.fixture(params=FUSABLE, ids=lambda case: case.name)
def fusable(request):
    torch.manual_seed(0)
    return request.param.make()


@pytest.mark.parametrize("case", FUSABLE, ids=lambda case: case.name)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_block_computes_the_same(case, layout):
    torch.manual_seed(0)
    module = case.make().double().to(memory_format=layout)
    own = copy.deepcopy(module)
    state, generators = module.__dict__.copy(), (torch.get_rng_state(), random.getstate())
    row = fuse_(module).gates[0]
    assert (row.epilogue, row.alone) == (case.epilogue, "")
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert module.__dict__ == state
    assert isinstance(module, type(own))
    assert repr(module) == repr(own)
    x = torch.randn(SHAPE, dtype=torch.float64).to(memory_format=layout)
    for training in (True, False):
        module.train(training), own.train(training)
        with watched() as calls:
            actual = step(module, x)
        expected = ("add" in case.epilogue, "relu" if "relu" in case.epilogue else "none")
        assert calls[0] == expected
        expected = step(own, x)
        for name, result in actual.items():
            torch.testing.assert_close(result, expected[name], msg=name)
        assert actual["logits"].stride() == expected["logits"].stride()


# ---- two gates of a block ------------------------------------------------------------------------


def two_gates(forward):
    """A block with the gates ``gate`` and ``other``, and an unfused copy of it, in eval mode."""
    torch.manual_seed(0)
    module = block(forward, other=lambda: official.CBAM(C, 4))().eval()
    return module, copy.deepcopy(module)


def one_behind_the_other(self, x):
    y = self.relu(self.gate(self.main(x)) + x)
    return self.relu(self.other(y) + y)


def one_inside_the_other(self, x):
    y = self.gate(self.conv(x))
    return self.relu(y + self.relu(self.other(self.norm(x)) + x))


def the_first_without_a_tail(self, x):
    return self.relu(self.gate(nn.functional.gelu(self.other(x))) + x)


def the_second_without_a_tail(self, x):
    return self.other(self.relu(self.gate(x) + x))


def added_to_each_other(self, x):
    y = self.gate(self.conv(x))
    return self.relu(y + self.other(self.norm(x)))


NO_TAIL = "it is followed by {}, neither by an addition nor by a ReLU"
TWO_GATES = [
    (one_behind_the_other, ("add + relu", "add + relu"), ""),
    (one_inside_the_other, ("add + relu", "add + relu"), ""),
    (the_first_without_a_tail, ("add + relu", ""), NO_TAIL.format("gelu")),
    (the_second_without_a_tail, ("add + relu", ""), NO_TAIL.format("the output")),
    (
        added_to_each_other,
        ("add + relu", ""),
        "it is added to another gate, which is fused with the addition",
    ),
]


@pytest.mark.parametrize(
    ("forward", "epilogues", "alone"), TWO_GATES, ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("first", ["gate", "other"])
def test_two_gates_of_a_block(forward, epilogues, alone, first):
    """Fused in the same call or one after the other."""
    module, own = two_gates(forward)
    both = copy.deepcopy(module)
    rows = fuse_(both).gates
    assert tuple(row.epilogue for row in rows) == epilogues
    assert [row.alone for row in rows] == ["", alone]
    fuse_(module, lambda _, name: name == first)
    fuse_(module)
    x = torch.randn(SHAPE)
    expected = own(x)
    for fused in (both, module):
        with watched() as calls:
            torch.testing.assert_close(fused(x), expected)
        assert len(calls) == 2
        assert calls.count((True, "relu")) == sum(map(bool, epilogues))


def test_a_gate_that_is_unfused_again_leaves_its_tail():
    module, own = two_gates(one_behind_the_other)
    x = torch.randn(SHAPE)
    expected = own(x)
    fuse_(module, lambda _, name: name == "gate")
    unfuse_(module.gate)
    for keep, tails in ((lambda _, name: name == "other", 1), (None, 2)):
        fuse_(module, keep)
        with watched() as calls:
            torch.testing.assert_close(module(x), expected)
        assert calls == [(True, "relu")] * tails


def test_a_block_swapped_again_stays_fused_behind_the_same_gates():
    module, _ = two_gates(one_behind_the_other)
    fuse_(module, lambda _, name: name == "gate")
    module.__class__ = type("ShardedBlock", (type(module),), {})
    cls = type(module)
    alone = "its block was fused before, and its class swapped again"
    assert [row.alone for row in fuse_(module).gates] == ["", alone]
    assert type(module) is cls


# ---- look-alikes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "raises"), [("relu", True), ("relu6", False)])
@pytest.mark.parametrize("inplace", [True, False])
def test_what_may_be_changed_behind_a_block_may_be_still(function, raises, inplace):
    """PyTorch's ReLU keeps its output for the backward, as a fused one does, its ReLU6 not."""
    activation = getattr(nn.functional, function)
    module = block(lambda self, x: activation(self.gate(x) + x, inplace))().double()
    own, x = copy.deepcopy(module), torch.randn(SHAPE, dtype=torch.float64)
    fuse_(module)
    gradients = []
    for network in (own, module):
        leaf = x.clone().requires_grad_()
        y = network(leaf).mul_(2)
        with pytest.raises(RuntimeError, match="inplace") if raises else contextlib.nullcontext():
            y.sum().backward()
            gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1:], gradients[:1])
    assert len(gradients) == (0 if raises else 2)


@pytest.mark.parametrize("case", UNFUSABLE, ids=lambda case: case.name)
def test_what_only_looks_like_an_epilogue_is_left_alone(case):
    torch.manual_seed(0)
    module = case.make().eval()
    own, x, state = copy.deepcopy(module), torch.randn(SHAPE), torch.get_rng_state()
    report = fuse_(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(module) is type(own)
    assert report.fused[0].epilogue == ""
    assert re.search(case.reason, report.fused[0].alone), report.fused[0].alone
    with contextlib.suppress(RuntimeError), torch.no_grad():
        torch.testing.assert_close(module(x.clone()), own(x.clone()))


def test_a_network_saves_no_more_for_the_backward():
    model = resnet("cbam")
    own, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    fuse_(model, strict=True, epilogue=False)
    alone = count_saved(lambda: model(x), x)
    fuse_(model, strict=True)
    assert count_saved(lambda: model(x), x).total_bytes <= alone.total_bytes
    assert alone.total_bytes < count_saved(lambda: own(x), x).total_bytes


# ---- fuse_ and unfuse_ --------------------------------------------------------------------------


def test_without_epilogue_blocks_are_left_alone_and_may_be_fused_later():
    module, shape = Block(), torch.randn(SHAPE)
    row = fuse_(module, epilogue=False).fused[0]
    assert (type(module), row.epilogue, row.alone) == (Block, "", "")
    assert not runs_fused(module, shape)
    row = fuse_(module).gates[0]
    assert (row.status, row.epilogue) == ("already fused", "add + relu")
    assert runs_fused(module, shape)


def test_fusing_and_unfusing_twice(fusable):
    before = {name: type(module) for name, module in fusable.named_modules()}
    epilogues = [gate.epilogue for gate in fuse_(fusable).gates]
    fused = {name: type(module) for name, module in fusable.named_modules()}
    assert [gate.epilogue for gate in fuse_(fusable).gates] == epilogues
    assert {name: type(module) for name, module in fusable.named_modules()} == fused
    gates = [name for name in before if before[name] is not fused[name] and name]
    assert unfuse_(fusable) == gates
    assert {name: type(module) for name, module in fusable.named_modules()} == before
    assert unfuse_(fusable) == []


def test_a_filtered_gate_keeps_its_block():
    module = Block()
    report = fuse_(module, lambda *_: False)
    assert (type(module), report.gates[0].epilogue) == (Block, "")


def test_a_block_swapped_again_is_not_unfused():
    module = Block()
    fuse_(module)
    module.__class__ = type("ShardedBlock", (type(module),), {})
    with pytest.raises(RuntimeError, match="the class of the model was swapped again"):
        unfuse_(module)
    assert fuse_(module).gates[0].epilogue == "add + relu"
    assert runs_fused(module)


def test_a_gate_in_two_blocks():
    model = nn.ModuleList([Block(), Block()])
    model[1].gate = model[0].gate
    model[1].relu = nn.GELU()
    row = fuse_(model).fused[0]
    assert (row.paths, row.epilogue) == (("0.gate", "1.gate"), "add + relu, add")


def test_a_gate_by_itself_has_no_epilogue():
    assert fuse_(official.CBAM(C)).fused[0].alone == "it is in no block"


def test_on_the_meta_device_no_tail_is_compared():
    with torch.device("meta"):
        module = Block()
    assert fuse_(module, strict=True).fused[0].epilogue == "add + relu"


def test_a_tail_that_computes_something_else_is_not_fused(monkeypatch):
    own = cbam_fused.plan.cbam

    def wrong(*arguments, residual=None, **options):
        return own(*arguments, residual=residual if residual is None else -residual, **options)

    monkeypatch.setattr("cbam_fused.plan.cbam", wrong)
    module = Block()
    row = fuse_(module).fused[0]
    assert (type(module), row.epilogue) == (Block, "")
    assert row.alone.startswith("its own forward computes something else: the output")


def test_a_tail_that_changes_the_shortcut_is_not_fused(monkeypatch):
    own = cbam_fused.plan.cbam

    def wrong(*arguments, residual=None, **options):
        y = own(*arguments, residual=residual, **options)
        if residual is not None:
            residual.data.copy_(y)
        return y

    monkeypatch.setattr("cbam_fused.plan.cbam", wrong)
    assert fuse_(Block()).fused[0].alone == "the fused gate changes its input"


def test_what_goes_wrong_in_tracing_is_a_reason(monkeypatch):
    def fail(*_):
        raise LookupError("no such thing")

    monkeypatch.setattr("cbam_fused.fuse.blocks.find_tail", fail)
    assert fuse_(Block()).fused[0].alone == "its block: LookupError: no such thing"


def test_a_strict_refusal_leaves_blocks_as_they_were():
    model = nn.ModuleList([Block(), LOOKALIKES[0].make()])
    with pytest.raises(RuntimeError, match="nothing was changed"):
        fuse_(model, strict=True)
    assert type(model[0]) is Block


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_default_device_does_not_matter(device):
    module = Block()
    torch.set_default_device(device)
    try:
        row = fuse_(module).fused[0]
    finally:
        torch.set_default_device(None)
    assert (row.epilogue, row.alone) == ("add + relu", "")


def test_epilogues_in_the_report():
    report = fuse_(nn.ModuleList([Block(), official.CBAM(C)]))
    lines = str(report).splitlines()
    assert re.search(r" add \+ relu  +\S+ +5 of 13 +\S+ of ", lines[2])
    assert report.to_dict()["gates"][0]["epilogue"] == "add + relu"
    module = Block()
    module.relu.register_forward_hook(lambda *_: None)
    expected = "but not while relu has hooks, or a forward set on the instance"
    row = fuse_(module).fused[0]
    assert (row.epilogue, row.alone) == ("add + relu", expected)
    assert f" add + relu: {expected} " in str(fuse_(module))
