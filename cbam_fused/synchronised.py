"""The statistics of a batch norm over the processes of a group, as SyncBatchNorm has them.

Every process brings what it has of its own batch, which may be of another size than the others' or
empty, and merges what came from all in the order of the ranks: the same bits everywhere.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn

Group = Any
"""A `torch.distributed.ProcessGroup`, which PyTorch may have been built without."""


def is_group(value: object) -> bool:
    return distributed.is_available() and isinstance(value, distributed.ProcessGroup)


def group_of(norm: nn.Module) -> Group | None:
    """The group over which `norm` is synchronised now; None if it is not, or is alone in it."""
    if not (norm.training and isinstance(norm, nn.SyncBatchNorm)):
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def merge(mean: Tensor, var: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and biased variance over all processes, and how many values they are of.

    Args:
        mean, var: ``[1]``, of this process's `count` values.

    Returns:
        mean and var ``[1]`` in their dtype, and the count ``[1]`` in float64. Zeros, if no process
        has any.
    """
    own = torch.cat((mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)))
    means, variances, counts = _of_all(own, group).unbind(1)
    total = counts.sum(0, keepdim=True)
    weights = counts / total.clamp(min=1)
    merged = (means * weights).sum(0, keepdim=True)
    merged_var = ((variances + (means - merged).square()) * weights).sum(0, keepdim=True)
    return merged.to(mean.dtype), merged_var.to(var.dtype), total


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float,
) -> None:
    """Moves the running statistics, if there are any, towards the mean and unbiased variance of
    `count` values; of none they stay.
    """
    weight = momentum * (count > 0).double()
    unbiased = var * (count / (count - 1).clamp(min=1))
    for running, value in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.copy_(torch.lerp(running.double(), value.double(), weight))


def add(sums: Tensor, group: Group) -> Tensor:
    """The sum of `sums` over all processes, in its dtype."""
    return _of_all(sums.double(), group).sum(0).to(sums.dtype)


def _of_all(own: Tensor, group: Group) -> Tensor:
    """What each rank has, ``[ranks, ...]``: to a row of zeros only its own rank adds something."""
    rows = own.new_zeros((distributed.get_world_size(group), *own.shape))
    rows[distributed.get_rank(group)] = own
    distributed.all_reduce(rows, group=group)
    return rows
