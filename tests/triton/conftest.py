"""Kernels are either interpreted in this process, or compiled."""

from tests.usable import INTERPRETED

collect_ignore = (
    ["test_backend.py", "test_compiled.py"]
    if INTERPRETED
    else ["test_memory.py", "test_traffic.py", "test_operations.py", "test_warmup.py"]
)
