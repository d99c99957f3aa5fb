"""Shared by all tests: backends as fixtures, a fixed number of threads, hypothesis without
randomness.
"""

import hypothesis
import pytest
import torch

from cbam_fused import backends
from tests.triton.selection import runs_in_the_interpreter
from tests.usable import FUSED, INTERPRETED, USABLE

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=80)
hypothesis.settings.register_profile("long", deadline=None, max_examples=5000)
hypothesis.settings.register_profile("interpreted", derandomize=True, deadline=None, max_examples=4)
hypothesis.settings.load_profile("interpreted" if INTERPRETED else "repeatable")


def pytest_configure(config):
    for marker in (
        "large: needs some ten gigabytes of memory; skipped where there is less",
        "exhaustive: left out unless asked for by -m exhaustive",
    ):
        config.addinivalue_line("markers", marker)


if INTERPRETED:
    from tests.triton.language import prepare_once

    prepare_once()


def pytest_collection_modifyitems(config, items):
    if INTERPRETED:
        deselected = [item for item in items if not runs_in_the_interpreter(item)]
        items[:] = [item for item in items if runs_in_the_interpreter(item)]
        config.hook.pytest_deselected(items=deselected)


@pytest.fixture(params=USABLE)
def backend(request) -> backends.Backend:
    """Every backend that is usable here."""
    return backends.get(request.param)


@pytest.fixture(params=FUSED)
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
