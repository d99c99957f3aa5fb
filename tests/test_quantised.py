"""Gates with quantised layers are not fused, and those quantised after the swap run as before."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization

from cbam_fused import fuse_
from tests import official
from tests.blocks import SHAPE, Block, C, watched

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:torch.quantize:UserWarning",
    "ignore::UserWarning:torch.ao.quantization.observer",
)


def dynamic(module):
    return quantization.quantize_dynamic(module.eval(), {nn.Linear})


def observed(module):
    """With observers, which are hooks."""
    module.eval().qconfig = quantization.default_qconfig
    return quantization.prepare(module)


def trained(module):
    """With weights quantised and back in training."""
    module.train().qconfig = quantization.default_qat_qconfig
    return quantization.prepare_qat(module)


def static(module):
    return quantization.convert(observed(module))


LAYER = "ChannelGate.mlp.1"
QUANTISED = [
    (dynamic, f"{LAYER} is a torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    (observed, f"{LAYER} has hooks, or a forward set on the instance"),
    (trained, f"{LAYER} is a torch.ao.nn.qat.modules.linear.Linear"),
    (static, f"{LAYER} is a torch.ao.nn.quantized.modules.linear.Linear"),
]


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """Some engine that there is."""
    monkeypatch.setattr(
        torch.backends.quantized, "engine", torch.backends.quantized.supported_engines[-1]
    )


@pytest.mark.parametrize(("quantise", "found"), QUANTISED)
def test_quantised_gate_is_not_fused(quantise, found):
    (row,) = fuse_(quantise(official.CBAM(C, 4))).gates
    if quantise is observed:  # the norm's is a child, not only a hook
        found = (
            "SpatialGate.spatial.bn.activation_post_process is a MinMaxObserver, not an Identity"
        )
    assert row.status == "skipped"
    assert row.reason.startswith(found)


@pytest.mark.parametrize(("quantise", "found"), QUANTISED)
def test_a_gate_quantised_after_the_swap_runs_its_layers(quantise, found):
    torch.manual_seed(0)
    module = Block()
    own, x = copy.deepcopy(module), torch.randn(SHAPE)
    fuse_(module, strict=True)
    module, own = quantise(module), quantise(own)
    (row,) = fuse_(module).gates
    assert row.reason.startswith(f"runs its inner modules as long as {found}")
    if quantise is not static:  # which takes quantised tensors, and cannot compute the gate
        with watched() as calls:
            y = module(x)
        assert calls == []
        assert torch.equal(y, own(x))
