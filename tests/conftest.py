"""Shared by all tests: backends as fixtures, a fixed number of threads, hypothesis without
randomness.
"""

import hypothesis
import pytest
import torch

from cbam_fused import backends

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=80)
hypothesis.settings.register_profile("long", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "large: needs some ten gigabytes of memory; skipped where there is less"
    )


@pytest.fixture(params=backends.available())
def backend(request) -> backends.Backend:
    """Every backend that is usable here."""
    return backends.get(request.param)


@pytest.fixture(params=[name for name in backends.available() if name != "reference"])
def fused(request) -> backends.Backend:
    """Every usable backend but the reference, which these are compared with."""
    return backends.get(request.param)


@pytest.fixture
def filled_memory():
    """Uninitialised memory holds NaN and the largest integers, so that what an operation leaves
    unwritten shows.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan(), "torch.empty is not filled"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of threads; the previous one returns after the test."""
    previous = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(previous)
