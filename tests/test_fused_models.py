"""Fused models under what people do to models: hooks, copies, conversion, compilation, tracing."""

import copy
import io

import pytest
import timm
import torch
from timm.layers.cbam import CbamModule
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbam_fused
from cbam_fused import fuse_, unfuse_
from cbam_fused.plan import collect
from cbam_fused.testing import check_close
from tests import official
from tests.gates import new_gate, output_layer, small_net, train_step
from tests.package_gates import ALL_GATES


@pytest.fixture(params=ALL_GATES)
def gate(request):
    return new_gate(request.param, ALL_GATES)


def test_hooks_on_the_gate_stay(gate):
    calls = []
    gate.register_forward_hook(lambda *_: calls.append("forward"))
    gate.register_full_backward_hook(lambda *_: calls.append("backward"))
    assert not fuse_(gate).fused[0].reason
    assert not calls
    gate(torch.randn(2, 32, 5, 5, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def inner_changes():
    """What may be done to an inner layer after the swap; all are to be honoured."""

    def forward_hook(layer):
        layer.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward_pre_hook(layer):
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))

    def own_forward(layer):
        layer.forward = lambda x: type(layer).forward(layer, x) * 2

    def parametrised(layer):
        double = nn.Identity()
        double.forward = lambda weight: weight * 2
        nn.utils.parametrize.register_parametrization(layer, "weight", double)

    changes = (forward_hook, forward_pre_hook, own_forward, parametrised)
    return [pytest.param(change, id=change.__name__) for change in changes]


@pytest.mark.parametrize("change", inner_changes())
def test_inner_layer_changed_after_the_swap(gate, change):
    gate.eval()
    path = output_layer(gate)
    own, x = copy.deepcopy(gate), torch.randn(2, 32, 5, 5)
    before = own(x)
    fuse_(gate, strict=True)
    change(gate.get_submodule(path))
    change(own.get_submodule(path))
    assert torch.equal(gate(x), own(x))
    assert not torch.allclose(own(x), before)


def test_hook_on_an_inner_layer_before_the_swap_is_said(gate):
    calls = []
    path = output_layer(gate)
    handle = gate.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    report = fuse_(gate)
    assert report.fused[0].reason == (
        f"runs its inner modules as long as {path} has hooks, or a forward set on the instance"
    )
    assert not calls
    gate(torch.randn(2, 32, 5, 5))
    assert calls
    calls.clear()
    handle.remove()
    gate(torch.randn(2, 32, 5, 5))
    assert not calls


def test_what_keeps_a_fused_gate_from_the_operation_is_said_later(gate):
    model = nn.Sequential(gate, cbam_fused.CBAM(32))
    fuse_(model)
    assert [g.reason for g in fuse_(model).gates] == ["", ""]
    gate.get_submodule(output_layer(gate)).register_forward_hook(lambda *_: None)
    model[1].ChannelGate.mlp[1].register_forward_hook(lambda *_: None)
    reasons = [g.reason for g in fuse_(model).gates]
    path = output_layer(gate)
    assert reasons == [
        f"runs its inner modules as long as {layer} has hooks, or a forward set on the instance"
        for layer in (path, "ChannelGate.mlp.1")
    ]


