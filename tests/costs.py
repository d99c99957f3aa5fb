"""Costs of the operations on a GPU: passes over tensors as large as x, and the runs for them."""

from dataclasses import replace

import torch

from cbam_fused.costs import Passes, passes
from cbam_fused.testing import Gate
from tests.cases import BY_NAME, Case

NAMES = (
    "plain", "frozen", "odd", "prime", "no_spatial", "no_spatial_relu", "avg", "lp", "lse",
    "all_pools", "single_layer", "light_even", "residual", "residual_relu", "residual_relu6",
    "relu_ties_even", "hw1", "hw1_even", "row", "c1", "nan", "k_over_map", "n0",
)  # fmt: skip
SHAPES = tuple(
    replace(case, kernel_size=3)
    for case in (
        Case("one_tile_more", "two tiles of pixels", (1, 20, 5, 60), norm="frozen"),
        Case("long_plane", "several tiles of pixels, the last one broken", (1, 6, 41, 30)),
        Case("long_plane_even", "the same with x read again", (1, 6, 41, 30), ties="even"),
        Case("channel_splits", "more channels than one program takes", (1, 640, 4, 7), hidden=8),
    )
)
VARIANTS = ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"))
RUNS = [
    (case, *VARIANTS[i % 2]) for i, case in enumerate((*(BY_NAME[name] for name in NAMES), *SHAPES))
]


def expected_passes(operation: str, gate: Gate) -> Passes:
    """Of kernels that stream x."""
    spatial = gate.conv_weight is not None
    maximum = spatial or "max" in gate.pool or gate.pool == "light"
    weighted = "lp" in gate.pool or "lse" in gate.pool
    return passes(
        operation,
        spatial=spatial,
        residual=gate.residual is not None,
        activation=gate.activation != "none",
        again=weighted or (maximum and gate.ties == "even"),
    )
