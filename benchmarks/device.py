"""Times on a GPU: a clock of CUDA events that clears the L2 cache, CUDA graphs, and copies."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # elements of a program of the copy kernel: 4 or 8 accesses of 16 bytes a thread


class DeviceClock:
    """A `benchmarks.timing.Clock` of CUDA events around each call, the L2 cache cleared before.

    It is cleared by reading four times its size, so that no modified lines are left whose writing
    back would fall into the measurement. While that runs the call is queued: a replayed graph
    begins at once when it ends. Functions that keep the host busy for longer than that are timed
    with it.
    """

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._others = torch.zeros(max(4 * size, 2**26) // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        pairs = []
        for _ in range(calls):
            torch.sum(self._others, dim=0, out=self._sum)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """`function` as a CUDA graph; each call replays it."""
    current, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(current)
    with torch.cuda.stream(other):
        for _ in range(3):
            function()
    current.wait_stream(other)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@triton.jit
def copy_kernel(
    source,  # [count]
    target,  # [count]
    count,
    BLOCK: tl.constexpr,  # noqa: N803
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    tl.store(target + offsets, tl.load(source + offsets, mask=inside), mask=inside)


def copies(source: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to copy a dense tensor into another of its strides, by name; the fastest is the
    yardstick.
    """

    def by_kernel() -> None:
        programs = triton.cdiv(source.numel(), _BLOCK)
        copy_kernel[(programs,)](
            source, target, source.numel(), BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
        )

    return {
        "copy_": lambda: target.copy_(source),
        "x + 0": lambda: torch.add(source, 0, out=target),
        "copy kernel": by_kernel,
    }
