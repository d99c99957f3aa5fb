"""What each operation costs: launches, and passes over tensors as large as x, exactly.

All under `watch`: no access lies outside of its tensor, no two programs of a launch meet.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from cbam_fused import triton_kernels
from cbam_fused.schemas import SCHEMAS
from cbam_fused.testing import Gate
from tests.arguments import RESULTS, arguments
from tests.cases import BY_NAME, Case, run_id
from tests.fingerprint import fingerprint
from tests.triton.memory import passes, watch

pytestmark = pytest.mark.usefixtures("filled_memory")

NAMES = (
    "plain", "frozen", "odd", "prime", "no_spatial", "no_spatial_relu", "avg", "lp", "lse",
    "all_pools", "single_layer", "light_even", "residual", "residual_relu", "residual_relu6",
    "relu_ties_even", "hw1", "hw1_even", "row", "c1", "nan", "k_over_map", "n0",
)  # fmt: skip
SHAPES = tuple(
    replace(case, kernel_size=3)
    for case in (
        Case("one_tile_more", "two tiles of pixels", (1, 20, 5, 60), norm="frozen"),
        Case("long_plane", "several tiles of pixels, the last one broken", (1, 6, 41, 30)),
        Case("long_plane_even", "the same with x read again", (1, 6, 41, 30), ties="even"),
        Case("channel_splits", "more channels than one program takes", (1, 640, 4, 7), hidden=8),
    )
)
VARIANTS = ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"))
RUNS = [
    (case, *VARIANTS[i % 2]) for i, case in enumerate((*(BY_NAME[name] for name in NAMES), *SHAPES))
]


class Cost(NamedTuple):
    loads: float  # in units of x
    stores: float
    launches: int  # at most


def expected_cost(operation: str, gate: Gate) -> Cost:
    spatial, residual = gate.conv_weight is not None, gate.residual is not None
    masked = gate.activation != "none"
    maximum = spatial or "max" in gate.pool or gate.pool == "light"
    weighted = "lp" in gate.pool or "lse" in gate.pool
    again = weighted or (maximum and gate.ties == "even")
    return {
        "cbam_inference": Cost(2 + spatial + residual, 1, 4),
        "cbam_attend": Cost(1 + spatial, 0, 3),
        "cbam_apply": Cost(1 + residual, 1, 1),
        "cbam_backward_reduce": Cost(2 + masked, masked, 2),
        "cbam_backward_input": Cost(spatial + 1 + again, 1, 4),
    }[operation]


def watched(operation: str, gate: Gate, reverse: bool = False):
    """The launches of the operation, and hashes of its results."""
    values = arguments(gate)[operation]
    with watch(reverse) as launches:
        results = getattr(triton_kernels, operation)(*values)
    results = (results,) if isinstance(results, torch.Tensor) else results
    return launches, fingerprint(dict(zip(RESULTS[operation], results, strict=True)))


@pytest.mark.usefixtures("no_whole_samples")
@pytest.mark.parametrize("run", RUNS, ids=run_id)
@pytest.mark.parametrize("operation", SCHEMAS)
def test_passes_and_launches(operation, run):
    case, dtype, layout = run
    gate = case.gate(dtype, layout)
    launches, _ = watched(operation, gate)
    cost = expected_cost(operation, gate)
    if gate.x.numel():
        assert passes(launches, gate.x) == cost[:2]
    assert len(launches) <= cost.launches


@pytest.mark.parametrize("case", [BY_NAME["all_pools"], *SHAPES[2:]], ids=str)
@pytest.mark.parametrize("operation", SCHEMAS)
def test_programs_may_run_in_any_order(operation, case):
    gate = replace(case, shape=(2, *case.shape[1:])).gate(torch.bfloat16, "channels_last")
    assert watched(operation, gate, reverse=True)[1] == watched(operation, gate)[1]


@pytest.mark.parametrize("run", RUNS[: len(NAMES)], ids=run_id)
@pytest.mark.parametrize("operation", ["cbam_inference", "cbam_attend"])
def test_samples_that_fit_one_program_are_read_once(operation, run):
    case, dtype, layout = run
    gate = case.gate(dtype, layout)
    launches, _ = watched(operation, gate)
    inference = operation == "cbam_inference"
    convolved = gate.conv_weight is not None and not inference
    if gate.x.numel():
        residual = inference and gate.residual is not None
        assert passes(launches, gate.x) == (1 + residual, inference)
        assert [launch.programs for launch in launches[:1]] == [gate.x.shape[0]]
        assert len(launches) == 1 + convolved


def test_scratch_is_filled_before_it_is_written(monkeypatch):
    """`filled_memory` reaches what kernels allocate for themselves: its first launch finds NaN."""
    filled = []

    def note(kernel, programs, *arguments, configuration, **constants):
        names = dict(zip(kernel.arg_names, arguments, strict=False))
        filled.append(names["partial_products_ptr"].isnan().all().item())
        raise StopIteration

    values = arguments(BY_NAME["n1"].gate())["cbam_attend"]
    monkeypatch.setattr("cbam_fused.triton_kernels.pool_pixels.launch", note)
    with pytest.raises(StopIteration):
        triton_kernels.cbam_attend(*values)
    assert filled == [True]
