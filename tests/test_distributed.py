"""Fused gates and blocks in networks that PyTorch distributes over two processes."""

import copy

import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cbam_fused import fuse_
from cbam_fused.testing import check_close, scale_error
from tests import processes
from tests.blocks import Block, C, watched

if not distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)


def network() -> nn.Module:
    """A block with its epilogue, and a gate by itself."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, C, 3, padding=1)
    return nn.Sequential(first, Block(CbamModule), CbamModule(C), nn.Conv2d(C, 4, 1), nn.Flatten())


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded_root(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def sharded_children(model: nn.Module) -> nn.Module:
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child)  # the block and the gate among them
    return fully_shard(model)


def sharded_gates(model: nn.Module) -> nn.Module:
    """The block's gate gets hooks, so that it runs by itself."""
    for module in model.modules():
        if isinstance(module, CbamModule):
            fully_shard(module)
    return fully_shard(model)


def fully_shard(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=mesh())


def replicated(model: nn.Module) -> nn.Module:
    """Every parameter is a DTensor, which the fused operations do not take."""
    from torch.distributed.tensor import distribute_module

    inputs = (lambda _, x, mesh: shard_of_batch(x[0], mesh), lambda _, y, __: y.to_local())
    return distribute_module(model, mesh(), None, *inputs)


def shard_of_batch(x: Tensor, mesh) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(x, mesh, [Shard(0)])


def mesh():
    return distributed.init_device_mesh("cpu", (distributed.get_world_size(),))


WITH_EPILOGUE, ALONE = (True, "relu"), (False, "none")
# The calls of the fused operation that each is to make.
WRAPPERS = {
    ddp: [WITH_EPILOGUE, ALONE],
    sharded_root: [WITH_EPILOGUE, ALONE],
    sharded_children: [WITH_EPILOGUE, ALONE],
    sharded_gates: [ALONE, ALONE],
    replicated: [],
}


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    y.square().mean().backward()
    grads = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in model.parameters()
    ]
    return {"y": y.detach(), "gradients": torch.cat([g.flatten() for g in grads])}


def check_wrapped(rank: int) -> None:
    plain = network()
    exact = copy.deepcopy(plain).double()
    x = torch.randn(2, 2, 3, 9, 8)[rank]
    for wrap, calls in WRAPPERS.items():
        fused = copy.deepcopy(exact)
        assert len(fuse_(fused, strict=True).fused) == 2
        with watched() as made:
            actual = step(wrap(fused), x.double())
        assert made == calls, wrap
        eager = step(wrap(copy.deepcopy(plain)), x)
        expected = step(wrap(copy.deepcopy(exact)), x.double())
        for name in actual:
            rounded = scale_error(eager[name], expected[name], expected[name])
            check_close(f"{name}, {wrap.__name__}", actual[name], rounded, expected[name])

        late = wrap(copy.deepcopy(plain))  # fuse_ comes last
        reasons = {row.reason for row in fuse_(late).gates}
        sharded = "channel.fc1.weight is a DTensor in float32, not a Parameter in a floating dtype"
        assert reasons == ({""} if wrap is ddp else {sharded})


def test_wrapped():
    processes.run(2, check_wrapped)
