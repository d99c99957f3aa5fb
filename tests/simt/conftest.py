"""The kernels' tests run in a process with ``CBAM_FUSED_SIMT=1``, the harness's own in others."""

from tests.usable import SIMT

collect_ignore = ["test_harness.py"] if SIMT else ["test_operations.py"]
