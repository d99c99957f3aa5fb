"""Adapters: those that users register, what they describe wrongly, and packages that changed."""

import copy
import inspect
import re

import pytest
import torch
from pytorchcv.models import cbamresnet
from torch import nn
from ultralytics.nn.modules import conv

import cbam_fused
from cbam_fused import Adapter, GateSpec, NotFusableError, fuse_, register_adapter, unfuse_
from tests import official, pasted, pasted_lookalikes
from tests.lookalikes import DIFFERS

SPEC = GateSpec(
    hidden_layer="fc1",
    output_layer="fc2",
    conv="conv",
    norm=None,
    pool="avg+max",
    maps="mean_max",
    ties="first",
)


class Gate(nn.Module):
    """A CBAM of the user's own, all its layers at one level."""

    def __init__(self, channels=32):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // 4)
        self.fc2 = nn.Linear(channels // 4, channels)
        self.conv = nn.Conv2d(2, 1, 5, padding=2)

    def forward(self, x):
        logits = sum(self.fc2(self.fc1(p).relu()) for p in (x.mean((2, 3)), x.flatten(2).max(2)[0]))
        x = x * logits.sigmoid()[:, :, None, None]
        return x * self.conv(pasted.mean_and_max(x)).sigmoid()


def adapter(name="mine", spec=SPEC, cls=Gate):
    return Adapter(name, lambda module: isinstance(module, cls), lambda module: spec)


def test_registered_adapter_is_asked_until_it_is_unregistered():
    model = nn.Sequential(Gate(), official.CBAM(32))
    handle = register_adapter(adapter())
    report = fuse_(model, strict=True)
    assert [gate.adapter for gate in report.fused] == ["mine", "official"]
    assert report.fused[0].error <= report.fused[0].bound
    handle.unregister()
    handle.unregister()
    assert [gate.status for gate in fuse_(model).gates] == ["already fused"] * 2
    unfuse_(model)
    assert [gate.status for gate in fuse_(model).gates] == ["candidate", "fused"]


def test_registered_adapter_of_a_with_block():
    mine = adapter()
    with register_adapter(mine) as registered:
        assert registered.adapter is mine
    with pytest.raises(ZeroDivisionError), register_adapter(mine):
        raise ZeroDivisionError
    assert not fuse_(Gate()).fused


def test_the_newest_adapter_is_asked_first():
    gate = official.CBAM(32)
    spec = GateSpec(
        "ChannelGate.mlp.1", "ChannelGate.mlp.3", "SpatialGate.spatial.conv",
        "SpatialGate.spatial.bn", "avg+max", "max_mean", "first",
    )  # fmt: skip
    with (
        register_adapter(adapter("older", spec, official.CBAM)),
        register_adapter(adapter("newer", spec, official.CBAM)),
    ):
        assert fuse_(gate).fused[0].adapter == "newer"


def test_fused_gate_of_a_registered_adapter_is_copied_and_kept():
    gate = Gate()
    with register_adapter(adapter()):
        fuse_(gate, strict=True)
    made, x = copy.deepcopy(gate), torch.randn(2, 32, 5, 5)
    assert type(made) is type(gate)
    assert torch.equal(made(x), gate(x))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (3, TypeError, "adapter must be a cbam_fused.Adapter; got int"),
        (Gate, TypeError, "adapter must be a cbam_fused.Adapter; got type"),
        (adapter(name=3), TypeError, "adapter.name must be a string; got 3"),
        (Adapter("mine", None, print), TypeError, "adapter.claims must be callable; got None"),
        (Adapter("mine", print, SPEC), TypeError, r"adapter.describe must be callable; got Gate"),
        (adapter(name=""), ValueError, "adapter.name must be not empty and none of .*; got ''"),
        (adapter(name="timm"), ValueError, "none of cbam_fused, timm, official, .*; got 'timm'"),
        (adapter(name="cbam_fused"), ValueError, "got 'cbam_fused'"),
    ],
)
def test_what_is_no_adapter_is_refused(wrong, error, message):
    with pytest.raises(error, match=f"^register_adapter: .*{message}"):
        register_adapter(wrong)
    assert not fuse_(Gate()).fused


