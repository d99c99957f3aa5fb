"""Swapping the gates of a model that exists for fused ones, and back.

`frame` walks the model, `adapters` recognise its gates, `verify` proves each one, `swap` changes
its class, `report` says what became of it. `epilogues` does the same for what follows a gate in its
block: `trace` shows what a block computes, `tail` finds the addition behind a gate, `blocks` makes
the block's class.
"""

from cbam_fused.fuse.frame import fuse_, unfuse_
from cbam_fused.fuse.report import FuseReport, GateReport

__all__ = ["FuseReport", "GateReport", "fuse_", "unfuse_"]
