"""What a call costs: passes over x anywhere; bytes, launches and a predicted time on a GPU.

The prediction is a simple model of a GPU: launches, and what moves at the rates of its memory and
its L2 cache.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cbam_fused.gpus import MIB, Gpu
from cbam_fused.layout import is_channels_last

# Of the data sheet's rate, what reading and writing side by side reach.
USABLE_RATE = 0.85
# Seconds from the end of a kernel to the start of the next one, in a graph.
LAUNCH_SECONDS = 1.4e-6


class Passes(NamedTuple):
    """How often an operation reads and writes tensors as large as x."""

    loads: int
    stores: int


def passes(
    operation: str, *, spatial: bool, residual: bool, activation: bool, again: bool
) -> Passes:
    """Of an operation's kernels.

    Args:
        spatial: there is a spatial gate.
        residual, activation: they follow.
        again: the gradient of a pooling needs x: lp, lse, or a maximum with ``ties="even"``.
    """
    return {
        "cbam_inference": Passes(2 + spatial + residual, 1),
        "cbam_attend": Passes(1 + spatial, 0),
        "cbam_apply": Passes(1 + residual, 1),
        "cbam_backward_reduce": Passes(2 + activation, int(activation)),
        "cbam_backward_input": Passes(spatial + 1 + again, 1),
    }[operation]


def eager_passes(pool: str, *, spatial: bool, residual: bool, activation: bool) -> Passes:
    """Of a gate in eval mode whose layers run one by one, as `fuse_` finds it.

    Args:
        pool: as of `cbam_fused.cbam`.
        spatial: there is a spatial gate.
        residual, activation: they follow; the activation in place.
    """
    pools = pool.replace("light", "avg+max").split("+")
    loads = sum({"avg": 1, "max": 1, "lp": 2, "lse": 4}[kind] for kind in pools)
    stores = sum({"avg": 0, "max": 0, "lp": 1, "lse": 2}[kind] for kind in pools)
    # Then x * Mc; the maximum and the mean over channels, and u * Ms; y + residual; act(y).
    loads += 1 + 3 * spatial + 2 * residual + activation
    stores += 1 + spatial + residual + activation
    return Passes(loads, stores)


class PlanRow(NamedTuple):
    """A row of the planner's table (csrc/cuda/planner.h).

    Attributes:
        reads_x_once: x is expected to come from device memory once, and from the L2 cache after.
    """

    name: str
    strategy: str
    reads_x_once: bool
    reason: str


class Launch(NamedTuple):
    """A launch.

    Attributes:
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster; 1 where there are none.
    """

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    cluster: int


class Call(NamedTuple):
    """One operation's call.

    Attributes:
        shape, dtype, channels_last: of x.
        plan: the planner's row; None for an operation with one strategy.
        group_samples: how many samples a step of the skewed strategy takes; 0 for others.
        launches: in order.
        bytes_accessed: of tensors as large as x, loaded and stored.
        bytes_moved: of these, to and from device memory, if the cache does what the plan expects.
        floor_bytes: what any implementation must move: each such tensor once.
        seconds: predicted.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    plan: PlanRow | None
    group_samples: int
    launches: tuple[Launch, ...]
    bytes_accessed: int
    bytes_moved: int
    floor_bytes: int
    seconds: float

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        size = "x".join(map(str, self.shape))
        lines = [f"{self.operation}  {size} {_short(self.dtype)} {layout}"]
        if self.plan:
            group = f", {self.group_samples} samples a step" if self.group_samples else ""
            lines.append(f"  strategy   {self.plan.strategy} (row {self.plan.name}{group})")
            lines.append(f"  because    {self.plan.reason}")
        counts = Counter(launch.kernel for launch in self.launches)
        width = max(map(len, counts), default=0)
        lines.append(f"  launches   {len(self.launches)}")
        for kernel, count in counts.items():
            some = [launch for launch in self.launches if launch.kernel == kernel]
            blocks = _range(launch.blocks for launch in some)
            threads = _range(launch.threads for launch in some)
            shared = _range(launch.shared_bytes for launch in some)
            clusters = f", in clusters of {some[0].cluster}" if some[0].cluster > 1 else ""
            lines.append(
                f"    {kernel:{width}} x{count:<4} {blocks} blocks of {threads} threads{clusters},"
                f" {shared} bytes of dynamic shared memory"
            )
        lines.append(
            f"  memory     {_size(self.bytes_moved)} moved, {_size(self.bytes_accessed)} accessed;"
            f" the floor is {_size(self.floor_bytes)}"
        )
        lines.append(f"  predicted  {self.seconds * 1e6:.1f} us")
        return "\n".join(lines)


class Explanation(NamedTuple):
    """What `explain` found out; it can be printed."""

    gpu: Gpu
    calls: tuple[Call, ...]

    @property
    def seconds(self) -> float:
        """Predicted, of all calls."""
        return sum(call.seconds for call in self.calls)

    def __str__(self) -> str:
        gpu = self.gpu
        head = (
            f"{gpu.name}: sm_{gpu.capability[0]}{gpu.capability[1]},"
            f" {gpu.multiprocessors} multiprocessors, {gpu.l2_bytes / MIB:.0f} MiB of"
            f" L2 cache, {gpu.memory_rate / 1e12:.2f} TB/s of memory"
        )
        counts = Counter(self.calls)
        calls = (_repeated(str(call), n) for call, n in counts.items())
        tail = (
            f"predicted in all: {self.seconds * 1e6:.1f} us, in a graph, with a cold cache;"
            " a model, not a measurement"
        )
        return "\n\n".join([head, *calls, tail])


def call(
    gpu: Gpu,
    operation: str,
    arguments: Mapping,
    plan: PlanRow | None,
    group_samples: int,
    launches: Sequence[Launch],
) -> Call:
    """A call of an operation with these arguments, by name, and what it costs."""
    x: Tensor = arguments["x"]
    pool = arguments.get("pool", "")
    weighted = "lp" in pool or "lse" in pool
    spatial = arguments.get("conv_weight") is not None
    maximum = spatial or "max" in pool or pool == "light"
    options = {
        "spatial": spatial,
        "residual": arguments.get("residual") is not None,
        "activation": arguments.get("activation", "none") != "none",
    }
    again = weighted or (maximum and arguments.get("ties") == "even")
    accessed = passes(operation, **options, again=again)
    floor = passes(operation, **options, again=False)
    if operation in ("cbam_inference", "cbam_attend"):
        floor = Passes(1 + options["residual"], floor.stores)
    if operation == "cbam_backward_input":
        floor = Passes(1 + (spatial or again), floor.stores)
    if plan and plan.strategy == "resident":
        accessed = floor
    moved = floor if plan and plan.reads_x_once else accessed
    size = x.numel() * x.element_size()
    bytes_accessed, bytes_moved, floor_bytes = (size * sum(p) for p in (accessed, moved, floor))
    transfers = max(bytes_moved / (gpu.memory_rate * USABLE_RATE), bytes_accessed / gpu.l2_rate)
    return Call(
        operation,
        tuple(x.shape),
        x.dtype,
        is_channels_last(x),
        plan,
        group_samples,
        tuple(launches),
        bytes_accessed,
        bytes_moved,
        floor_bytes,
        len(launches) * LAUNCH_SECONDS + transfers,
    )


# ---- Text ---------------------------------------------------------------------------------------


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _repeated(text: str, count: int) -> str:
    """A call's text that says how often it is made."""
    head, _, rest = text.partition("\n")
    return text if count == 1 else f"{head}  ({count} times)\n{rest} each"


def _range(values: Iterator[int]) -> str:
    numbers = sorted(set(values))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
