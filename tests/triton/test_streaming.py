"""Small samples the way of large ones: what keeps a sample in one program is not used."""

import pytest

from cbam_fused import backends
from tests import test_determinism, test_ops
from tests.arguments import check_operation
from tests.cases import RUNS, run_id
from tests.triton.selection import STREAMED

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
