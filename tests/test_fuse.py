"""`fuse_` and `unfuse_`: what is swapped and what is not, that nothing changes, and what the report says."""

import copy
import io
import json
import re

import pytest
import timm
import torch
from rich.console import Console
from timm.layers.cbam import CbamModule, LightCbamModule
from torch import nn
from torch.utils.checkpoint import checkpoint

import cbam_fused
from cbam_fused import fuse_, unfuse_
from cbam_fused.testing import check_close
from tests import official
from tests.lookalikes import LOOKALIKES

GATES = {
    "timm": lambda: CbamModule(32, rd_ratio=0.25),
    "timm_bias": lambda: CbamModule(32, mlp_bias=True, spatial_kernel_size=3),
    "timm_light": lambda: LightCbamModule(32, rd_ratio=0.25),
    "official": lambda: official.CBAM(32, 4),
    "official_pools": lambda: official.CBAM(32, 4, ["lse", "lp", "max"]),
    "official_no_spatial": lambda: official.CBAM(32, 4, no_spatial=True),
}


@pytest.fixture(params=GATES)
def gate(request):
    torch.manual_seed(0)
    return GATES[request.param]()


def small_net(gate):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), gate, nn.Conv2d(32, 4, 1), nn.Flatten()
    )


def resnet(attn_layer):
    torch.manual_seed(0)
    return timm.create_model(
        "resnet18",
        num_classes=7,
        zero_init_last=False,  # with it every gate of a fresh network sees zeros
        block_args={"attn_layer": attn_layer},
    )


