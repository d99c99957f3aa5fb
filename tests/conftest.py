"""Shared by all tests: backends as fixtures, a fixed number of threads, hypothesis without
randomness.
"""

import hypothesis
import pytest
import torch

from cbam_fused import backends
from tests.selection import is_selected
from tests.usable import FUSED, INTERPRETED, SIMT, SLOW, USABLE

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=80)
hypothesis.settings.register_profile("long", deadline=None, max_examples=5000)
hypothesis.settings.register_profile("slow", derandomize=True, deadline=None, max_examples=4)
hypothesis.settings.load_profile("slow" if SLOW else "repeatable")


def pytest_configure(config):
    for marker in (
        "large: needs some ten gigabytes of memory; skipped where there is less",
        "exhaustive: left out unless asked for by -m exhaustive",
    ):
        config.addinivalue_line("markers", marker)


if INTERPRETED:
    from tests.triton.language import prepare_once

    prepare_once()

if SIMT:
    from tests.simt import harness

    UNAVAILABLE = harness.unavailable()
    if not UNAVAILABLE:
        harness.stand_in()


def pytest_collection_modifyitems(config, items):
    if SLOW:
        selected = {item for item in items if is_selected(item, "simt" if SIMT else "triton")}
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = [item for item in items if item in selected]
    if SIMT and UNAVAILABLE:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=UNAVAILABLE))


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
