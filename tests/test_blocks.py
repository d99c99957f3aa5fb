"""Epilogues: gate, shortcut and ReLU of a block in one call, and when the block runs as it was."""

import contextlib
import copy
import io
import random
import re
import threading

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbam_fused
from benchmarks.saved import count_saved
from cbam_fused import fuse_, unfuse_
from cbam_fused.testing import check_close
from tests import official
from tests.blocks import FUSABLE, UNFUSABLE, Block, C, Unit, block, timm_block
from tests.gates import resnet, train_step
from tests.lookalikes import LOOKALIKES

SHAPE = (2, C, 5, 6)


@pytest.fixture(params=FUSABLE, ids=lambda case: case.name)
def fusable(request):
    torch.manual_seed(0)
    return request.param.make()


@contextlib.contextmanager
def watched():
    """The options of every call of the fused gate: with a residual, with which activation."""
    calls, own = [], cbam_fused.plan.cbam

    def cbam(*arguments, residual=None, activation="none", **options):
        calls.append((residual is not None, activation))
        return own(*arguments, residual=residual, activation=activation, **options)

    cbam_fused.plan.cbam = cbam
    try:
        yield calls
    finally:
        cbam_fused.plan.cbam = own


def runs_fused(module, x=None):
    """Whether a call takes shortcut and activation along into the fused gate."""
    with watched() as calls:
        module(torch.randn(SHAPE) if x is None else x)
    return any(residual for residual, _ in calls)


def step(module, x):
    """`train_step` with the gradient of x; x itself must stay."""
    leaf = x.clone().requires_grad_()
    results = train_step(module, leaf) | {"gradient of x": leaf.grad}
    assert torch.equal(leaf, x)
    return results


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
        assert calls[0] == (True, "relu" if "relu" in case.epilogue else "none")
        expected = step(own, x)
        for name, result in actual.items():
            torch.testing.assert_close(result, expected[name], msg=name)
        assert actual["logits"].stride() == expected["logits"].stride()


def test_two_gates_of_a_block():
    module = next(case for case in FUSABLE if case.name == "two_gates").make()
    first, second = fuse_(module).gates
    assert (first.epilogue, second.epilogue) == ("add + relu", "")
    assert second.alone == "its block is fused behind gate"
    assert runs_fused(module)


def test_another_gate_of_a_block_may_be_fused_later():
    module = next(case for case in FUSABLE if case.name == "two_gates").make()
    fuse_(module, lambda _, name: name == "gate")
    assert runs_fused(module)
    fuse_(module)
    assert runs_fused(module)


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


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16)])
def test_every_block_of_a_network(name, blocks):
    model = resnet("cbam", name).eval()
    x = torch.randn(2, 3, 64, 64)
    own, double = copy.deepcopy(model), copy.deepcopy(model).double()
    report = fuse_(model, strict=True)
    assert [gate.epilogue for gate in report.fused] == ["add + relu"] * blocks
    with watched() as calls:
        logits = model(x)
    assert calls == [(True, "relu")] * blocks
    check_close("logits", logits, own(x), double(x.double()))
    for training in (True, False):
        own, fused = (copy.deepcopy(m).double().train(training) for m in (double, model))
        expected = train_step(own, x.double())
        for result, value in train_step(fused, x.double()).items():
            torch.testing.assert_close(value, expected[result], msg=result)


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
    assert re.search(r" add \+ relu  +\S+ of ", lines[2])
    assert report.to_dict()["gates"][0]["epilogue"] == "add + relu"
    module = Block()
    module.relu.register_forward_hook(lambda *_: None)
    expected = "but not while relu has hooks, or a forward set on the instance"
    row = fuse_(module).fused[0]
    assert (row.epilogue, row.alone) == ("add + relu", expected)
    assert f" add + relu: {expected} " in str(fuse_(module))


# ---- When the block runs as it was --------------------------------------------------------------


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


def _branching(self, x):
    y = self.gate(self.main(x))
    if hasattr(self, "bias"):
        y = y + self.bias
    if self.sizes[0] > 1 and self.mode != "off":
        y = self.function(y + x)
    return self.rest(y)


def _rest(self, y):
    return y


def branching_block():
    module = block(_branching)()
    type(module).rest = _rest
    module.sizes, module.mode, module.function = [2, 3], "on", torch.relu
    return module


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
        lambda _, patch: patch.setattr("tests.test_blocks.Block.main", lambda self, x: x),
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


# ---- What people do to models -------------------------------------------------------------------


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