def test_a_name_is_taken_once():
    with register_adapter(adapter()), pytest.raises(ValueError, match=r"timm.*, mine; got 'mine'$"):
        register_adapter(adapter())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_layer": "mlp.0"}, "there is no mlp.0, which the adapter names as its hidden_"),
        ({"output_layer": "fc3"}, "there is no fc3, which the adapter names as its output_layer"),
        ({"conv": "conv.conv"}, "there is no conv.conv, which the adapter names as its conv"),
        ({"norm": "bn"}, "there is no bn, which the adapter names as its norm"),
        ({"norm": "conv"}, "conv is a Conv2d, not a batch norm"),
        ({"conv": "fc1"}, "fc1 is a Linear, not a Conv2d"),
        ({"output_layer": "conv"}, "conv is not a plain 1x1 convolution"),
        ({"maps": "light"}, "conv is not a k x k convolution, 1 to 1, that keeps the size"),
        ({"maps": "max_mean"}, DIFFERS),
        ({"ties": "even"}, DIFFERS),
        ({"pool": "avg"}, DIFFERS),
        ({"pool": "median"}, "the fused gate failed: ValueError: cbam: pool must be"),
    ],
    ids=str,
)
def test_what_an_adapter_describes_wrongly_is_said(change, reason):
    spec = GateSpec(**(vars(SPEC) | change))
    with register_adapter(adapter(spec=spec)), pytest.raises(RuntimeError, match=r"^fuse_: strict"):
        fuse_(Gate(), strict=True)
    with register_adapter(adapter(spec=spec)):
        (skipped,) = fuse_(Gate()).skipped
    assert skipped.adapter == "mine"
    assert re.search(reason, skipped.reason), skipped.reason


def test_a_layer_without_its_weight_is_said():
    gate = Gate()
    nn.utils.spectral_norm(gate.fc1)
    with register_adapter(adapter()):
        assert fuse_(gate).skipped[0].reason == "fc1 has no plain weight and bias"


def test_describe_must_return_a_spec():
    gate = Gate()
    message = "^fuse_: describe of the adapter mine must return a GateSpec; got None$"
    with register_adapter(adapter(spec=None)), pytest.raises(TypeError, match=message):
        fuse_(gate)
    assert type(gate) is Gate


def test_an_adapter_may_refuse():
    def refuse(module):
        raise NotFusableError("its moon is in the wrong house")

    mine = Adapter("mine", lambda module: isinstance(module, Gate), refuse)
    with register_adapter(mine):
        assert fuse_(Gate()).skipped[0].reason == "its moon is in the wrong house"


def test_adapters_are_public():
    names = {"Adapter", "GateSpec", "NotFusableError", "register_adapter"}
    assert names <= set(cbam_fused.__all__)
    assert inspect.getdoc(register_adapter)


def changed_packages():
    """Classes of packages whose forward is another than the one that was read: forks, versions."""

    def silu(_, self, x):
        return self.fc2(nn.functional.silu(self.fc1(x.flatten(1))))

    def maximum(_, self, x):
        return x * self.act(self.fc(x.amax((2, 3), keepdim=True)))

    def returns_the_gate(own, self, x):
        return own(self, x) / x

    def other_maps(own, self, x):
        pooled = pasted.mean_and_max(x)
        layer, gate = (self.cv1, self.act) if hasattr(self, "cv1") else (self.conv, self.sigmoid)
        return x * gate(layer(pooled.flip(1) if hasattr(self, "cv1") else pooled))

    def logits_first(_, self, x):
        average, maximum = self.mlp(self.avg_pool(x)), self.mlp(self.max_pool(x))
        gate = (self.sigmoid(average) + self.sigmoid(maximum)) / 2
        return x * gate[:, :, None, None]

    adds_x = pasted_lookalikes.adds_x
    return [
        (conv, "CBAM", adds_x),
        (conv, "ChannelAttention", maximum),
        (conv, "ChannelAttention", returns_the_gate),
        (conv, "SpatialAttention", returns_the_gate),
        (conv, "SpatialAttention", other_maps),
        (cbamresnet, "CbamBlock", adds_x),
        (cbamresnet, "MLP", silu),
        (cbamresnet, "ChannelGate", returns_the_gate),
        (cbamresnet, "ChannelGate", logits_first),
        (cbamresnet, "SpatialGate", other_maps),
    ]


@pytest.mark.parametrize(("package", "name", "forward"), changed_packages())
def test_package_of_another_version_is_not_swapped(package, name, forward, monkeypatch):
    torch.manual_seed(0)
    cls = getattr(package, name)
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: forward(own, self, x))
    gate = conv.CBAM(32) if package is conv else cbamresnet.CbamBlock(32, 4)
    (skipped,) = fuse_(gate).skipped
    assert skipped.reason.startswith("its own forward computes something else: "), skipped.reason


@pytest.mark.parametrize("name", ["ChannelAttention", "SpatialAttention"])
def test_package_without_a_known_class_is_said(name, monkeypatch):
    gate = conv.CBAM(32)
    monkeypatch.delattr(conv, name)
    expected = f"is a {name}, not the {name} of ultralytics.nn.modules.conv"
    assert fuse_(gate).skipped[0].reason.endswith(expected)
