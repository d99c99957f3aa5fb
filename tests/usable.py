"""The backends under test: those for tensors on a CPU.

In a process with ``TRITON_INTERPRET=1`` it is only the Triton kernels, in Triton's interpreter;
with ``CBAM_FUSED_SIMT=1`` only the CUDA kernels, in the harness of `tests.simt`. `tests.selection`
says which tests run there.
"""

import os

import torch

from cbam_fused import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIMT = os.environ.get("CBAM_FUSED_SIMT") == "1"
SLOW = INTERPRETED or SIMT


def _usable() -> tuple[str, ...]:
    if INTERPRETED:
        return ("triton",)
    return ("cuda",) if SIMT else backends.available(torch.device("cpu"))


USABLE = _usable()
FUSED = tuple(name for name in USABLE if name != "reference")
