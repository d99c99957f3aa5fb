"""What each CUDA operation does, exactly: launches, passes over tensors as large as x, sectors of
memory; and the same results whatever the schedule.
"""

import pytest
import torch

from cbam_fused.schemas import SCHEMAS
from tests.cases import BY_NAME, Case, run_id
from tests.costs import RUNS, Passes, expected_passes
from tests.fingerprint import fingerprint
from tests.simt.running import run

AS_LARGE_AS_X = ("x", "grad", "y", "residual", "masked_grad", "x_grad")
LAUNCHES = {
    "cbam_inference": 5,
    "cbam_attend": 6,
    "cbam_apply": 1,
    "cbam_backward_reduce": 3,
    "cbam_backward_input": 5,
}
"""At most."""

ALIGNED = [
    (Case("aligned", "rows of whole vectors", (2, 64, 16, 16)), dtype, layout)
    for dtype in (torch.float32, torch.bfloat16)
    for layout in ("nchw", "channels_last")
]
SCHEDULES = (
    {"order": "descending", "resident": 3},
    {"order": "random", "seed": 1, "resident": 2},
    {"order": "random", "seed": 2, "resident": 7},
    {"order": "random", "seed": 3, "resident": 0},
    {"fill": 0x00},
    {"repeat": 2},
)
"""The arguments hold no running statistics, which `repeat` would update twice."""


def moved(traffic, x: torch.Tensor, loaded: str, stored: str) -> Passes:
    """Bytes or sectors of the tensors as large as x, in units of x."""
    large = [traffic[name] for name in AS_LARGE_AS_X if name in traffic]
    size = x.numel() * x.element_size()
    return Passes(*(sum(getattr(t, field) for t in large) / size for field in (loaded, stored)))


@pytest.mark.parametrize("run_", RUNS, ids=run_id)
@pytest.mark.parametrize("operation", SCHEMAS)
def test_passes_and_launches(operation, run_):
    case, dtype, layout = run_
    gate = case.gate(dtype, layout)
    ran = run(operation, gate)
    if gate.x.numel():
        assert moved(ran.traffic, gate.x, "loaded", "stored") == expected_passes(operation, gate)
    assert len(ran.launches) <= LAUNCHES[operation]


@pytest.mark.parametrize("run_", ALIGNED, ids=run_id)
@pytest.mark.parametrize("operation", SCHEMAS)
def test_every_byte_of_a_sector_is_used(operation, run_):
    case, dtype, layout = run_
    gate = case.gate(dtype, layout)
    traffic = run(operation, gate, count_sectors=True).traffic
    bytes_ = moved(traffic, gate.x, "loaded", "stored")
    sectors = moved(traffic, gate.x, "loaded_sectors", "stored_sectors")
    for moved_, sectors_ in zip(bytes_, sectors, strict=True):
        assert moved_ <= 32 * sectors_ <= 1.05 * moved_


@pytest.mark.parametrize("name", ["plain", "odd", "prime", "all_pools", "light_even"])
@pytest.mark.parametrize("operation", SCHEMAS)
def test_no_schedule_changes_a_bit(operation, name):
    for layout, dtype in (("nchw", torch.float32), ("channels_last", torch.bfloat16)):
        gate = BY_NAME[name].gate(dtype, layout)
        expected = fingerprint(run(operation, gate).results)
        for settings in SCHEDULES:
            actual = run(operation, gate, **settings).results
            assert fingerprint(actual) == expected, settings
