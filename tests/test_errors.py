"""Every error message: the operation, the argument, what was expected and what came; and nothing
has changed.
"""

import inspect
import re

import pytest
import torch

import cbam_fused
from cbam_fused import backends, checks

FLOATS = "float32, float16, bfloat16 or float64"
X = f"cbam: x must be [N, C, H, W] in {FLOATS}; got "
POOL = "cbam: pool must be light or a subset of avg, max, lp, lse joined by +; got "


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def inference_zeros(*shape):
    with torch.inference_mode():
        return torch.zeros(shape)


def valid():
    """Arguments that work: 8 channels, 2 hidden units, a 7 x 7 kernel, a norm in training."""
    return {
        "x": zeros(2, 8, 5, 6),
        "mlp_weight1": zeros(2, 8),
        "mlp_bias1": zeros(2),
        "mlp_weight2": zeros(8, 2),
        "mlp_bias2": zeros(8),
        "conv_weight": zeros(1, 2, 7, 7),
        "conv_bias": zeros(1),
        "norm_weight": zeros(1),
        "norm_bias": zeros(1),
        "running_mean": zeros(1),
        "running_var": zeros(1),
        "residual": zeros(2, 8, 5, 6),
        "batch_statistics": True,
    }


# Name: the arguments changed, the exception, its message.
ERRORS = {
    "x_rank": ({"x": zeros(8, 64)}, TypeError, X + "float32 [8, 64] on cpu"),
    "x_integer": ({"x": zeros(2, 8, 5, 6, dtype=torch.int64)}, TypeError,
                  X + "int64 [2, 8, 5, 6] on cpu"),
    "x_complex": ({"x": zeros(2, 8, 5, 6, dtype=torch.complex64)}, TypeError,
                  X + "complex64 [2, 8, 5, 6] on cpu"),
    "x_bool": ({"x": zeros(2, 8, 5, 6, dtype=torch.bool)}, TypeError,
               X + "bool [2, 8, 5, 6] on cpu"),
    "x_float8": ({"x": zeros(2, 8, 5, 6, dtype=torch.float8_e4m3fn)}, TypeError,
                 X + "float8_e4m3fn [2, 8, 5, 6] on cpu"),
    "x_list": ({"x": [1.0]}, TypeError, X + "[1.0]"),
    "x_no_pixels": ({"x": zeros(2, 8, 0, 6)}, ValueError,
                    ("cbam: x must be [N, C, H, W] with C, H and W at least 1; got float32 [2, 8, "
                    "0, 6] on cpu")),
    "x_no_channels": ({"x": zeros(2, 0, 5, 6)}, ValueError,
                      ("cbam: x must be [N, C, H, W] with C, H and W at least 1; got float32 [2, "
                      "0, 5, 6] on cpu")),
    "x_one_value": ({"x": zeros(1, 8, 1, 1), "residual": None}, ValueError,
                    ("cbam: x must be more than one pixel in the batch for batch_statistics; "
                    "got float32 [1, 8, 1, 1] on cpu")),
    "channels": ({"x": zeros(2, 9, 5, 6), "residual": None}, ValueError,
                 "cbam: mlp_weight1 must be [2, 9] or [2, 9, 1, 1]; got float32 [2, 8] on cpu"),
    "momentum": ({"momentum": None}, TypeError, "cbam: momentum must be a number; got None"),
    "eps": ({"eps": "1e-5"}, TypeError, "cbam: eps must be a number; got '1e-5'"),
    "running_var_inference": ({"running_var": inference_zeros(1)}, ValueError,
                              ("cbam: running_var must be no inference tensor, as it is updated; "
                              "got float32 [1] on cpu")),
    "mlp_weight1_rank": ({"mlp_weight1": zeros(2, 8, 1)}, TypeError,
                         ("cbam: mlp_weight1 must be [R, 8] or [R, 8, 1, 1]; got float32 [2, 8, 1] "
                         "on cpu")),
    "mlp_weight1_kernel": ({"mlp_weight1": zeros(2, 8, 3, 3)}, ValueError,
                           ("cbam: mlp_weight1 must be [2, 8] or [2, 8, 1, 1]; got float32 [2, 8, "
                           "3, 3] on cpu")),
    "mlp_weight1_empty": ({"mlp_weight1": zeros(0, 8)}, ValueError,
                          ("cbam: mlp_weight1 must be [R, 8] with R at least 1; got float32 [0, 8] "
                          "on cpu")),
    "mlp_weight1_integer": ({"mlp_weight1": zeros(2, 8, dtype=torch.int8)}, TypeError,
                            (f"cbam: mlp_weight1 must be a tensor in {FLOATS}; got int8 [2, 8] on "
                            f"cpu")),
    "mlp_weight1_device": ({"mlp_weight1": zeros(2, 8, device="meta")}, ValueError,
                           ("cbam: mlp_weight1 must be on the device of x, cpu; got float32 [2, 8] "
                           "on meta")),
    "mlp_bias1": ({"mlp_bias1": zeros(8)}, ValueError,
                  "cbam: mlp_bias1 must be [2]; got float32 [8] on cpu"),
    "mlp_bias1_alone": ({"mlp_weight1": None, "mlp_weight2": zeros(8, 8)}, ValueError,
                        ("cbam: mlp_bias1 must be None where mlp_weight1 is None; got float32 [2] "
                        "on cpu")),
    "mlp_weight2": ({"mlp_weight2": zeros(2, 8)}, ValueError,
                    "cbam: mlp_weight2 must be [8, 2] or [8, 2, 1, 1]; got float32 [2, 8] on cpu"),
    "mlp_weight2_single": ({"mlp_weight1": None, "mlp_bias1": None}, ValueError,
                           ("cbam: mlp_weight2 must be [8, 8] or [8, 8, 1, 1]; got float32 [8, 2] "
                           "on cpu")),
    "mlp_weight2_none": ({"mlp_weight2": None}, TypeError,
                         "cbam: mlp_weight2 must be [8, 2] or [8, 2, 1, 1]; got None"),
    "mlp_bias2": ({"mlp_bias2": zeros(2)}, ValueError,
                  "cbam: mlp_bias2 must be [8]; got float32 [2] on cpu"),
    "mlp_bias2_text": ({"mlp_bias2": "none"}, TypeError,
                       f"cbam: mlp_bias2 must be a tensor in {FLOATS}; got 'none'"),
    "kernel_even": ({"conv_weight": zeros(1, 2, 4, 4)}, ValueError,
                    ("cbam: conv_weight must be [1, 2, k, k] with k odd; got float32 [1, 2, 4, 4] "
                    "on cpu")),
    "kernel_not_square": ({"conv_weight": zeros(1, 2, 3, 5)}, ValueError,
                          ("cbam: conv_weight must be [1, 2, 5, 5]; got float32 [1, 2, 3, 5] on "
                          "cpu")),
    "kernel_maps": ({"maps": "light"}, ValueError,
                    "cbam: conv_weight must be [1, 1, 7, 7]; got float32 [1, 2, 7, 7] on cpu"),
    "kernel_number": ({"conv_weight": 7}, ValueError,
                      "cbam: conv_weight must be [1, 2, k, k] with k odd; got 7"),
    "conv_bias": ({"conv_bias": zeros(2)}, ValueError,
                  "cbam: conv_bias must be [1]; got float32 [2] on cpu"),
    "conv_bias_alone": ({"conv_weight": None}, ValueError,
                        ("cbam: conv_bias must be None where conv_weight is None; got float32 [1] "
                        "on cpu")),
    "norm_weight": ({"norm_weight": zeros(8)}, ValueError,
                    "cbam: norm_weight must be [1]; got float32 [8] on cpu"),
    "norm_bias": ({"norm_bias": zeros(8)}, ValueError,
                  "cbam: norm_bias must be [1]; got float32 [8] on cpu"),
    "running_mean": ({"running_mean": zeros(8)}, ValueError,
                     "cbam: running_mean must be [1]; got float32 [8] on cpu"),
    "running_var": ({"running_var": zeros(8)}, ValueError,
                    "cbam: running_var must be [1]; got float32 [8] on cpu"),
    "running_var_none": ({"running_var": None}, ValueError,
                         ("cbam: running_var must be given with running_mean or not at all; got "
                         "None")),
    "norm_without_statistics": (
        {"running_mean": None, "running_var": None, "batch_statistics": False}, ValueError,
        ("cbam: norm_weight must be None without running statistics or batch_statistics; got "
        "float32 [1] on cpu")),
    "norm_bias_without_statistics": (
        {"norm_weight": None, "running_mean": None, "running_var": None, "batch_statistics": False},
        ValueError,
        ("cbam: norm_bias must be None without running statistics or batch_statistics; got float32 "
        "[1] on cpu")),
    "residual_shape": ({"residual": zeros(2, 8, 5, 1)}, ValueError,
                       ("cbam: residual must be as x, float32 [2, 8, 5, 6] on cpu; got float32 [2, "
                       "8, 5, 1] on cpu")),
    "residual_dtype": ({"residual": zeros(2, 8, 5, 6, dtype=torch.float64)}, ValueError,
                       ("cbam: residual must be as x, float32 [2, 8, 5, 6] on cpu; got float64 [2, "
                       "8, 5, 6] on cpu")),
    "residual_device": ({"residual": zeros(2, 8, 5, 6, device="meta")}, ValueError,
                        ("cbam: residual must be as x, float32 [2, 8, 5, 6] on cpu; got float32 "
                        "[2, 8, 5, 6] on meta")),
    "residual_flag": ({"residual": True}, ValueError,
                      "cbam: residual must be as x, float32 [2, 8, 5, 6] on cpu; got True"),
    "process_group": ({"process_group": "world"}, TypeError,
                      ("cbam: process_group must be a torch.distributed.ProcessGroup or None; got "
                      "'world'")),
    "pool": ({"pool": "mean"}, ValueError, POOL + "'mean'"),
    "pool_twice": ({"pool": "avg+avg"}, ValueError, POOL + "'avg+avg'"),
    "pool_empty": ({"pool": ""}, ValueError, POOL + "''"),
    "pool_light_and": ({"pool": "avg+light"}, ValueError, POOL + "'avg+light'"),
    "pool_list": ({"pool": ["avg", "max"]}, ValueError, POOL + "['avg', 'max']"),
    "maps": ({"maps": "mean"}, ValueError,
             "cbam: maps must be one of max_mean, mean_max, light; got 'mean'"),
    "ties": ({"ties": "last"}, ValueError, "cbam: ties must be one of first, even; got 'last'"),
    "ties_list": ({"ties": ["first"]}, ValueError,
                  "cbam: ties must be one of first, even; got ['first']"),
    "activation": ({"activation": "gelu"}, ValueError,
                   "cbam: activation must be one of none, relu, relu6; got 'gelu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name):
    changes, error, message = ERRORS[name]
    cbam_fused.cbam(**valid())  # what passes is remembered
    arguments = valid() | changes
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        cbam_fused.cbam(**arguments)
    for key, value in before.items():
        assert value.device.type == "meta" or torch.equal(arguments[key], value), f"{key} changed"


def test_what_the_errors_change_is_otherwise_valid(backend):
    with cbam_fused.use_backend(backend.name):
        assert cbam_fused.cbam(**valid()).shape == (2, 8, 5, 6)


def test_every_check_has_its_error(monkeypatch):
    """Each place in `cbam_fused.checks` that raises is reached by one of the messages above."""
    raising, reached = set(), set()
    for function in (checks.cbam, checks.batch):
        lines, first = inspect.getsourcelines(function)
        raising |= {first + i for i, line in enumerate(lines) if "_fail(" in line}

    def record(error, argument, expected, got):
        reached.add(inspect.currentframe().f_back.f_lineno)
        raise error(argument)

    monkeypatch.setattr(checks, "_fail", record)
    for changes, error, _ in ERRORS.values():
        with pytest.raises(error):
            cbam_fused.cbam(**(valid() | changes))
    assert raising <= reached, f"no test for {checks.__file__}, lines {sorted(raising - reached)}"


def test_what_passed_is_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr(checks, "_passed", {})
    monkeypatch.setattr(checks, "_MOST_PASSED", 3)
    for size in range(1, 9):
        for _ in range(2):
            cbam_fused.cbam(**(valid() | {"x": zeros(2, 8, 5, size), "residual": None}))
        assert 1 <= len(checks._passed) <= 3


def test_pool_types_in_any_order_are_the_same(backend):
    x = torch.randn(2, 8, 5, 6)
    arguments = valid() | {
        "x": x,
        "mlp_weight1": torch.randn(2, 8),
        "mlp_weight2": torch.randn(8, 2),
    }
    with cbam_fused.use_backend(backend.name):
        expected = cbam_fused.cbam(**arguments, pool="avg+max+lse")
        assert torch.equal(cbam_fused.cbam(**arguments, pool="lse+max+avg"), expected)


def test_the_cpu_backend_refuses_other_devices():
    if "cpu" not in backends.available():
        pytest.skip("there is no compiled library")
    arguments = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in valid().items()}
    message = "cbam_fused: backend cpu is not usable for tensors on meta: it needs a cpu"
    with cbam_fused.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        cbam_fused.cbam(**arguments)
