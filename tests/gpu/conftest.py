"""Tests of this folder run on the GPU: it is the default device, and the backends are
those of a GPU.
"""

import os

import pytest
import torch

from cbam_fused import backends
from tests import test_ops
from tests.gpu import FUSED

# For PyTorch's own matrix products in deterministic mode; read when CUDA is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "alone: takes the whole GPU; not to be run beside other tests"
    )


@pytest.fixture(autouse=True)
def on_the_gpu():
    """New tensors are on the GPU; PyTorch's convolutions and products do not round to TF32."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    previous = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
    for switch, allowed in zip(switches, previous, strict=True):
        switch.allow_tf32 = allowed


@pytest.fixture(autouse=True, scope="module")
def nothing_drawn_elsewhere():
    """The arguments that these tests keep are those of this device."""
    test_ops.draws.cache_clear()
    yield
    test_ops.draws.cache_clear()


@pytest.fixture(params=FUSED)
def backend(request) -> backends.Backend:
    return backends.get(request.param)


@pytest.fixture
def fused(backend) -> backends.Backend:
    return backend


@pytest.fixture
def filled_memory():
    """Uninitialised memory holds NaN and the largest integers. That PyTorch has no deterministic
    form of an operation that the reference uses is only a warning.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan(), "torch.empty is not filled"
    yield
    torch.use_deterministic_algorithms(False)
