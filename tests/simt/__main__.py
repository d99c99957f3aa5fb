"""`python -m tests.simt MODE ARGUMENTS...`: pytest, on the CUDA kernels in a mode of the harness.

The modes are in ``build.py``.
"""

import os
import sys

from tests.simt import build, harness

if __name__ == "__main__":
    mode, *arguments = sys.argv[1:] or ["none"]
    if mode not in build.MODES:
        sys.exit(f"MODE must be one of {', '.join(build.MODES)}; got {mode}")
    environment = harness.environment(mode) | {"CBAM_FUSED_SIMT": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *arguments], environment)
