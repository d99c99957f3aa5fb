"""What runs where kernels for a GPU run on a CPU, and an operation takes tenths of a second.

The same tests as everywhere, on small convolutions, in few variants and draws.
"""

import re
from dataclasses import replace

import torch

DRAWS = 4  # judged together

# Seconds each; their shapes reach nothing in a kernel that others do not.
_TOO_LARGE = ("stage1", "long_plane")
_KERNEL_SIZES = {"plain": 7, "k_over_map": 5}  # others: at most 3

_VARIANTS = ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"))
# Each in one of these variants, in turn.
_NAMES = (
    "plain", "no_bias", "conv_bias_norm", "no_spatial_relu", "k_over_map", "max", "lse_large",
    "lp_zeros", "single_layer", "light", "light_even", "mlp_half", "residual_relu6",
    "residual_relu", "residual_x", "relu_ties", "relu_ties_even", "all_equal_even", "negative",
    "nan", "nan_even", "inf", "inf_odd", "hw1_even", "odd", "prime", "c1", "row", "n0", "n1",
)  # fmt: skip
_MORE_VARIANTS = (
    ("prime", torch.float64, "channels_last"),
    ("all_pools", torch.float16, "channels_last"),
    ("relu_ties_even", torch.bfloat16, "nchw"),
    ("odd", torch.float32, "sliced"),
    ("residual_relu", torch.float16, "mixed"),
)
# These also the way of large samples, in several programs.
STREAMED = (
    "plain", "no_spatial_relu", "max", "lse_large", "all_pools", "lp_zeros", "single_layer",
    "light_even", "mlp_half", "relu_ties", "relu_ties_even", "nan", "nan_even", "hw1_even", "odd",
    "prime", "c1", "row",
)  # fmt: skip

# Tests by file: patterns of their names, parameters included.
_TESTS = {
    "test_ops.py": (".*",),
    "test_gradients.py": (
        r"test_autograd_runs_the_operations\[.*(residual_x|light_even|no_spatial)-.*",
        r"test_gradients_do_not_depend_on_which.*",
        r"test_second_derivative_is_an_error\[.*plain\]",
        r"test_no_grad_and_inference_mode.*",
        r"test_saved_for_backward.*",
        r"test_running_statistics.*",
    ),
    "test_properties.py": (".*",),
    "test_determinism.py": (
        r"test_a_training_step_repeats_bitwise.*",
        r"test_a_sample_alone_is_the_sample_in_a_batch\[.*(odd|prime|light_even|n3)-.*",
        r"test_inference_is_attend_and_apply\[.*(prime|light_even|n3)-(float32-nchw|bfloat16-channels_last)",
        r"test_any_memory_address\[.*(odd|residual_relu)-(float32-channels_last|float16-nchw)",
    ),
    "test_contract.py": (
        r"test_fake_results.*(residual_relu|single_layer|n0)-(nchw|sliced)-.*float16.*",
        r"test_y_is_in_the_layout_of_x.*-frozen-.*",
    ),
    "test_compile.py": (
        r"test_training_compiles_as_one_graph\[.*residual_relu.*",
        r"test_inference_compiles_as_one_graph\[.*frozen.*",
        r"test_one_graph_for_all_sizes\[.*-nchw-.*",
        r"test_inductor.*",
    ),
    "test_errors.py": (r"test_pool_types_in_any_order.*",),
    "test_autocast.py": (r".*\[(triton|cuda).*",),
    # Not of the MLP: the interpreter rounds its gradients to 16 bits in another way than PyTorch.
    "test_parameter_dtypes.py": (
        r"test_a_wider_copy_gives_the_same\[(?!.*mlp).*(plain|frozen)-.*",
    ),
}


def cases(everywhere: tuple) -> tuple:
    """Those that run there, of all cases."""
    return tuple(
        replace(case, kernel_size=min(case.kernel_size, _KERNEL_SIZES.get(case.name, 3)))
        if case.kernel_size
        else case
        for case in everywhere
        if case.name not in _TOO_LARGE
    )


def runs(by_name: dict) -> list[tuple]:
    """The chosen cases in one variant, in turn, and some in more."""
    once = [(by_name[name], *_VARIANTS[i % 2]) for i, name in enumerate(_NAMES)]
    return once + [(by_name[name], dtype, layout) for name, dtype, layout in _MORE_VARIANTS]


def is_selected(item, folder: str) -> bool:
    """Whether a collected test is; all of those in ``folder`` are."""
    if item.path.parent.name == folder:
        return True
    return any(re.fullmatch(pattern, item.name) for pattern in _TESTS.get(item.path.name, ()))
