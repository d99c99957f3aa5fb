"""Each operation of each backend under the tolerance rule, on the same arguments in every
precision.
"""

from functools import lru_cache

import pytest
import torch
from torch.nn.functional import batch_norm

from cbam_fused.ops import compute_dtype
from cbam_fused.schemas import SCHEMAS
from cbam_fused.testing import Attended, attend
from tests.arguments import arguments, check_operation
from tests.cases import BY_NAME, RUNS, run_id
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


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_move_as_those_of_a_batch_norm(backend, dtype, batch):
    gate = BY_NAME["n3"].gate()
    mean, var = torch.tensor([0.25], dtype=dtype), torch.tensor([2.0], dtype=dtype)
    options = (gate.pool, gate.maps, gate.ties)
    statistics = (True, mean, var, 0.375)
    attended = Attended(
        *backend.cbam_attend(gate.x[:batch], *gate.mlp, *gate.conv, *statistics, *options)
    )
    expected = {"running_mean": torch.tensor([0.25]), "running_var": torch.tensor([2.0])}
    if batch:
        batch_norm(attended.logits[:, None], **expected, training=True, momentum=0.375)
    precision = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for actual, name in ((mean, "running_mean"), (var, "running_var")):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.to(precision), expected[name].to(precision))
