"""Each operation of each backend under the tolerance rule, on the same arguments in every
precision.
"""

from functools import lru_cache

import pytest
import torch

from cbam_fused.ops import compute_dtype
from cbam_fused.schemas import SCHEMAS
from cbam_fused.testing import attend
from tests.arguments import arguments, check_operation
from tests.cases import RUNS, run_id
from tests.ties import maxima

pytestmark = pytest.mark.usefixtures("filled_memory")


@lru_cache(maxsize=2)
def draws(case, dtype, layout):
    """The arguments of every operation, for each draw of the case."""
    return [arguments(gate) for gate in case.gates(dtype, layout)]


@pytest.mark.parametrize("operation", SCHEMAS)
@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_results_are_within_rounding(fused, operation, run):
    case, dtype, layout = run
    check_operation(fused, operation, dtype, lambda precision: draws(case, precision, layout))


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_ties_are_exact(backend, run):
    """The maximum over pixels has no rounding; that over channels is of one rounded product by the
    backend's own gate.
    """
    case, dtype, layout = run
    gate = case.gate(dtype, layout)
    attended = attend(backend, gate)
    if attended.pixel_ties.numel():
        expected = maxima(gate.x.flatten(2), 2, gate.ties)
        assert torch.equal(attended.pixel_ties, expected)
    else:
        assert ("max" not in gate.pool and gate.pool != "light") or case.shape[0] == 0
    if gate.conv_weight is not None:
        product = gate.x.to(compute_dtype(dtype)) * attended.channel_gate[:, :, None, None]
        assert torch.equal(attended.channel_ties, maxima(product, 1, gate.ties))
