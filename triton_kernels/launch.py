"""How every kernel is started, and the tensors that they are given."""

import contextlib

import torch
import triton
from torch import Tensor

from cbam_fused.layout import dense
from cbam_fused.triton_kernels.configurations import Configuration
from cbam_fused.triton_kernels.geometry import ACCESS_BYTES, Geometry, geometry

__all__ = ["Geometry", "aligned", "aligned_like", "geometry", "launch", "rows_per_step"]


def aligned(x: Tensor) -> Tensor:
    """x dense, in NCHW or channels_last, at an address that is a multiple of 16 bytes.

    A copy where it is not. The compiler chooses the access width, and with it the order of sums,
    from the address; so kernels see aligned ones only.
    """
    x = dense(x)
    return x.clone() if x.data_ptr() % ACCESS_BYTES else x


def aligned_like(x: Tensor, other: Tensor | None) -> Tensor | None:
    """``other``, of the shape of x, in the layout of x (which is dense), aligned."""
    if other is None:
        return None
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return aligned(other.contiguous(memory_format=layout))


_PRODUCTS_PER_THREAD = 16


def rows_per_step(rows: int, width: int, num_warps: int) -> int:
    """How many rows of a weight, each ``width`` products, a program takes in one step."""
    products = 32 * num_warps * _PRODUCTS_PER_THREAD
    return min(triton.next_power_of_2(max(rows, 1)), max(products // width, 1))


def launch(kernel, programs: int, *arguments, configuration: Configuration, **constants) -> None:
    """Starts ``programs`` programs of ``kernel`` on the device of its first tensor.

    Every launch of the package goes through here: one-dimensional grids, nothing for no programs.

    Args:
        kernel: a `triton.jit` function.
        programs: how many.
        arguments: its run-time arguments, in order; the first tensor among them decides the device.
        configuration: warps and stages.
        constants: its compile-time arguments.
    """
    if programs == 0:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    # Products and sums are fused only where a kernel says so: the results of two kernels that
    # compute the same expression must be equal.
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[(programs,)](
            *arguments,
            **constants,
            num_warps=configuration.num_warps,
            num_stages=configuration.num_stages,
            enable_fp_fusion=False,
        )
