"""What an adapter is."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from cbam_fused.plan import GateSpec


class Adapter(NamedTuple):
    """One implementation of CBAM that people's models contain.

    Attributes:
        name: where the implementation comes from, for the report.
        claims: whether a module is of this implementation, or looks like it. Cheap; asked of every
            module of a model.
        describe: the `GateSpec` of a claimed module. Raises `NotFusableError` where its structure
            or options differ from what the fused gate computes.
    """

    name: str
    claims: Callable[[nn.Module], bool]
    describe: Callable[[nn.Module], GateSpec]
