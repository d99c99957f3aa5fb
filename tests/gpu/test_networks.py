"""Gates and whole networks, swapped on a GPU."""

import pytest
import torch

import cbam_fused
from benchmarks import resnet
from tests.gates import GATES, new_gate
from tests.gpu import require_gpu

require_gpu()


@pytest.fixture(autouse=True)
def chosen(backend):
    """Every test here runs with every backend."""
    with cbam_fused.use_backend(backend.name):
        yield


@pytest.mark.parametrize("name", GATES)
def test_every_known_gate_is_proven_equal(name):
    """`fuse_` compares forward and backward, in both modes and layouts, on the module's device."""
    gate = new_gate(name)
    assert next(gate.parameters()).is_cuda
    cbam_fused.fuse_(gate, strict=True)


@pytest.mark.parametrize("layout", resnet.LAYOUTS)
@pytest.mark.parametrize("mode", resnet.MODES)
def test_resnet50(mode, layout):
    torch.manual_seed(1)
    images = torch.randn(8, 3, 128, 128)
    models = resnet.networks(mode, resnet.LAYOUTS[layout], images)
    resnet.check(models, images.to(memory_format=resnet.LAYOUTS[layout]))
