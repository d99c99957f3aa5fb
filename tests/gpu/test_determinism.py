"""Bitwise the same on a GPU: from run to run, in every batch, at every address."""

from dataclasses import replace

import pytest
import torch

from tests.cases import BY_NAME
from tests.fingerprint import everything
from tests.gpu import bits, require_gpu
from tests.test_determinism import (
    PER_SAMPLE,
    test_a_sample_alone_is_the_sample_in_a_batch,
    test_a_training_step_repeats_bitwise,
    test_any_memory_address,
    test_inference_is_attend_and_apply,
)

__all__ = [
    "test_a_sample_alone_is_the_sample_in_a_batch",
    "test_a_training_step_repeats_bitwise",
    "test_any_memory_address",
    "test_inference_is_attend_and_apply",
]

require_gpu()

REPEATS = 1000


class Pressure:
    """Work of others on the device: memory that was written to before it is given out, and copies
    on another stream that take bandwidth and cache.
    """

    def __init__(self, megabytes: int = 256) -> None:
        self.stream = torch.cuda.Stream()
        self.source = torch.randn(megabytes * 2**18)
        self.target = torch.empty_like(self.source)
        torch.cuda.synchronize()

    def apply(self, repeat: int) -> None:
        """Leaves NaN in memory of many sizes, and starts a copy."""
        sizes = [2 ** (8 + (repeat + i) % 14) + repeat for i in range(4)]
        leftovers = [torch.full((size,), float("nan")) for size in sizes]
        del leftovers
        with torch.cuda.stream(self.stream):
            self.target.copy_(self.source)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "layout"),
    [
        ("residual_relu", (8, 256, 28, 28), torch.bfloat16, "nchw"),
        ("plain", (16, 512, 7, 7), torch.float32, "channels_last"),
        ("relu_ties_even", (5, 37, 13, 11), torch.float16, "nchw"),
        ("frozen", (64, 256, 14, 14), torch.bfloat16, "channels_last"),
    ],
)
def test_a_thousand_repeats_under_memory_pressure(fused, name, shape, dtype, layout):
    gate = replace(BY_NAME[name], shape=shape, hidden=16).gate(dtype, layout)
    expected = {name: bits(value).clone() for name, value in everything(fused, gate).items()}
    pressure = Pressure()
    different = {name: torch.zeros((), dtype=torch.int64) for name in expected}
    for repeat in range(REPEATS):
        pressure.apply(repeat)
        for name, value in everything(fused, gate).items():
            different[name] += (bits(value) != expected[name]).any()
    torch.cuda.synchronize()
    wrong = {name: int(count) for name, count in different.items() if count}
    assert not wrong, f"repeats of {REPEATS} that were not bitwise equal: {wrong}"


@pytest.mark.alone
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (64, 2048, 7, 7)], ids=str)
def test_a_sample_of_a_large_batch_alone(fused, shape, layout):
    """Batches that fill the device, and one sample, which does not."""
    case = replace(BY_NAME["frozen"], shape=shape, hidden=shape[1] // 16)
    gate = case.gate(torch.bfloat16, layout)
    together = everything(fused, gate)
    for i in (0, 37, 63):
        alone = everything(fused, replace(gate, x=gate.x[i : i + 1], grad=gate.grad[i : i + 1]))
        for name in (name for name in PER_SAMPLE if name in alone and alone[name].numel()):
            assert torch.equal(bits(alone[name]), bits(together[name][i : i + 1])), name
