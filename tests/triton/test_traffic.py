"""What each operation costs: launches, and passes over tensors as large as x, exactly.

All under `watch`: no access lies outside of its tensor, no two programs of a launch meet.
"""

from dataclasses import replace

import pytest
import torch

from cbam_fused import triton_kernels
from cbam_fused.schemas import SCHEMAS
from cbam_fused.testing import Gate
from tests.arguments import RESULTS, arguments
from tests.cases import BY_NAME, run_id
from tests.costs import NAMES, RUNS, SHAPES, expected_passes
from tests.fingerprint import fingerprint
from tests.triton.memory import passes, watch

pytestmark = pytest.mark.usefixtures("filled_memory")

LAUNCHES = {
    "cbam_inference": 4,
    "cbam_attend": 3,
    "cbam_apply": 1,
    "cbam_backward_reduce": 2,
    "cbam_backward_input": 4,
}
"""At most."""


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
    if gate.x.numel():
        assert passes(launches, gate.x) == expected_passes(operation, gate)
    assert len(launches) <= LAUNCHES[operation]


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
