"""Kernels are either interpreted in this process, or compiled."""

import pytest

from tests.usable import INTERPRETED

collect_ignore = (
    ["test_backend.py", "test_compiled.py"]
    if INTERPRETED
    else [
        "test_memory.py",
        "test_traffic.py",
        "test_operations.py",
        "test_streaming.py",
        "test_warmup.py",
    ]
)


@pytest.fixture
def no_whole_samples(monkeypatch):
    """Small samples go the way of large ones, through several programs and launches."""
    monkeypatch.setattr("cbam_fused.triton_kernels.configurations._SAMPLE_WORDS", 0)
