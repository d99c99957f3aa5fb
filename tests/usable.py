"""The backends under test: those for tensors on a CPU.

In a process with ``TRITON_INTERPRET=1`` it is only the Triton kernels, in Triton's interpreter;
`tests.triton.selection` says which tests run there.
"""

import os

import torch

from cbam_fused import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
USABLE = ("triton",) if INTERPRETED else backends.available(torch.device("cpu"))
FUSED = tuple(name for name in USABLE if name != "reference")
