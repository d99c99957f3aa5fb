"""The differentiable gate on a GPU."""

from tests.gpu import require_gpu
from tests.test_gradients import (
    test_autograd_runs_the_operations,
    test_gradcheck,
    test_gradient_of_a_sum_of_a_branch_not_used,
    test_gradients_are_those_of_autograd_on_the_reference,
    test_gradients_do_not_depend_on_which_are_asked_for,
    test_no_grad_and_inference_mode,
    test_running_statistics_move_as_those_of_a_batch_norm,
    test_running_statistics_of_a_frozen_norm_stay,
    test_saved_for_backward,
    test_second_derivative_is_an_error,
    test_whole_gate_is_within_rounding,
)

__all__ = [
    "test_autograd_runs_the_operations",
    "test_gradcheck",
    "test_gradient_of_a_sum_of_a_branch_not_used",
    "test_gradients_are_those_of_autograd_on_the_reference",
    "test_gradients_do_not_depend_on_which_are_asked_for",
    "test_no_grad_and_inference_mode",
    "test_running_statistics_move_as_those_of_a_batch_norm",
    "test_running_statistics_of_a_frozen_norm_stay",
    "test_saved_for_backward",
    "test_second_derivative_is_an_error",
    "test_whole_gate_is_within_rounding",
]

require_gpu()
