"""The gate on a GPU under autocast, torch.compile, checkpoint and functional_call."""

from tests.gpu import require_gpu
from tests.test_autocast import (
    chosen,
    test_backward_inside_the_context_is_the_same,
    test_float64_is_left_alone,
    test_is_a_cast_of_x_and_nothing_else,
    test_switched_off_inside,
    test_the_other_low_precision_is_cast_too,
)
from tests.test_autocast import test_compiles as test_autocast_compiles
from tests.test_compile import (
    fresh_compiler,
    test_checkpoint,
    test_functional_call,
    test_inductor,
    test_inference_compiles_as_one_graph,
    test_one_graph_for_all_sizes,
    test_training_compiles_as_one_graph,
    with_fused,
)

__all__ = [
    "chosen",
    "fresh_compiler",
    "test_autocast_compiles",
    "test_backward_inside_the_context_is_the_same",
    "test_checkpoint",
    "test_float64_is_left_alone",
    "test_functional_call",
    "test_inductor",
    "test_inference_compiles_as_one_graph",
    "test_is_a_cast_of_x_and_nothing_else",
    "test_one_graph_for_all_sizes",
    "test_switched_off_inside",
    "test_the_other_low_precision_is_cast_too",
    "test_training_compiles_as_one_graph",
    "with_fused",
]

require_gpu()
