"""Fused attention gates for convolutional networks.

CBAM under PyTorch autograd, with nothing changed but the speed.
"""

from cbam_fused.backends import use_backend
from cbam_fused.costs import Explanation
from cbam_fused.explanation import explain
from cbam_fused.functional import cbam
from cbam_fused.fuse import (
    Adapter,
    FuseReport,
    GateSpec,
    NotFusableError,
    fuse_,
    fused,
    register_adapter,
    unfuse_,
)
from cbam_fused.gpus import GPUS, Gpu
from cbam_fused.modules import CBAM
from cbam_fused.version import __version__
from cbam_fused.warmup import warmup

__all__ = [
    "CBAM",
    "GPUS",
    "Adapter",
    "Explanation",
    "FuseReport",
    "GateSpec",
    "Gpu",
    "NotFusableError",
    "__version__",
    "cbam",
    "explain",
    "fuse_",
    "fused",
    "register_adapter",
    "unfuse_",
    "use_backend",
    "warmup",
]
