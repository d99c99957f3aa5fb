"""Modules that no adapter knows and that have the layers of a CBAM: reported, never swapped."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from cbam_fused import Adapter, GateSpec, fuse_, register_adapter
from cbam_fused.fuse.candidates import layers_of_a_gate
from tests import official, pasted


class Attention(nn.Module):
    """Two gates, and whatever else there is."""

    def __init__(self, *mlp, conv=None, norm=None, **others):
        super().__init__()
        self.ca = nn.Sequential(*mlp)
        self.sa = nn.ModuleDict({"conv": nn.Conv2d(2, 1, 7) if conv is None else conv})
        if norm is not None:
            self.sa["norm"] = norm
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x):
        return x


def linear_mlp(channels=32, hidden=8):
    return nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)


def pointwise_mlp():
    return nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1)


CANDIDATES = {
    "linear": Attention(*linear_mlp()),
    "pointwise": Attention(*pointwise_mlp()),
    "single_layer": Attention(nn.Conv2d(32, 32, 1)),
    "one_map": Attention(*linear_mlp(), conv=nn.Conv2d(1, 1, 3)),
    "batch_norm": Attention(*linear_mlp(), norm=nn.BatchNorm2d(1)),
    "group_norm": Attention(*linear_mlp(), norm=nn.GroupNorm(1, 1)),
    "norm_without_parameters": Attention(*linear_mlp(), norm=nn.BatchNorm2d(1, affine=False)),
    "two_channels": Attention(*linear_mlp(2, 1), conv=nn.Conv2d(2, 1, 1)),
}

OTHERS = {
    "no_convolution": nn.Sequential(*linear_mlp()),
    "no_mlp": nn.Sequential(nn.Conv2d(2, 1, 7)),
    "even_kernel": Attention(*linear_mlp(), conv=nn.Conv2d(2, 1, 4)),
    "oblong_kernel": Attention(*linear_mlp(), conv=nn.Conv2d(2, 1, (3, 5))),
    "three_maps": Attention(*linear_mlp(), conv=nn.Conv2d(3, 1, 7)),
    "two_results": Attention(*linear_mlp(), conv=nn.Conv2d(2, 2, 7)),
    "one_layer_to_fewer": Attention(nn.Linear(32, 8)),
    "wide_mlp": Attention(*linear_mlp(32, 64)),
    "mlp_to_others": Attention(nn.Linear(32, 8), nn.Linear(8, 16)),
    "three_layers": Attention(nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 32)),
    "grouped": Attention(nn.Conv2d(32, 8, 1, groups=2), nn.Conv2d(8, 32, 1)),
    "norm_of_many": Attention(*linear_mlp(), norm=nn.BatchNorm2d(32)),
    "group_norm_of_many": Attention(*linear_mlp(), norm=nn.GroupNorm(2, 4)),
    "two_norms": Attention(*linear_mlp(), norm=nn.BatchNorm2d(1), more=nn.BatchNorm2d(1)),
    "two_convolutions": Attention(*linear_mlp(), more=nn.Conv2d(2, 1, 3)),
    "another_parameter": Attention(*linear_mlp(), more=nn.PReLU()),
    "many_layers": Attention(*linear_mlp(), *linear_mlp(), *linear_mlp()),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidate_is_reported_and_left_alone(name):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Sequential(CANDIDATES[name]))
    report = fuse_(model)
    assert [gate.status for gate in report.gates] == ["candidate"]
    assert report.gates == report.candidates
    assert type(CANDIDATES[name]) is Attention


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_none(name):
    assert not fuse_(nn.Sequential(OTHERS[name])).gates


def test_what_was_seen_is_said():
    model = nn.Sequential(CANDIDATES["linear"], CANDIDATES["single_layer"])
    report = fuse_(model)
    assert report.summary == "fuse_: 2 candidate"
    assert [gate.paths for gate in report.candidates] == [("0",), ("1",)]
    assert report.candidates[0].reason == (
        "it has an MLP 32 -> 8 -> 32 (ca.0, ca.2) and a 7 x 7 convolution to one map (sa.conv), "
        "but no adapter knows this implementation; cbam_fused.register_adapter can teach it"
    )
    assert "an MLP 32 -> 32 (ca.0) and a 7" in report.candidates[1].reason


def test_strict_refuses_a_candidate_that_is_not_filtered_out():
    model = nn.Sequential(official.CBAM(32), CANDIDATES["linear"])
    message = "^fuse_: strict, and gates cannot be fused; nothing was changed\nfuse_: 1 fused, 1 c"
    with pytest.raises(RuntimeError, match=message):
        fuse_(model, strict=True)
    assert type(model[0]) is official.CBAM
    report = fuse_(model, lambda _, name: name != "1", strict=True)
    assert [gate.status for gate in report.gates] == ["fused", "filtered out"]


def test_name_and_structure_are_one_row():
    class CBAM(Attention):
        pass

    class CBAMBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gate = nn.Conv2d(32, 32, 3), CBAM(*linear_mlp())

    report = fuse_(nn.Sequential(CBAMBlock()))
    assert [(gate.paths, gate.status) for gate in report.gates] == [(("0.gate",), "candidate")]


@pytest.mark.parametrize("gate", [official.CBAM(32), pasted.cbam_block(32)], ids=["a", "b"])
def test_what_surrounds_a_known_gate_is_none(gate):
    model = nn.Sequential(nn.Sequential(gate))
    assert layers_of_a_gate(model)
    for status in ("fused", "already fused"):
        assert [(g.paths, g.status) for g in fuse_(model).gates] == [(("0.0",), status)]


def test_what_is_inside_a_claimed_module_is_none():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = CANDIDATES["linear"]

        def forward(self, x):
            return self.gate(x)

    spec = GateSpec("gate.ca.0", "gate.ca.2", "gate.sa.conv", None, "avg", "mean_max", "first")
    adapter = Adapter("mine", lambda module: isinstance(module, Wrapper), lambda module: spec)
    with register_adapter(adapter):
        assert [g.paths for g in fuse_(nn.Sequential(Wrapper())).gates] == [("0",)]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_networks_without_a_cbam_have_no_candidates(name):
    with torch.device("meta"):
        assert not fuse_(timm.create_model(name)).gates


def test_pasted_variants_are_candidates():
    class Variant(pasted.cbam_block):
        """Names that no adapter knows."""

        def __init__(self):
            super().__init__(32)
            self.ca, self.sa = self.channelattention, self.spatialattention
            del self.channelattention, self.spatialattention

        def forward(self, x):
            return functional.relu(self.sa(self.ca(x) * x))

    assert fuse_(Variant()).candidates[0].class_name == "Variant"
