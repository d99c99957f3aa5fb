"""Each operation of each backend under the tolerance rule, on the same arguments in every precision."""

from functools import lru_cache

import pytest
import torch

from cbam_fused import backends
from cbam_fused.ops import compute_dtype
from cbam_fused.schemas import SCHEMAS
from cbam_fused.testing import attend, check_close, scale_error
from tests.arguments import arguments, double, results
from tests.cases import RUNS, run_id
from tests.ties import maxima

pytestmark = pytest.mark.usefixtures("filled_memory")


reference = backends.get("reference")


@lru_cache(maxsize=2)
def draws(case, dtype, layout):
    """The arguments of every operation, for each draw of the case."""
    return [arguments(gate) for gate in case.gates(dtype, layout)]


def stacked(backend, operation, draws, convert=tuple):
    """The results of an operation by name, all draws of each in one tensor."""
    function = getattr(backend, operation)
    runs = [results(operation, function(*convert(draw[operation]))) for draw in draws]
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


@pytest.mark.parametrize("operation", SCHEMAS)
@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_results_are_within_rounding(fused, operation, run):
    case, dtype, layout = run
    actual = stacked(fused, operation, draws(*run))
    expected = stacked(reference, operation, draws(*run), double)
    if dtype == torch.float64:
        single = draws(case, torch.float32, layout)
        eager = stacked(reference, operation, single)
        exact = stacked(reference, operation, single, double)
        eager = {name: scale_error(eager[name], exact[name], expected[name]) for name in expected}
    else:
        eager = stacked(reference, operation, draws(*run))
    for name in expected:
        check_close(f"{operation}: {name}", actual[name], eager[name], expected[name])


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_ties_are_exact(backend, run):
    """The maximum over pixels has no rounding; that over channels is of one rounded product by the backend's own gate."""
    case, dtype, layout = run
    gate = case.gate(dtype, layout)
    attended = attend(backend, gate)
    if attended.pixel_ties.numel():
        expected = maxima(gate.x.flatten(2), 2, gate.ties)
        assert torch.equal(attended.pixel_ties, expected)
    else:
        assert "max" not in gate.pool and gate.pool != "light" or case.shape[0] == 0
    if gate.conv_weight is not None:
        product = gate.x.to(compute_dtype(dtype)) * attended.channel_gate[:, :, None, None]
        assert torch.equal(attended.channel_ties, maxima(product, 1, gate.ties))
