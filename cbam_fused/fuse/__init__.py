"""Swapping the gates of a model that exists for fused ones, and back.

`frame` walks the model, `adapters` recognise its gates, `candidates` what may be one, `verify`
proves each one, `gates` makes its class, `swap` swaps it, `report` says what became of it;
`context` does it for a while. `epilogues` does the same for what follows a gate in its block:
`trace` shows what a block computes, `tail` finds the addition or ReLU behind a gate, `blocks` makes
the block's class.
"""

from cbam_fused.fuse.adapters import Adapter, NotFusableError, register_adapter
from cbam_fused.fuse.context import fused
from cbam_fused.fuse.frame import fuse_, unfuse_
from cbam_fused.fuse.report import FuseReport, GateReport
from cbam_fused.plan import GateSpec

__all__ = [
    "Adapter",
    "FuseReport",
    "GateReport",
    "GateSpec",
    "NotFusableError",
    "fuse_",
    "fused",
    "register_adapter",
    "unfuse_",
]
