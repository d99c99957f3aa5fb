"""Small samples the way of large ones: what keeps a sample in one program is not used."""

from dataclasses import replace

import pytest
import torch

from cbam_fused import backends
from cbam_fused.testing import attend
from cbam_fused.triton_kernels import configurations
from cbam_fused.triton_kernels.geometry import geometry
from tests import test_determinism, test_ops
from tests.arguments import check_operation
from tests.cases import BY_NAME, RUNS, run_id
from tests.selection import STREAMED

pytestmark = pytest.mark.usefixtures("filled_memory", "no_whole_samples")
TRITON = backends.get("triton")
STREAMED_RUNS = [run for run in RUNS if run[0].name in STREAMED]


@pytest.mark.parametrize("operation", ["cbam_inference", "cbam_attend"])
@pytest.mark.parametrize("run", STREAMED_RUNS, ids=run_id)
def test_results_are_within_rounding(operation, run):
    case, dtype, layout = run
    check_operation(
        TRITON, operation, dtype, lambda precision: test_ops.draws(case, precision, layout)
    )


@pytest.mark.parametrize("run", STREAMED_RUNS, ids=run_id)
def test_ties_are_exact(run):
    test_ops.test_ties_are_exact(TRITON, run)


@pytest.mark.parametrize("run", STREAMED_RUNS[::2], ids=run_id)
def test_inference_is_attend_and_apply(run):
    test_determinism.test_inference_is_attend_and_apply(TRITON, run)


def test_split_channels_with_small_tiles_of_logits(monkeypatch):
    """A program convolves only maps that it has combined itself, whatever tiles were asked for."""
    gate = BY_NAME["frozen"].gate()
    shape, tuned = geometry(gate.x), {}
    monkeypatch.setattr(configurations, "_tuned", tuned)
    table = configurations.from_table
    split = replace(table("gate_pool_channels_kernel", shape), block_c=4, split_c=4)
    configurations.tune("gate_pool_channels_kernel", shape, split)
    small = replace(table("logits_kernel", shape), block_p=16, num_warps=1)
    configurations.tune("logits_kernel", shape, small)
    assert split.splits(shape) > 1
    assert small.tiles(shape) > 1
    actual, expected = attend(TRITON, gate), attend(backends.get("reference"), gate)
    torch.testing.assert_close(actual.logits, expected.logits)
