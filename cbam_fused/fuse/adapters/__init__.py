"""One file per implementation of CBAM that `fuse_` knows, and those that users add.

Each says how to recognise it, and where its parameters and options are.
"""

from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.fuse.adapters.layers import NotFusableError
from cbam_fused.fuse.adapters.registry import RegisteredAdapter, claiming, register_adapter

__all__ = ["Adapter", "NotFusableError", "RegisteredAdapter", "claiming", "register_adapter"]
