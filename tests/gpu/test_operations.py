"""Each operation on a GPU under the tolerance rule."""

from tests.gpu import require_gpu
from tests.test_ops import (
    pytestmark,
    test_results_are_within_rounding,
    test_running_statistics_move_as_those_of_a_batch_norm,
    test_ties_are_exact,
)

__all__ = [
    "pytestmark",
    "test_results_are_within_rounding",
    "test_running_statistics_move_as_those_of_a_batch_norm",
    "test_ties_are_exact",
]

require_gpu()
