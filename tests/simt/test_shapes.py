"""Shapes that reach what no case of `tests.cases` does: rows and columns of several parts, maps
that no block can keep, kernels larger than the room for their sums.
"""

from dataclasses import replace

import pytest
import torch

from cbam_fused.schemas import SCHEMAS
from cbam_fused.testing import Gate, attend
from tests.arguments import arguments, check_operation
from tests.cases import Case
from tests.simt import harness

CASES = (
    Case("wide", "the rows of maps that a tile needs do not fit", (1, 3, 5, 1300), hidden=1),
    Case("wide_light", "the same with one map, and several parts of channels", (1, 260, 3, 1100),
         hidden=1, maps="light", pool="light", norm="frozen", kernel_size=3),
    Case("large_kernel", "a few sums along its rows at a time", (2, 8, 9, 10), kernel_size=65),
    Case("long_plane", "planes of several parts, of single elements", (1, 2, 120, 701), hidden=1,
         kernel_size=3),
    Case("long_plane_aligned", "planes of several parts, of vectors", (1, 2, 120, 704), hidden=1,
         pool="avg+max+lp+lse", kernel_size=3),
    Case("many_channels", "more parts of channels than a chain has", (2, 9001, 2, 2), hidden=5,
         pool="avg+max+lp+lse", ties="even", data="relu_ties"),
    Case("many_channels_aligned", "the same of vectors", (1, 9008, 1, 3), hidden=5),
)  # fmt: skip
HUGE_KERNEL = Case("huge_kernel", "more rows than there is room for sums", (1, 2, 2, 3), hidden=1,
                   kernel_size=1031, norm="frozen")  # fmt: skip
VARIANTS = (
    (torch.float32, "nchw"),
    (torch.float32, "channels_last"),
    (torch.bfloat16, "nchw"),
    (torch.bfloat16, "channels_last"),
)


@pytest.mark.parametrize("operation", SCHEMAS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_within_rounding(case, variant, operation):
    dtype, layout = variant
    check_operation(
        harness.backend(),
        operation,
        dtype,
        lambda precision: [arguments(g) for g in gates(case, precision, layout)],
    )


def gates(case: Case, dtype: torch.dtype, layout: str) -> list[Gate]:
    draws = 8 if case.name.startswith("many") else 2
    return [case.gate(dtype, layout, draw) for draw in range(draws)]


def test_a_kernel_with_more_rows_than_room():
    """Most of it is padding: the same as the part that reaches the map."""
    gate = HUGE_KERNEL.gate()
    middle = HUGE_KERNEL.kernel_size // 2
    reach = slice(middle - 2, middle + 3)
    small = replace(gate, conv_weight=gate.conv_weight[:, :, reach, reach].contiguous())
    huge, reached = (attend(harness.backend(), g) for g in (gate, small))
    assert torch.equal(huge.logits, reached.logits)
