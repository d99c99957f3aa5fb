"""`explain`: the planner's rows, launches, bytes.

The model of time is held to nothing but its parts.
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import cbam_fused
from cbam_fused import GPUS, costs, explain, explanation
from tests.cuda.explained import (
    BACKWARD,
    FORWARD,
    STAGE1,
    SingleLayer,
    WithEpilogue,
    gate,
    needs_cuda_code,
)

# ---- The planner's table ------------------------------------------------------------------------


class Case(NamedTuple):
    """What reaches a row of the planner's table."""

    row: str
    name: str
    shape: tuple[int, ...] = STAGE1
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    training: bool = False
    gpu: str = "H200"
    module: nn.Module | None = None

    def explain(self) -> cbam_fused.Explanation:
        arguments = (self.module, self.shape) if self.module else (self.shape,)
        return explain(
            *arguments,
            dtype=self.dtype,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
            training=self.training,
            gpu=self.gpu,
        )


CASES = (
    Case("resident", "stage3", (64, 1024, 14, 14)),
    Case("resident", "stage3_channels_last", (64, 1024, 14, 14), channels_last=True),
    Case("resident", "stage4", (64, 2048, 7, 7)),
    Case("no_skewed_kernel", "stage4_float32", (64, 2048, 7, 7), torch.float32),
    Case("in_cache", "heavy_for_a_cluster", (64, 2048, 7, 7), channels_last=True),
    Case("heavy_mlp", "stage2", (64, 512, 28, 28)),
    Case("heavy_mlp", "stage2_training", (64, 512, 28, 28), training=True),
    Case("resident", "on_a_small_multiprocessor", (4, 64, 8, 8), gpu="RTX 5090"),
    Case("resident", "empty_batch", (0, 64, 8, 8)),
    Case("in_cache", "no_clusters", (4, 64, 8, 8), gpu="A100"),
    Case("in_cache", "empty_batch", (0, 64, 8, 8), gpu="A100"),
    Case("in_cache", "too_large_for_a_cluster", (8, 256, 56, 56), torch.float32, gpu="B200"),
    Case("in_cache", "stage4_float32_channels_last", (64, 2048, 7, 7), torch.float32, True,
         gpu="B200"),
    Case("in_cache", "training_is_not_resident", (4, 64, 8, 8), training=True),
    Case("in_cache", "no_skewed_kernel_needed", (4, 64, 7, 7), torch.float64),
    Case("in_cache", "samples_of_odd_bytes", (4, 33, 7, 7)),
    Case("no_skewed_kernel", "float64", dtype=torch.float64),
    Case("no_skewed_kernel", "odd_rows", (64, 256, 55, 57)),
    Case("no_skewed_kernel", "odd_rows_channels_last", (64, 255, 56, 56), channels_last=True),
    Case("no_skewed_kernel", "ties_even", training=True, module=gate(ties="even")),
    Case("no_skewed_kernel", "lp", module=gate(pool_types=["lp"])),
    Case("no_skewed_kernel", "lse", module=gate(pool_types=["avg", "lse"])),
    Case("no_skewed_kernel", "no_spatial", module=gate(no_spatial=True)),
    Case("no_skewed_kernel", "single_layer", module=SingleLayer(256)),
    Case("no_skewed_kernel", "large_mlp", (64, 4096, 14, 14), module=gate(4096, reduction_ratio=1)),
    Case("small_cache", "a10", gpu="A10"),
    Case("small_cache", "t4_channels_last", channels_last=True, gpu="T4"),
    Case("small_cache", "large_samples", (64, 256, 224, 224)),
    Case("skewed", "inference"),
    Case("skewed", "inference_float32", dtype=torch.float32),
    Case("skewed", "inference_float16", dtype=torch.float16),
    Case("skewed", "inference_channels_last", channels_last=True),
    Case("skewed", "inference_ties_even", module=gate(ties="even")),
    Case("skewed", "training", training=True),
    Case("skewed", "training_channels_last", channels_last=True, training=True),
)  # fmt: skip