def runs_its_inner_modules(gate, monkeypatch):
    """Whether a call of the gate leaves the fused operation alone."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr("cbam_fused.plan.cbam", lambda x, *_, **__: calls.append(1) or x)
        gate(torch.randn(2, 32, 5, 5))
    return not calls


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stride", (2, 2)),
        ("padding", (0, 0)),
        ("dilation", (3, 3)),
        ("padding_mode", "reflect"),
        ("groups", 2),
    ],
)
def test_a_reconfigured_convolution_is_used(setting, value):
    gate = official.CBAM(32).eval()
    fuse_(gate, strict=True)
    setattr(gate.SpatialGate.spatial.conv, setting, value)
    plan = type(gate)._cbam_fused.plan
    expected = f"SpatialGate.spatial.conv.{setting} is {value!r}, it was "
    assert collect(gate, plan).reason.startswith(expected)


def test_changed_settings_of_a_gate_are_honoured(monkeypatch):
    gate = official.CBAM(32, pool_types=["avg", "max"]).eval()
    x = torch.randn(2, 32, 5, 5)
    fuse_(gate, strict=True)
    assert not runs_its_inner_modules(gate, monkeypatch)
    gate.ChannelGate.pool_types.remove("max")
    torch.testing.assert_close(gate(x), official.CBAM.forward(gate, x))
    assert runs_its_inner_modules(gate, monkeypatch)
    gate.ChannelGate.pool_types.append("max")
    assert not runs_its_inner_modules(gate, monkeypatch)
    gate.no_spatial = True
    assert torch.equal(gate(x), gate.ChannelGate(x))


@pytest.mark.parametrize("cls", [official.CBAM, official.ChannelGate, nn.Linear])
def test_a_forward_replaced_on_a_class_is_used(cls, monkeypatch):
    gate = official.CBAM(32).eval()
    fuse_(gate, strict=True)
    own, calls = cls.forward, []
    monkeypatch.setattr(cls, "forward", lambda self, x: calls.append(1) or own(self, x))
    gate(torch.randn(2, 32, 5, 5))
    assert calls


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_behind_the_norm_run(register, monkeypatch):
    gate = CbamModule(32)
    fuse_(gate, strict=True)
    getattr(gate.spatial.conv.bn.act, register)(lambda *_: None)
    assert runs_its_inner_modules(gate, monkeypatch)


def test_a_forward_set_behind_the_norm_is_used():
    gate = CbamModule(32).eval()
    fuse_(gate, strict=True)
    gate.spatial.conv.bn.act.forward = lambda z: z - 100
    assert gate(torch.randn(2, 32, 5, 5)).abs().max() < 1e-30


def test_hooks_on_all_modules_run(gate):
    fuse_(gate)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        gate(torch.randn(2, 32, 5, 5))
    finally:
        handle.remove()
    assert gate.get_submodule(output_layer(gate)) in seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_gives_one_dtype_on_every_path(gate, dtype, x_dtype):
    gate.eval().to(x_dtype)
    fuse_(gate, strict=True)
    x = torch.randn(2, 32, 5, 5, dtype=x_dtype)
    gate.get_submodule(output_layer(gate)).register_forward_hook(lambda *_: None)
    hooked = copy.deepcopy(gate)
    gate.get_submodule(output_layer(gate))._forward_hooks.clear()
    with torch.autocast("cpu", dtype, enabled=x_dtype == torch.float32):
        expected = dtype if x_dtype == torch.float32 else torch.float64
        assert gate(x).dtype == hooked(x).dtype == expected


def swapped_again(gate):
    cls = type(gate)
    gate.__class__ = type(f"Sharded{cls.__name__}", (cls,), {})


def test_a_class_swapped_again_stays_fused_and_is_not_unfused(gate):
    model = nn.Sequential(official.CBAM(32), gate)
    fuse_(model, strict=True)
    swapped_again(gate)
    classes = [type(module) for module in model]
    assert [g.status for g in fuse_(model).gates] == ["already fused"] * 2
    message = "^unfuse_: the class of 1 was swapped again after fuse_, for Sharded"
    with pytest.raises(RuntimeError, match=message):
        unfuse_(model)
    assert [type(module) for module in model] == classes
    assert type(copy.deepcopy(gate)) is type(gate)


def test_a_layer_appended_to_the_mlp_is_used():
    gate = official.CBAM(32).eval()
    x = torch.randn(2, 32, 5, 5)
    fuse_(gate)
    plain = gate(x)
    gate.ChannelGate.mlp.append(nn.Tanh())
    assert not torch.allclose(gate(x), plain)


def test_timm_conversion_to_synchronised_norms_and_back_into_eval():
    model = timm.layers.convert_sync_batchnorm(small_net(CbamModule(32)))
    assert fuse_(model, strict=True).fused
    model.eval()(torch.randn(1, 3, 5, 5))


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("rebuild", [copy.deepcopy, copy.copy, save_and_load])
def test_copies_stay_fused(gate, rebuild):
    model = small_net(gate).eval()
    fuse_(model, strict=True)
    made = rebuild(model)
    assert type(made[2]) is type(model[2])
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(made(x), model(x))
    unfuse_(made)


def test_unfused_copy_of_a_fused_gate_is_the_original_class(gate):
    base = type(gate)
    fuse_(gate)
    made = copy.deepcopy(gate)
    unfuse_(made)
    assert type(made) is base
    assert type(gate) is not base


def test_unfuse_restores_bitwise(gate):
    gate.eval()
    x = torch.randn(2, 32, 5, 5)
    before, state = gate(x), gate.__dict__.copy()
    fuse_(gate)
    gate(x)
    unfuse_(gate)
    assert torch.equal(gate(x), before)
    assert gate.__dict__ == state


def test_checkpoints_load_both_ways(gate):
    other = copy.deepcopy(gate)
    fuse_(gate)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    gate.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(gate.state_dict(), strict=True)
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(gate.eval()(x), other.eval()(x))


def test_functional_call_and_checkpointing(gate):
    gate.eval()
    other = copy.deepcopy(gate)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    fuse_(gate), fuse_(other)
    x = torch.randn(2, 32, 5, 5, requires_grad=True)
    assert torch.equal(torch.func.functional_call(gate, other.state_dict(), (x,)), other(x))
    expected = torch.autograd.grad(gate(x).square().sum(), x)[0]
    y = checkpoint(gate, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversion_after_the_swap(gate, dtype):
    fuse_(gate)
    gate.eval().to(dtype)
    own = copy.deepcopy(gate)
    unfuse_(own)
    x = torch.randn(2, 32, 5, 5).to(dtype)
    expected = copy.deepcopy(own).double()(x.double())
    check_close("output", gate(x), own(x), expected)


def test_channels_last_stays_channels_last(gate):
    fuse_(gate)
    x = torch.randn(2, 32, 5, 6).to(memory_format=torch.channels_last)
    y = gate.eval()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, gate(x.contiguous()))


@pytest.mark.parametrize(
    ("name", "compile_first", "training"),
    [
        ("timm", False, True),
        ("timm_light", False, False),
        ("official", False, True),
        ("official", True, False),
    ],
)
def test_compile(name, compile_first, training):
    torch._dynamo.reset()
    model = small_net(new_gate(name)).train(training)
    x = torch.randn(2, 3, 6, 6)
    expected = train_step(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if compile_first:
        compiled(x)
    fuse_(model, strict=True)
    for name, result in train_step(compiled, x).items():
        torch.testing.assert_close(result, expected[name.replace("_orig_mod.", "")], msg=name)


def test_fx_tracing(gate):
    model = small_net(gate).eval()
    fuse_(model, strict=True)
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.target is cbam_fused.cbam for node in traced.graph.nodes) == 1
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(traced(x), model(x))
