"""`fuse_` and `unfuse_`: what is swapped, what is not, what stays, and what the report says."""

import copy
import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from timm.layers.cbam import CbamModule, LightCbamModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cbam_fused
from cbam_fused import backends, fuse_, unfuse_
from tests import official
from tests.gates import new_gate
from tests.lookalikes import LOOKALIKES
from tests.package_gates import ALL_GATES
from tests.pasted_lookalikes import PASTED_LOOKALIKES


@pytest.fixture(params=ALL_GATES)
def gate(request):
    return new_gate(request.param, ALL_GATES)


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
        assert tensor.is_meta or torch.equal(tensor, tensors[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name], name
    if types:
        assert {name: type(module) for name, module in model.named_modules()} == classes
    assert repr(model) == text
    assert torch.equal(torch.random.get_rng_state(), rng)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_gate_is_fused_and_nothing_else_changes(gate, dtype):
    gate.to(dtype)
    base = type(gate)
    before = snapshot(gate)
    report = fuse_(gate, strict=True)
    check_unchanged(before, gate, types=False)
    assert isinstance(gate, base)
    assert type(gate) is not base
    assert (type(gate).__name__, type(gate).__module__) == (base.__name__, base.__module__)
    assert report.fused[0].error <= report.fused[0].bound
    assert unfuse_(gate) == [""]
    check_unchanged(before, gate)


def test_the_fused_operation_is_what_runs(gate, monkeypatch):
    monkeypatch.setattr(
        "cbam_fused.plan.cbam", lambda x, *_, **options: torch.full_like(x, len(options["pool"]))
    )
    fuse_(gate, verify=False)
    assert (gate(torch.zeros(1, 32, 4, 4)) > 0).all()


def test_training_moves_the_running_statistics(gate):
    own, x = copy.deepcopy(gate), torch.randn(3, 32, 6, 6)
    fuse_(gate, strict=True)
    for _ in range(3):
        gate(x), own(x)
    for (name, expected), actual in zip(own.named_buffers(), gate.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


@pytest.mark.parametrize(
    "lookalike", [*LOOKALIKES, *PASTED_LOOKALIKES], ids=lambda lookalike: lookalike.name
)
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
    with pytest.raises(RuntimeError, match=r"^fuse_: strict, and there is no gate to fuse"):
        fuse_(model, strict=True)


def test_strict_refuses_a_model_of_which_a_gate_is_skipped():
    model = nn.Sequential(official.CBAM(32), LOOKALIKES[0].make())
    before = snapshot(model)
    message = (
        "^fuse_: strict, and gates cannot be fused; nothing was changed\nfuse_: 1 fused, 1 skipped"
    )
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


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_default_device_does_not_matter(device):
    model = official.CBAM(32)
    torch.set_default_device(device)
    try:
        report = fuse_(model)
    finally:
        torch.set_default_device(None)
    assert report.fused, report


def test_what_goes_wrong_in_a_comparison_is_a_reason(gate, monkeypatch):
    before = snapshot(gate)

    def fail(*_):
        raise LookupError("no such thing")

    monkeypatch.setattr("cbam_fused.fuse.verify.replica", fail)
    report = fuse_(gate)
    check_unchanged(before, gate)
    assert report.skipped[0].reason == "it cannot be verified: LookupError: no such thing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_rounding_alone_skips_no_gate(dtype, seed):
    torch.manual_seed(seed)
    gates = [official.CBAM(16 * (seed + 1), 4), CbamModule(48, rd_ratio=0.25, mlp_bias=True)]
    assert not fuse_(nn.Sequential(*gates).to(dtype)).skipped


def test_report():
    model = nn.Sequential(LightCbamModule(64), LOOKALIKES[0].make())
    report = fuse_(model)
    lines = str(report).splitlines()
    backend = backends.chosen(torch.device("cpu")).name
    assert lines[0] == "fuse_: 1 fused, 1 skipped"
    header = r"path +class +adapter +options +epilogue +backend +passes +error of bound +status$"
    assert re.match(header, lines[1])
    assert re.match(
        r"0 +LightCbamModule +timm +light, light, even, 64, 4, 7 +"
        r"none: its block: its forward takes \(self, input\), not \(self, x\) +"
        rf"{backend} +4 of 8 +\S+ of \S+ +fused$",
        lines[2],
    )
    fused, skipped = json.loads(json.dumps(report.to_dict()))["gates"]
    assert fused["paths"] == ["0"]
    assert fused["options"] == {
        "pool": "light", "maps": "light", "ties": "even", "channels": 64, "hidden": 4, "kernel": 7
    }  # fmt: skip
    assert fused["error"] <= fused["bound"]
    assert fused["passes"] == [4, 8]
    assert skipped["status"] == "skipped"
    assert skipped["passes"] is None
    x = torch.randn(2, 64, 3, 3)
    assert [gate.bytes_saved(x) for gate in report.gates] == [4 * 4 * x.numel(), 0]
    console = Console(width=300, file=io.StringIO())
    console.print(report)
    assert "LightCbamModule" in console.file.getvalue()


class Moved(TorchDispatchMode):
    """Counts how often operations read or write a tensor as large as x; views do neither."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.size, self.passes = x.numel(), 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if not operation.is_view:
            tensors = (t for t in (*arguments, result) if isinstance(t, torch.Tensor))
            self.passes += sum(t.numel() == self.size and t.is_contiguous() for t in tensors)
        return result


@pytest.mark.parametrize(
    "options", [{}, {"no_spatial": True}, {"pool_types": ["max", "lp", "lse"]}], ids=str
)
def test_passes_before_are_those_of_the_layers(options):
    gate = official.CBAM(32, **options).eval()
    x = torch.randn(2, 32, 7, 9)
    with torch.no_grad(), Moved(x) as alone:
        y = gate(x)
    with Moved(x) as behind:
        y.add_(x).relu_()
    (row,) = fuse_(gate).gates
    assert row.passes[1] == alone.passes
    row = replace(row, epilogue="add + relu")
    assert row.passes[1] == alone.passes + behind.passes


def test_light_gate_ignores_its_unused_gate_layer():
    gate = LightCbamModule(32, gate_layer="hard_sigmoid")
    assert fuse_(gate, strict=True).fused


def test_no_package_is_needed():
    code = (
        "import sys; import cbam_fused; from tests import official, pasted;"
        "gates = official.CBAM(32), pasted.cbam_block(32), pasted.CBAM(32);"
        "assert all(cbam_fused.fuse_(gate, strict=True) for gate in gates);"
        "assert not {'timm', 'ultralytics', 'pytorchcv'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
