"""The kernels' tests run in a process with ``CBAM_FUSED_SIMT=1``, the harness's own in others."""

from tests.usable import SIMT

OF_KERNELS = ["test_operations.py", "test_shapes.py", "test_strategies.py"]

collect_ignore = ["test_harness.py"] if SIMT else OF_KERNELS
