"""Tile sizes, warps and stages of every kernel, as data, with reasons: first match wins."""

from collections.abc import Callable
from dataclasses import dataclass

import triton

from cbam_fused.triton_kernels.geometry import Geometry

ALL_CHANNELS = 2**30


@dataclass(frozen=True)
class Configuration:
    """How one kernel on x is compiled.

    A program works on tiles of ``block_n`` samples, ``block_c`` channels and ``block_p`` pixels
    (powers of two), with ``num_warps`` warps, ``num_stages - 1`` tiles ahead of the one that is
    computed on, and goes through ``split_c`` channels of its pixels, a multiple of block_c.
    """

    num_warps: int
    block_c: int
    block_p: int
    block_n: int = 1
    split_c: int = ALL_CHANNELS
    num_stages: int = 1

    def tiles(self, shape: Geometry) -> int:
        """Into how many tiles the pixels of a plane are divided."""
        return triton.cdiv(shape.pixels, self.block_p)

    def splits(self, shape: Geometry) -> int:
        """Into how many ranges the channels are divided."""
        return triton.cdiv(shape.c, self.split_c)

    def groups(self, shape: Geometry) -> int:
        """Into how many groups the samples are divided."""
        return triton.cdiv(shape.n, self.block_n)

    def tile(self, shape: Geometry) -> dict[str, object]:
        """The compile-time arguments of a kernel that takes tiles of x."""
        return {
            **shape.constants(),
            "BLOCK_C": self.block_c,
            "BLOCK_P": self.block_p,
            "SPLIT_C": self.split_c,
        }


@dataclass(frozen=True)
class Row:
    """A configuration; the shapes that it is for; why; one of them, (C, H, W, dtype, layout)."""

    condition: Callable[[Geometry], bool]
    configuration: Configuration
    reason: str
    case: tuple[int, int, int, str, str]


def _plane(pixels: int, channels_last: bool | None = None, channels: int = 0):
    """Planes of at most ``pixels`` pixels, in one layout or both, of at least ``channels``."""

    def condition(shape: Geometry) -> bool:
        layout = channels_last is None or shape.channels_last == channels_last
        return shape.pixels <= pixels and shape.c >= channels and layout

    return condition


def _any(shape: Geometry) -> bool:
    return True


def _double(shape: Geometry) -> bool:
    return shape.element_size == 8


_DOUBLE = "float64: small tiles, for twice the registers and shared memory"


