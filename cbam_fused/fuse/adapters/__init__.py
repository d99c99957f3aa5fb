"""One file per implementation of CBAM that `fuse_` knows.

Each says how to recognise it, and where its parameters and options are.
"""

from cbam_fused.fuse.adapters import official, timm
from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.fuse.adapters.layers import NotFusableError

ADAPTERS: tuple[Adapter, ...] = (timm.ADAPTER, official.ADAPTER)

__all__ = ["ADAPTERS", "Adapter", "NotFusableError"]
