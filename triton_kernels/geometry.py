"""The shape and layout of x, as the kernels see them."""

import math
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

ACCESS_BYTES = 16  # the widest load or store of one thread


class Geometry(NamedTuple):
    """x [N, C, H, W] as the kernels see it: N matrices of channels by pixels.

    Sample n begins at element n * c * pixels; in NCHW the pixels of a channel are contiguous, in
    channels_last the channels of a pixel.
    """

    n: int
    c: int
    h: int
    w: int
    channels_last: bool
    element_size: int

    @property
    def pixels(self) -> int:
        return self.h * self.w

    @property
    def align(self) -> int:
        """A number of elements, at most one access, that divides the length of every row."""
        length = self.c if self.channels_last else self.pixels
        return math.gcd(length, ACCESS_BYTES // self.element_size)

    @property
    def wide_offsets(self) -> bool:
        """Whether offsets inside a group of up to 16 samples, or beyond its end by less than a
        tile, need 64 bits.
        """
        return 16 * (self.c + 1024) * (self.pixels + 1024) >= 2**31

    def constants(self) -> dict[str, object]:
        """The compile-time arguments that every kernel on x takes."""
        return {
            "CHANNELS_LAST": self.channels_last,
            "ALIGN": self.align,
            "WIDE": self.wide_offsets,
            "COMPUTE": tl.float64 if self.element_size == 8 else tl.float32,
        }


def geometry(x: Tensor) -> Geometry:
    """The geometry of a dense x. Where both layouts fit (C = 1 or H * W = 1), NCHW."""
    return Geometry(*x.shape, not x.is_contiguous(), x.element_size())