TABLES: dict[str, tuple[Row, ...]] = {
    "pool_pixels_kernel": (
        Row(
            _double,
            Configuration(4, 16, 64, num_stages=2),
            _DOUBLE,
            (64, 20, 20, "float64", "NCHW"),
        ),
        Row(
            _plane(64, channels_last=False, channels=1024),
            Configuration(16, 128, 16, block_n=4, num_stages=3),
            "few pixels, large MLP weights: blocks of many channels leave few partial products, "
            "four samples share the weights",
            (2048, 7, 7, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(64, channels_last=True, channels=1024),
            Configuration(8, 128, 8, block_n=4, num_stages=3),
            "as in NCHW; 8 pixels at a time divide 49 with little waste",
            (2048, 7, 7, "bfloat16", "channels_last"),
        ),
        Row(
            _plane(64),
            Configuration(8, 32, 64),
            "the whole plane at once",
            (512, 7, 7, "float32", "NCHW"),
        ),
        Row(
            _plane(256),
            Configuration(8, 32, 64, block_n=2, num_stages=3),
            "two samples share the MLP's weights",
            (1024, 14, 14, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(1024, channels_last=False),
            Configuration(4, 16, 128, num_stages=4),
            "rows of 128 pixels divide 784 with little waste",
            (512, 28, 28, "bfloat16", "NCHW"),
        ),
        Row(
            lambda shape: not shape.channels_last,
            Configuration(4, 8, 256, num_stages=4),
            "long rows; few channels, so that there are many programs",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
        Row(
            _any,
            Configuration(8, 32, 128, num_stages=4),
            "32 channels are at least 64 contiguous bytes and leave enough programs",
            (256, 56, 56, "bfloat16", "channels_last"),
        ),
    ),
    "gate_pool_channels_kernel": (
        Row(
            _double,
            Configuration(4, 16, 64, num_stages=2),
            _DOUBLE,
            (64, 20, 20, "float64", "NCHW"),
        ),
        Row(
            _plane(64, channels=512),
            Configuration(8, 16, 64, block_n=4, split_c=128, num_stages=3),
            "few pixels: the channels are split to fill the device, four samples share weights",
            (2048, 7, 7, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(256, channels=512),
            Configuration(8, 16, 256, split_c=128, num_stages=4),
            "few pixels: the channels are split, so that each weight is loaded once per sample",
            (1024, 14, 14, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(1024, channels=512),
            Configuration(8, 32, 128, num_stages=4),
            "larger tiles where the gate's weights are large",
            (512, 28, 28, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(64),
            Configuration(8, 32, 64, num_stages=3),
            "the whole plane at once",
            (256, 7, 7, "float32", "NCHW"),
        ),
        Row(
            lambda shape: not shape.channels_last,
            Configuration(4, 16, 128, num_stages=4),
            "tiles large enough to outweigh the gate's weights",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
        Row(
            lambda shape: shape.element_size == 2,
            Configuration(8, 32, 128, num_stages=4),
            "as in NCHW, with at least 64 contiguous bytes",
            (256, 56, 56, "bfloat16", "channels_last"),
        ),
        Row(
            _any,
            Configuration(8, 16, 128, num_stages=4),
            "as for two-byte elements, in tiles of as many bytes",
            (256, 56, 56, "float32", "channels_last"),
        ),
    ),
    "logits_kernel": (
        Row(
            _double,
            Configuration(4, 1, 128),
            _DOUBLE,
            (64, 20, 20, "float64", "NCHW"),
        ),
        Row(
            _plane(64),
            Configuration(2, 1, 64),
            "a pixel per thread; the whole plane, where splits of the channels are combined",
            (2048, 7, 7, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(256),
            Configuration(8, 1, 256),
            "a pixel per thread; the whole plane, where splits of the channels are combined",
            (1024, 14, 14, "bfloat16", "NCHW"),
        ),
        Row(
            _any,
            Configuration(4, 1, 128),
            "a pixel per thread",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
    ),
    "apply_kernel": (
        Row(
            _double,
            Configuration(4, 16, 64, split_c=16),
            _DOUBLE,
            (64, 20, 20, "float64", "NCHW"),
        ),
        Row(
            _plane(64, channels_last=False),
            Configuration(4, 32, 64, split_c=32),
            "whole planes",
            (2048, 7, 7, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(64, channels_last=True),
            Configuration(4, 512, 8, split_c=512),
            "8 pixels at a time divide 49 with little waste",
            (2048, 7, 7, "bfloat16", "channels_last"),
        ),
        Row(
            lambda shape: not shape.channels_last and 256 < shape.pixels <= 1024,
            Configuration(4, 32, 128, split_c=32),
            "rows of 128 pixels divide 784 with little waste",
            (512, 28, 28, "bfloat16", "NCHW"),
        ),
        Row(
            lambda shape: not shape.channels_last,
            Configuration(4, 16, 256, split_c=16),
            "long rows, one tile per program: many loads in flight",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
        Row(
            _any,
            Configuration(4, 64, 64, split_c=64),
            "at least 128 contiguous bytes, one tile per program: many loads in flight",
            (256, 56, 56, "bfloat16", "channels_last"),
        ),
    ),
    "convolve_apply_kernel": (
        Row(
            _double,
            Configuration(4, 16, 64, num_stages=2),
            _DOUBLE,
            (64, 20, 20, "float64", "NCHW"),
        ),
        Row(
            lambda shape: shape.element_size == 2,
            Configuration(4, 32, 128, num_stages=3),
            "the convolution, a pixel per thread, is done once for all channels; 64 contiguous "
            "bytes at least",
            (256, 56, 56, "bfloat16", "channels_last"),
        ),
        Row(
            _any,
            Configuration(4, 16, 128, num_stages=3),
            "as for two-byte elements, in tiles of as many bytes",
            (256, 56, 56, "float32", "NCHW"),
        ),
    ),
    "reduce_products_kernel": (
        Row(
            _plane(64, channels_last=False),
            Configuration(4, 16, 64, split_c=128),
            "few pixels: the channels are split to fill the device; few elements a thread, since "
            "of unaligned rows each has its own address",
            (2048, 7, 7, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(64),
            Configuration(8, 64, 64, split_c=128),
            "few pixels: the channels are split to fill the device",
            (2048, 7, 7, "bfloat16", "channels_last"),
        ),
        Row(
            _plane(256, channels_last=False),
            Configuration(8, 16, 256, split_c=128),
            "the whole plane at once; the channels are split to fill the device",
            (1024, 14, 14, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(256),
            Configuration(8, 64, 64, split_c=256),
            "at least 128 contiguous bytes; the channels are split to fill the device",
            (1024, 14, 14, "bfloat16", "channels_last"),
        ),
        Row(
            _plane(1024, channels_last=False),
            Configuration(8, 32, 128, split_c=256),
            "rows of 128 pixels divide 784 with little waste",
            (512, 28, 28, "bfloat16", "NCHW"),
        ),
        Row(
            lambda shape: not shape.channels_last,
            Configuration(8, 16, 256),
            "long rows leave few partial sums of channels",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
        Row(
            _any,
            Configuration(8, 64, 64),
            "at least 128 contiguous bytes; 64 pixels leave few partial sums of channels",
            (256, 56, 56, "bfloat16", "channels_last"),
        ),
    ),
    "finish_reduce_kernel": (
        Row(
            _any,
            Configuration(4, 1, 256),
            "many small programs: each thread adds two sums up",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
    ),
    "maps_backward_kernel": (
        Row(
            _plane(64, channels_last=False),
            Configuration(4, 16, 64, split_c=256),
            "few pixels: the channels are split, each split repeating the convolution; few "
            "elements a thread, since of unaligned rows each has its own address",
            (2048, 7, 7, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(64),
            Configuration(8, 64, 64, split_c=512),
            "as in NCHW, with at least 128 contiguous bytes",
            (2048, 7, 7, "bfloat16", "channels_last"),
        ),
        Row(
            _plane(256, channels_last=False),
            Configuration(8, 16, 256, split_c=256),
            "the whole plane at once; the channels are split, each split repeating the convolution",
            (1024, 14, 14, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(1024, channels_last=False),
            Configuration(4, 16, 128),
            "rows of 128 pixels divide 784 with little waste",
            (512, 28, 28, "bfloat16", "NCHW"),
        ),
        Row(
            lambda shape: not shape.channels_last,
            Configuration(8, 16, 256),
            "long rows leave few partial sums of channels",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
        Row(
            _any,
            Configuration(8, 64, 64),
            "at least 128 contiguous bytes; 64 pixels leave few partial sums of channels",
            (256, 56, 56, "bfloat16", "channels_last"),
        ),
    ),
    "gate_backward_kernel": (
        Row(
            _double,
            Configuration(8, 128, 1),
            _DOUBLE,
            (64, 14, 14, "float64", "NCHW"),
        ),
        Row(
            lambda shape: shape.c > 256,
            Configuration(8, 512, 1, block_n=2),
            "two samples share the MLP's weights",
            (1024, 14, 14, "bfloat16", "NCHW"),
        ),
        Row(
            _any,
            Configuration(4, 256, 1),
            "small weights: a program per sample",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
    ),
    "parameter_gradients_kernel": (
        Row(
            _any,
            Configuration(4, 1, 1),
            "blocks of 4,096 products, 32 for each thread",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
    ),
    "input_gradient_kernel": (
        Row(
            lambda shape: shape.element_size == 8,
            Configuration(8, 32, 64, split_c=32),
            "numbers of two registers, and the terms of four pools: few elements per thread",
            (64, 14, 14, "float64", "NCHW"),
        ),
        Row(
            _plane(64, channels_last=False),
            Configuration(4, 16, 64, split_c=64),
            "whole planes; few elements a thread, since of unaligned rows each has its own address",
            (2048, 7, 7, "bfloat16", "NCHW"),
        ),
        Row(
            _plane(64),
            Configuration(8, 512, 8, split_c=512),
            "8 pixels at a time divide 49 with little waste",
            (2048, 7, 7, "bfloat16", "channels_last"),
        ),
        Row(
            lambda shape: not shape.channels_last and 256 < shape.pixels <= 1024,
            Configuration(8, 32, 128, split_c=32),
            "rows of 128 pixels divide 784 with little waste",
            (512, 28, 28, "bfloat16", "NCHW"),
        ),
        Row(
            lambda shape: not shape.channels_last,
            Configuration(4, 8, 256, split_c=8),
            "long rows, one tile per program: many loads in flight",
            (256, 56, 56, "bfloat16", "NCHW"),
        ),
        Row(
            _any,
            Configuration(8, 64, 64, split_c=64),
            "at least 128 contiguous bytes, one tile per program: many loads in flight",
            (256, 56, 56, "bfloat16", "channels_last"),
        ),
    ),
}
