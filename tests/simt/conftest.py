"""The kernels' tests run in a process with ``CBAM_FUSED_SIMT=1``, the harness's own in others."""

from pathlib import Path

from tests.usable import SIMT

HARNESS = "test_harness.py"
KERNELS = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != HARNESS]

collect_ignore = [HARNESS] if SIMT else KERNELS