@needs_cuda_code
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.row}-{case.name}")
def test_plan(case):
    call, *others = case.explain().calls
    expected = next(row for row in explanation.plan_rows() if row.name == case.row)
    assert call.plan == expected
    assert call.operation == ("cbam_attend" if case.training else "cbam_inference")
    assert (call.shape, call.dtype) == (case.shape, case.dtype)
    assert call.channels_last == case.channels_last
    assert all(other.plan is None for other in others)
    assert (call.group_samples > 0) == (expected.strategy == "skewed")
    assert f"strategy   {expected.strategy} (row {expected.name}" in str(call)
    assert f"because    {expected.reason}" in str(call)


@needs_cuda_code
def test_every_row_is_reached():
    assert {case.row for case in CASES} == {row.name for row in explanation.plan_rows()}


@needs_cuda_code
def test_a_residual_leaves_room_for_fewer_samples():
    """Of a group are touched x, y and the residual, from one use of x to the next."""
    plain, added = (
        explain(module, STAGE1, gpu="H200", dtype=torch.bfloat16, training=False).calls[0]
        for module in (gate(), WithEpilogue(256))
    )
    assert added.plan.name == plain.plan.name == "skewed"
    assert added.group_samples == plain.group_samples * 3 // 4


# ---- Launches -----------------------------------------------------------------------------------


def launched(explained):
    """By operation, the kernels in their order."""
    return {
        call.operation: [launch.kernel.removesuffix("_kernel") for launch in call.launches]
        for call in explained.calls
    }


@needs_cuda_code
@pytest.mark.parametrize(
    ("layout", "of_pixels", "of_channels"),
    [
        pytest.param(torch.contiguous_format, "reduce_rows", "reduce_columns", id="nchw"),
        pytest.param(torch.channels_last, "reduce_columns", "reduce_rows", id="channels_last"),
    ],
)
def test_launches_of_inference(layout, of_pixels, of_channels):
    expected = {
        gate(): [of_pixels, "hidden", "channel_gate", of_channels, "apply"],
        gate(no_spatial=True): [of_pixels, "hidden", "channel_gate", "apply"],
        SingleLayer(256): [of_pixels, "channel_gate", of_channels, "apply"],
    }
    for module, kernels in expected.items():
        explained = explain(module, STAGE1, memory_format=layout, training=False, gpu="A10")
        assert launched(explained) == {"cbam_inference": kernels}


@needs_cuda_code
def test_launches_of_training():
    explained = explain(STAGE1, training=True, gpu="A10")
    assert [call.operation for call in explained.calls] == FORWARD + BACKWARD
    assert launched(explained) == {
        "cbam_attend": [
            *("reduce_rows", "hidden", "channel_gate", "reduce_columns"),
            *("spatial_logits", "batch_statistics"),
        ],
        "cbam_apply": ["apply"],
        "cbam_backward_reduce": ["reduce_products", "finish_reduce", "add_norm_sums"],
        "cbam_backward_input": [
            *("maps_backward", "gate_backward", "parameter_gradients", "input_gradient")
        ],
    }


