"""The layouts that every backend computes on."""

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x itself if NCHW or channels_last, else an NCHW copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
