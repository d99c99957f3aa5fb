"""Fused gates in networks that PyTorch's data parallelism wraps, in two processes."""

import copy
from unittest import mock

import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cbam_fused import fuse_
from cbam_fused import plan as gate_plan
from cbam_fused.testing import check_close
from tests import processes
from tests.gates import small_net

if not distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded_root(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def sharded_children(model: nn.Module) -> nn.Module:
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)  # the gate among them
    return fully_shard(model)


def fully_shard(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    return fully_shard(module, mesh=mesh)


WRAPPERS = (ddp, sharded_root, sharded_children)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    y.square().mean().backward()
    grads = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in model.parameters()
    ]
    return {"y": y.detach(), "gradients": torch.cat([g.flatten() for g in grads])}


def check_wrapped(rank: int, wrap) -> None:
    torch.manual_seed(0)
    plain = small_net(CbamModule(32))
    fused = copy.deepcopy(plain)
    assert fuse_(fused, strict=True).fused
    exact = copy.deepcopy(plain).double()
    x = torch.randn(2, 2, 3, 9, 8)[rank]
    with mock.patch.object(gate_plan, "cbam", wraps=gate_plan.cbam) as operation:
        actual = step(wrap(fused), x)
    operation.assert_called_once()
    eager, expected = step(wrap(plain), x), step(wrap(exact), x.double())
    for name in actual:
        check_close(name, actual[name], eager[name], expected[name])


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_wrapped(wrap):
    processes.run(2, check_wrapped, wrap)
