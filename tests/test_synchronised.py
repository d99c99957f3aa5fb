"""Batch statistics over several processes: together they compute what one does on all samples."""

import copy
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn

from cbam_fused import CBAM, cbam, fuse_, use_backend
from cbam_fused.testing import check_close, scale_error
from tests import official, processes
from tests.blocks import Block, watched

if not distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

# Samples of each process.
SPLITS = ([3, 1], [2, 0], [1, 1])
BACKENDS = (None, "reference")


def gate(dtype: torch.dtype, norm: type = nn.BatchNorm2d) -> CBAM:
    torch.manual_seed(0)
    made = CBAM(16, reduction_ratio=4).double()
    made.SpatialGate.spatial.bn.weight.data.fill_(1.5)
    if norm is nn.SyncBatchNorm:
        made = norm.convert_sync_batchnorm(made)
    return made.to(dtype)


def inputs(samples: int) -> tuple[Tensor, Tensor]:
    """x and the gradient of y, float64."""
    generator = torch.Generator().manual_seed(1)
    drawn = {"generator": generator, "dtype": torch.float64}
    return tuple(torch.randn(samples, 16, 5, 4, **drawn) for _ in range(2))


class Step(NamedTuple):
    """What a step of training leaves.

    Attributes:
        samples: what belongs to a sample.
        grads: of the parameters of each of the two gates, as one vector.
        running: the statistics, as one vector.
    """

    samples: dict[str, Tensor]
    grads: dict[str, Tensor]
    running: Tensor


def step(module: CBAM, x: Tensor, grad: Tensor) -> Step:
    x = x.clone().requires_grad_()
    y = module(x, residual=x, activation="relu")
    y.backward(grad)
    grads = {
        name: torch.cat([p.grad.flatten() for p in child.parameters()])
        for name, child in module.named_children()
    }
    norm = module.SpatialGate.spatial.bn
    running = torch.cat((norm.running_mean, norm.running_var))
    return Step({"y": y.detach(), "x grad": x.grad}, grads, running)


def check_together(rank: int, split: list[int], backend: str | None) -> None:
    x, grad = inputs(sum(split))
    with use_backend("reference"):
        eager = step(gate(torch.float32), x.float(), grad.float())
        exact = step(gate(torch.float64), x, grad)
    x, grad = (values.float().split(split)[rank] for values in (x, grad))
    with use_backend(backend):
        mine = step(gate(torch.float32, nn.SyncBatchNorm), x, grad)
    for name in mine.samples:
        together = torch.cat(processes.gathered(mine.samples[name]))
        check_close(name, together, eager.samples[name], exact.samples[name])
    for name in mine.grads:
        total = torch.stack(processes.gathered(mine.grads[name])).sum(0)
        check_close(f"{name} grad", total, eager.grads[name], exact.grads[name])
    check_close("running statistics", mine.running, eager.running, exact.running)
    assert all(torch.equal(other, mine.running) for other in processes.gathered(mine.running))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_two_processes_compute_what_one_does(split, backend):
    processes.run(2, check_together, split, backend)


def same(one: Step, other: Step) -> bool:
    pairs = [(one.samples[name], other.samples[name]) for name in one.samples]
    pairs += [(one.grads[name], other.grads[name]) for name in one.grads]
    return all(itertools.starmap(torch.equal, [*pairs, (one.running, other.running)]))


def check_details(rank: int) -> None:
    x, grad = (values.float().split([3, 1])[rank] for values in inputs(4))
    alone = step(gate(torch.float32), x, grad)
    together = step(gate(torch.float32, nn.SyncBatchNorm), x, grad)
    assert not torch.allclose(alone.samples["y"], together.samples["y"])
    assert same(step(gate(torch.float32, nn.SyncBatchNorm), x, grad), together)

    # As one graph.
    module = gate(torch.float32, nn.SyncBatchNorm)
    module.compile(backend="aot_eager", fullgraph=True)
    assert same(step(module, x, grad), together)

    # A group of one, and eval mode, need nobody else.
    group = [distributed.new_group([process]) for process in range(2)][rank]
    module = nn.SyncBatchNorm.convert_sync_batchnorm(gate(torch.float32), group)
    assert same(step(module, x, grad), alone)
    if rank == 0:
        gate(torch.float32, nn.SyncBatchNorm).eval()(x)

    # A fused gate, converted before or after.
    ours = gate(torch.float32, nn.SyncBatchNorm)
    for steps in itertools.permutations((fuse_, nn.SyncBatchNorm.convert_sync_batchnorm)):
        theirs = official.CBAM(16, reduction_ratio=4)
        for change in steps:
            change(theirs)
        assert type(theirs.SpatialGate.spatial.bn) is nn.SyncBatchNorm
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(theirs(x), copy.deepcopy(ours)(x))

    # No process has a sample: there is nothing to learn from.
    module = gate(torch.float32, nn.SyncBatchNorm)
    before = module.SpatialGate.spatial.bn.running_var.clone()
    nothing = step(module, x[:0], grad[:0])
    assert all((values == 0).all() for values in nothing.grads.values())
    assert torch.equal(module.SpatialGate.spatial.bn.running_var, before)

    # As an argument; one pixel is enough for a batch if others have more.
    torch.manual_seed(2)
    conv = torch.randn(1, 2, 3, 3)
    mlp = (None, None, torch.randn(16, 16), None)
    y = cbam(
        x[:1, :, :1, :1],
        *mlp,
        conv,
        batch_statistics=True,
        process_group=distributed.group.WORLD,
    )
    assert y.isfinite().all()


def block_step(block: nn.Module, x: Tensor) -> Step:
    x = x.clone().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    grads = {
        name: torch.cat([p.grad.flatten() for p in child.parameters()])
        for name, child in block.named_children()
        if any(True for _ in child.parameters())
    }
    running = torch.cat([b for b in block.buffers() if b.is_floating_point()])
    return Step({"y": y.detach(), "x grad": x.grad}, grads, running)


def check_block(rank: int) -> None:
    """A block whose gate's norm was converted before it was fused or after.

    It is the only one: PyTorch's own forward of a SyncBatchNorm needs a GPU.
    """
    torch.manual_seed(0)
    block = Block()
    block.norm, block.project = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1)
    exact, (x, _) = copy.deepcopy(block).double(), inputs(4)
    eager = block_step(copy.deepcopy(block), x.float())
    expected = block_step(copy.deepcopy(exact), x)

    def check(name: str, actual: Tensor, eager: Tensor, expected: Tensor) -> None:
        check_close(name, actual, scale_error(eager, expected, expected), expected)

    for steps in itertools.permutations((fuse_, nn.SyncBatchNorm.convert_sync_batchnorm)):
        module = copy.deepcopy(exact)
        for change in steps:
            change(module)
        with watched() as calls:
            mine = block_step(module, x.split([3, 1])[rank])
        assert calls == [(True, "relu")]
        for name, values in mine.samples.items():
            together = torch.cat(processes.gathered(values))
            check(name, together, eager.samples[name], expected.samples[name])
        for name, values in mine.grads.items():
            total = torch.stack(processes.gathered(values)).sum(0)
            check(f"{name} grad", total, eager.grads[name], expected.grads[name])
        check("running statistics", mine.running, eager.running, expected.running)


def check_all_details(rank: int) -> None:
    check_details(rank)
    check_block(rank)


def test_details():
    processes.run(2, check_all_details)
