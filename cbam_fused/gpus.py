"""GPUs that are described, not there: for `cbam_fused.explain`."""

from typing import NamedTuple

import torch

MIB = 1 << 20
_KIB = 1 << 10


class Gpu(NamedTuple):
    """A GPU, as the planner and the model of time see it.

    Attributes:
        capability: compute capability, as ``(9, 0)``.
        multiprocessors: their number.
        l2_bytes: size of the L2 cache.
        shared_bytes, block_shared_bytes: shared memory of a multiprocessor, and what of it a block
            may have.
        memory_rate: bytes a second to and from device memory, by the data sheet.
        l2_rate: bytes a second from the L2 cache.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int
    block_shared_bytes: int
    memory_rate: float
    l2_rate: float


# Shared memory of a multiprocessor, and of a block at most, in KiB: CUDA programming guide,
# technical specifications by compute capability.
_SHARED = {
    (7, 5): (64, 64),
    (8, 0): (164, 163),
    (8, 6): (100, 99),
    (8, 9): (100, 99),
    (9, 0): (228, 227),
    (10, 0): (228, 227),
    (12, 0): (100, 99),
}


def _gpu(
    name: str, capability: tuple[int, int], multiprocessors: int, l2_mib: int, rate: float
) -> Gpu:
    shared, of_block = (kib * _KIB for kib in _SHARED[capability])
    # What the L2 delivers is published by nobody: twice the memory's rate is assumed.
    l2_bytes, rates = l2_mib * MIB, (rate, 2 * rate)
    return Gpu(name, capability, multiprocessors, l2_bytes, shared, of_block, *rates)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # Multiprocessors, L2 and memory: NVIDIA's architecture papers and data sheets, of the SXM
        # modules where there are others, and of the A100 with 80 GB.
        _gpu("H200", (9, 0), 132, 60, 4.8e12),
        _gpu("H100", (9, 0), 132, 50, 3.35e12),
        _gpu("B200", (10, 0), 148, 126, 8.0e12),
        _gpu("A100", (8, 0), 108, 40, 2.04e12),
        _gpu("L40S", (8, 9), 142, 96, 0.864e12),
        _gpu("RTX 4090", (8, 9), 128, 72, 1.008e12),
        _gpu("RTX 5090", (12, 0), 170, 96, 1.792e12),
        _gpu("L4", (8, 9), 58, 48, 0.3e12),
        _gpu("A10", (8, 6), 72, 6, 0.6e12),
        _gpu("T4", (7, 5), 40, 4, 0.32e12),
    )
}
"""By name."""


def described(gpu: object) -> Gpu:
    """The GPU of that name, or `gpu` itself; None: PyTorch's current one, or else an H200.

    Raises ValueError for anything else, RuntimeError where the current one does not say how fast
    its memory is.
    """
    if isinstance(gpu, Gpu):
        return gpu
    if gpu is None:
        return _this_gpu() if torch.cuda.is_available() else GPUS["H200"]
    if not isinstance(gpu, str) or gpu not in GPUS:
        names = ", ".join(GPUS)
        raise ValueError(f"explain: gpu must be a cbam_fused.Gpu or one of {names}; got {gpu!r}")
    return GPUS[gpu]


def _this_gpu() -> Gpu:
    properties = torch.cuda.get_device_properties()
    # Kilohertz and bits; two transfers a cycle.
    rate = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8
    if rate == 0:
        raise RuntimeError(
            f"explain: gpu must be given: {properties.name} does not say how fast its memory is"
        )
    return Gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.L2_cache_size,
        properties.shared_memory_per_multiprocessor,
        properties.shared_memory_per_block_optin,
        rate,
        2 * rate,
    )
