"""Running an operation in the harness, for its results and for what it did."""

import os
from typing import NamedTuple
from unittest import mock

from torch import Tensor

from cbam_fused.testing import Gate
from tests.arguments import RESULTS, arguments
from tests.simt import harness


class Ran(NamedTuple):
    """The results by name, the launches, traffic by tensor, and with ``count_reuse`` the distances
    of reuse.
    """

    results: dict[str, Tensor]
    launches: list
    traffic: dict
    reuse: dict[str, int]


def run(
    operation: str, gate: Gate, device: dict | None = None, strategy: str = "", **settings
) -> Ran:
    """The operation on the gate's arguments, on a device with these properties, with these settings
    of the harness; `strategy` is asked for.
    """
    asked_for = {"CBAM_FUSED_CUDA_STRATEGY": strategy} if strategy else {}
    values = arguments(gate)[operation]
    with (
        mock.patch.dict(os.environ, asked_for),
        harness.device(**(device or {})),
        harness.settings(**settings) as kernels,
    ):
        results = getattr(harness.backend(), operation)(*values)
        launches, traffic, reuse = kernels.launches(), kernels.traffic(), kernels.reuse()
    results = (results,) if isinstance(results, Tensor) else results
    return Ran(dict(zip(RESULTS[operation], results, strict=True)), launches, traffic, reuse)