def snapshot(model):
    """Everything of a model that must not change, with the types of its modules."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    types = {name: type(module) for name, module in model.named_modules()}
    return tensors, gradients, types, repr(model), torch.random.get_rng_state()


def check_unchanged(before, model, *, types=True):
    tensors, gradients, classes, text, rng = before
    assert list(model.state_dict()) == list(tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name], name
    if types:
        assert {name: type(module) for name, module in model.named_modules()} == classes
    assert repr(model) == text
    assert torch.equal(torch.random.get_rng_state(), rng)


def train_step(model, x):
    """Logits, gradients and buffers after one forward and backward pass, by name."""
    y = model(x)
    y.square().sum().backward()
    results = {"logits": y.detach()}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return results | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


# --- what is swapped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_gate_is_fused_and_nothing_else_changes(gate, dtype):
    gate.to(dtype)
    base = type(gate)
    before = snapshot(gate)
    report = fuse_(gate, strict=True)
    check_unchanged(before, gate, types=False)
    assert isinstance(gate, base) and type(gate) is not base
    assert (type(gate).__name__, type(gate).__module__) == (base.__name__, base.__module__)
    assert report.fused[0].error <= report.fused[0].bound
    assert unfuse_(gate) == [""]
    check_unchanged(before, gate)


def test_the_fused_operation_is_what_runs(gate, monkeypatch):
    monkeypatch.setattr(
        "cbam_fused.plan.cbam", lambda x, **arguments: torch.full_like(x, len(arguments["pool"]))
    )
    fuse_(gate, verify=False)
    assert (gate(torch.zeros(1, 32, 4, 4)) > 0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attn_layer", ["cbam", "lcbam"])
def test_timm_network(attn_layer, training):
    model = resnet(attn_layer).train(training)
    x = torch.randn(2, 3, 64, 64)
    double = train_step(copy.deepcopy(model).double(), x.double())
    eager = train_step(copy.deepcopy(model), x)
    report = fuse_(model, strict=True)
    assert [gate.paths[0] for gate in report.fused] == [
        f"layer{stage}.{block}.se" for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    fused = train_step(model, x)
    check_close("logits", *(results["logits"] for results in (fused, eager, double)))
    names = [name for name in fused if name != "logits"]
    assert names == [name for name in eager if name != "logits"]
    # A single number's error says little, and a network has thousands of small tensors: all are judged together, each
    # relative to its size.
    scales = {name: double[name].norm().clamp_min(1e-300) for name in names}
    parts = (
        torch.cat([(results[name].double() / scales[name]).flatten() for name in names])
        for results in (fused, eager, double)
    )
    actual, own, expected = parts
    check_close("gradients and buffers", actual.float(), own.float(), expected)


@pytest.mark.parametrize("attn_layer", ["cbam", "lcbam"])
def test_gates_matter_to_the_networks_logits(attn_layer):
    model = resnet(attn_layer).eval()
    x = torch.randn(1, 3, 64, 64)
    logits = model(x)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.se = nn.Identity()
    assert (model(x) - logits).abs().max() > 0.01 * logits.abs().max()


def test_training_moves_the_running_statistics(gate):
    own, x = copy.deepcopy(gate), torch.randn(3, 32, 6, 6)
    fuse_(gate, strict=True)
    for _ in range(3):
        gate(x), own(x)
    for (name, expected), actual in zip(own.named_buffers(), gate.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


# --- what is not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=lambda lookalike: lookalike.name)
def test_lookalike_is_not_swapped(lookalike):
    torch.manual_seed(0)
    module = lookalike.make()
    before = snapshot(module)
    report = fuse_(module)
    check_unchanged(before, module)
    assert not report.fused
    assert re.search(lookalike.reason, report.skipped[0].reason), report.skipped[0].reason


def test_swapped_maps_are_seen_although_the_convolution_starts_at_zero():
    module = next(lookalike for lookalike in LOOKALIKES if lookalike.name == "maps").make()
    nn.init.zeros_(module.SpatialGate.spatial.conv.weight)
    assert "something else" in fuse_(module).skipped[0].reason


def test_without_verification_structure_decides():
    module = next(lookalike for lookalike in LOOKALIKES if lookalike.name == "maps").make()
    report = fuse_(module, verify=False)
    assert report.fused[0].reason == "not verified, as asked"
    assert report.fused[0].error is None


def test_nothing_to_fuse():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    assert str(fuse_(model)) == (
        "fuse_: the model contains no CBAM that is known here; nothing was fused"
    )
    with pytest.raises(RuntimeError, match="^fuse_: strict, and there is no gate to fuse"):
        fuse_(model, strict=True)


def test_strict_refuses_a_model_of_which_a_gate_is_skipped():
    model = nn.Sequential(official.CBAM(32), LOOKALIKES[0].make())
    before = snapshot(model)
    message = "^fuse_: strict, and gates cannot be fused; nothing was changed\nfuse_: 1 fused, 1 skipped"
    with pytest.raises(RuntimeError, match=message):
        fuse_(model, strict=True)
    check_unchanged(before, model)


def test_filter():
    model = nn.Sequential(official.CBAM(32), CbamModule(32))
    asked = []

    def keep(module, name):
        asked.append((module, name))
        return name == "1"

    report = fuse_(model, keep)
    assert asked == [(model[0], "0"), (model[1], "1")]
    assert [gate.status for gate in report.gates] == ["filtered out", "fused"]


def test_a_filter_that_raises_leaves_the_model_as_it_was():
    model = nn.Sequential(official.CBAM(32), CbamModule(32))
    before = snapshot(model)
    with pytest.raises(KeyError):
        fuse_(model, lambda module, name: {"0": True}[name])
    check_unchanged(before, model)


@pytest.mark.parametrize("function", [fuse_, unfuse_])
def test_not_a_module(function):
    message = f"^{function.__name__}: model must be a torch.nn.Module; got int$"
    with pytest.raises(TypeError, match=message):
        function(3)


def test_fusing_twice_and_unfusing_twice(gate):
    fuse_(gate)
    fused = type(gate)
    report = fuse_(gate, strict=True)
    assert [g.status for g in report.gates] == ["already fused"]
    assert type(gate) is fused
    assert unfuse_(gate) == [""]
    assert unfuse_(gate) == []


def test_our_own_module_is_already_fused():
    report = fuse_(nn.Sequential(cbam_fused.CBAM(32)), strict=True)
    assert [(g.status, g.adapter) for g in report.gates] == [("already fused", "cbam_fused")]


def test_a_shared_gate_is_swapped_once():
    shared = official.CBAM(32)
    report = fuse_(nn.Sequential(shared, nn.Sequential(shared)), lambda _, name: name == "1.0")
    assert [g.paths for g in report.fused] == [("0", "1.0")]


def test_meta_device_is_fused_without_verification():
    with torch.device("meta"):
        model = official.CBAM(32)
    report = fuse_(model, strict=True)
    assert report.fused[0].reason == "not verified: its parameters are on the meta device"


# --- the report --------------------------------------------------------------------------------------------------------


def test_report():
    model = nn.Sequential(LightCbamModule(64), LOOKALIKES[0].make())
    report = fuse_(model)
    lines = str(report).splitlines()
    assert lines[0] == "fuse_: 1 fused, 1 skipped"
    assert re.match(r"path +class +adapter +options +error of bound +status$", lines[1])
    assert re.match(r"0 +LightCbamModule +timm +light, light, even, 64, 4, 7 +\S+ of \S+ +fused$", lines[2])
    fused, skipped = json.loads(json.dumps(report.to_dict()))["gates"]
    assert fused["paths"] == ["0"]
    assert fused["options"] == {
        "pool": "light", "maps": "light", "ties": "even", "channels": 64, "hidden": 4, "kernel": 7
    }  # fmt: skip
    assert fused["error"] <= fused["bound"]
    assert skipped["status"] == "skipped"
    console = Console(width=300, file=io.StringIO())
    console.print(report)
    assert "LightCbamModule" in console.file.getvalue()


# --- hooks, and inner modules that change afterwards ---------------------------------------------------------------------


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
    path = "channel.fc2" if hasattr(gate, "channel") else "ChannelGate.mlp.3"
    own, x = copy.deepcopy(gate), torch.randn(2, 32, 5, 5)
    before = own(x)
    fuse_(gate, strict=True)
    change(gate.get_submodule(path))
    change(own.get_submodule(path))
    assert torch.equal(gate(x), own(x))
    assert not torch.allclose(own(x), before)


def test_hook_on_an_inner_layer_before_the_swap_is_said(gate):
    calls = []
    path = "channel.fc2" if hasattr(gate, "channel") else "ChannelGate.mlp.3"
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


def test_a_layer_appended_to_the_mlp_is_used():
    gate = official.CBAM(32).eval()
    x = torch.randn(2, 32, 5, 5)
    fuse_(gate)
    plain = gate(x)
    gate.ChannelGate.mlp.append(nn.Tanh())
    assert not torch.allclose(gate(x), plain)


def test_synchronised_norm_is_left_to_itself(monkeypatch):
    gate = official.CBAM(32)
    fuse_(gate)
    gate = nn.SyncBatchNorm.convert_sync_batchnorm(gate)
    own = copy.deepcopy(gate)
    unfuse_(own)
    x = torch.randn(2, 32, 5, 5)
    monkeypatch.setattr("cbam_fused.plan.cbam", None)
    with pytest.raises(TypeError):
        gate(x)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, z: z)
    assert torch.equal(gate(x), own(x))


def test_timm_conversion_to_synchronised_norms_and_back_into_eval():
    model = timm.layers.convert_sync_batchnorm(small_net(CbamModule(32)))
    assert fuse_(model, strict=True).fused
    model.eval()(torch.randn(1, 3, 5, 5))


# --- what people do to models --------------------------------------------------------------------------------------------


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


def test_replica_for_data_parallel_uses_its_own_weights(gate):
    gate.eval()
    x = torch.randn(2, 32, 5, 5)
    fuse_(gate)
    replica = copy.copy(gate)._replicate_for_data_parallel()
    assert not replica._parameters
    assert type(replica) is type(gate)
    gate(x)


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


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_conversion_after_the_swap(gate, change):
    fuse_(gate)
    getattr(gate.eval(), change)()
    x = getattr(torch.randn(2, 32, 5, 5), change)()
    own = copy.deepcopy(gate)
    unfuse_(own)
    tolerance = {"half": 2e-3, "bfloat16": 2e-2, "double": 1e-12}[change]
    assert (gate(x) - own(x)).abs().max() <= tolerance * own(x).abs().max()


def test_channels_last_stays_channels_last(gate):
    fuse_(gate)
    x = torch.randn(2, 32, 5, 6).to(memory_format=torch.channels_last)
    y = gate.eval()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, gate(x.contiguous()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("compile_first", [True, False], ids=["compile_fuse", "fuse_compile"])
def test_compile(compile_first, training):
    torch._dynamo.reset()
    model = small_net(official.CBAM(32)).train(training)
    x = torch.randn(2, 3, 6, 6)
    expected = train_step(copy.deepcopy(model), x)
    if compile_first:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(x[:1])
        fuse_(compiled, strict=True)
        unfuse_(compiled), model.zero_grad()
        model.load_state_dict(small_net(official.CBAM(32)).state_dict() | model.state_dict())
        model = small_net(official.CBAM(32)).train(training)
    fuse_(model, strict=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected["logits"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"gradient of {name}"], msg=name)


def test_fx_tracing(gate):
    model = small_net(gate).eval()
    fuse_(model, strict=True)
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.target is cbam_fused.cbam for node in traced.graph.nodes) == 1
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(traced(x), model(x))
