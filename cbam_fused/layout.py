"""The layouts that every backend computes on."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x, of four dimensions, is channels_last, and not NCHW too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x itself if NCHW or channels_last, else an NCHW copy."""
    return x if is_channels_last(x) else x.contiguous()
