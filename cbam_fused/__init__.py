"""Fused attention gates for convolutional networks.

CBAM under PyTorch autograd, with nothing changed but the speed.
"""

from cbam_fused.backends import use_backend
from cbam_fused.costs import Explanation
from cbam_fused.explanation import explain
from cbam_fused.functional import cbam
from cbam_fused.fuse import FuseReport, fuse_, unfuse_
from cbam_fused.gpus import GPUS, Gpu
from cbam_fused.modules import CBAM
from cbam_fused.version import __version__
from cbam_fused.warmup import warmup

__all__ = [
    "CBAM",
    "GPUS",
    "Explanation",
    "FuseReport",
    "Gpu",
    "__version__",
    "cbam",
    "explain",
    "fuse_",
    "unfuse_",
    "use_backend",
    "warmup",
]