@needs_cuda_code
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_launches_of_the_skewed_order(training):
    """A step for each group, and one for each pass that lags behind."""
    call = explain(STAGE1, dtype=torch.bfloat16, training=training, gpu="H200").calls[0]
    groups = -(-STAGE1[0] // call.group_samples)
    names = [launch.kernel for launch in call.launches]
    assert names.count("skewed") == groups + (1 if training else 2)
    assert names[names.count("skewed") :] == ["spatial_logits", "batch_statistics"] * training
    assert all(launch.threads == 256 and launch.blocks > 0 for launch in call.launches)


@needs_cuda_code
def test_launches_of_the_resident_form():
    (launch,) = explain((64, 1024, 14, 14), dtype=torch.bfloat16, gpu="H200").calls[0].launches
    assert (launch.kernel, launch.blocks, launch.threads, launch.cluster) == (
        *("resident", 64 * 8, 256, 8),
    )
    assert 1024 * 14 * 14 * 2 // 8 < launch.shared_bytes < 113 << 10


# ---- Bytes and time -----------------------------------------------------------------------------

X = 64 * 256 * 56 * 56 * 2  # bytes of STAGE1 in bfloat16


def moved(module=None, training=False, gpu="A10"):
    """By operation, bytes in units of x: accessed, moved, the floor."""
    arguments = (module, STAGE1) if module else (STAGE1,)
    calls = explain(*arguments, dtype=torch.bfloat16, training=training, gpu=gpu).calls
    units = {
        call.operation: (call.bytes_accessed / X, call.bytes_moved / X, call.floor_bytes / X)
        for call in calls
    }
    assert len(units) == len(calls)
    return units


@needs_cuda_code
def test_bytes_of_inference():
    """Pool, pool, apply; y."""
    assert moved() == {"cbam_inference": (4, 4, 2)}
    assert moved(gpu="H200") == {"cbam_inference": (4, 2, 2)}
    assert moved(gate(no_spatial=True)) == {"cbam_inference": (3, 3, 2)}
    assert moved(WithEpilogue(256)) == {"cbam_inference": (5, 5, 3)}
    small = explain((2, 8, 4, 4), dtype=torch.float16, gpu="A100").calls[0]
    assert (small.bytes_accessed, small.bytes_moved, small.floor_bytes) == (2048, 1024, 1024)
    resident = explain((2, 8, 4, 4), dtype=torch.float16, gpu="H200").calls[0]
    assert resident.bytes_accessed == resident.bytes_moved == resident.floor_bytes == 1024


@needs_cuda_code
def test_bytes_of_training():
    plain = {
        "cbam_attend": (2, 2, 1),
        "cbam_apply": (2, 2, 2),
        "cbam_backward_reduce": (2, 2, 2),  # of grad and x
        "cbam_backward_input": (3, 3, 3),  # grad, x; its gradient
    }
    assert moved(training=True) == plain
    assert moved(training=True, gpu="H200") == plain | {"cbam_attend": (2, 1, 1)}
    assert moved(gate(ties="even"), True) == plain | {"cbam_backward_input": (4, 4, 3)}
    assert moved(WithEpilogue(256), True) == plain | {
        "cbam_apply": (3, 3, 3),
        "cbam_backward_reduce": (4, 4, 4),  # y, and what is left of grad
    }


@needs_cuda_code
def test_bytes_of_training_without_a_spatial_gate():
    channels_only = {
        "cbam_attend": (1, 1, 1),
        "cbam_apply": (2, 2, 2),
        "cbam_backward_reduce": (2, 2, 2),
        "cbam_backward_input": (2, 2, 2),
    }
    assert moved(gate(no_spatial=True), True) == channels_only
    # The gradient of this pooling needs x, which nothing else does.
    lp = gate(no_spatial=True, pool_types=["lp"])
    assert moved(lp, True) == channels_only | {"cbam_backward_input": (3, 3, 3)}


@needs_cuda_code
def test_time_is_the_launches_and_the_slower_of_both_memories():
    launch, usable = costs.LAUNCH_SECONDS, costs.USABLE_RATE
    slow_memory = GPUS["H200"]._replace(memory_rate=1e12, l2_rate=1e15)
    slow_cache = GPUS["H200"]._replace(memory_rate=1e15, l2_rate=1e12)
    for gpu, transfers in ((slow_memory, 2 * X / (1e12 * usable)), (slow_cache, 4 * X / 1e12)):
        explained = explain(STAGE1, dtype=torch.bfloat16, gpu=gpu)
        (call,) = explained.calls
        assert call.plan.name == "skewed"
        assert call.seconds == pytest.approx(len(call.launches) * launch + transfers)
        assert explained.seconds == call.seconds
