"""Swapping the gates of a model that exists for fused ones, and back.

`frame` walks the model, `adapters` recognise its gates, `verify` proves each one, `swap` changes
its class, `report` says what became of it.
"""

from cbam_fused.fuse.frame import fuse_, unfuse_
from cbam_fused.fuse.report import FuseReport, GateReport

__all__ = ["FuseReport", "GateReport", "fuse_", "unfuse_"]
