"""`explain`: what the CUDA kernels would do for a gate on a GPU, which need not be there.

The library's own code is asked: it takes meta tensors, plans for the described GPU and writes its
launches down. So what is printed is what would run. Times are predicted by a simple model of a
GPU, not measured.
"""

import argparse
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from cbam_fused import backends, costs, cuda_backend, gpus, library
from cbam_fused.backends import Backend
from cbam_fused.costs import Call, Explanation, Launch, PlanRow
from cbam_fused.gpus import GPUS, Gpu
from cbam_fused.meta import ConvolutionLayouts, dtype_of, without_values
from cbam_fused.modules import CBAM
from cbam_fused.schemas import SCHEMAS
from cbam_fused.warmup import run_once

NAMESPACE = "cbam_fused_explain"
"""Of the operations that explain themselves (csrc/cuda/explain.cu)."""


def explain(
    module_or_shape: nn.Module | Sequence[int],
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    training: bool | None = None,
    gpu: str | Gpu | None = None,
) -> Explanation:
    """What the CUDA kernels would do: strategy and reason, launches, bytes, predicted time.

    Nothing is computed and no GPU is needed: a copy of the module runs on meta tensors, its hooks
    too. Gates that run their inner modules are left out. Autocast knows no meta tensors: for a gate
    under it `dtype` is what x is cast to. Meanwhile `use_backend` has no effect, in all threads.

    Args:
        module_or_shape: a `CBAM`, or a network with fused gates (`fuse_`), as it is now, training
            or not; or the shape ``(N, C, H, W)`` of x for a `CBAM` with its defaults.
        shape: with a module, that of its input.
        dtype: of x, float32, float16, bfloat16 or float64; with a shape alone of the parameters,
            too. Default: that of the module's first parameter.
        memory_format: of x, ``torch.contiguous_format`` or ``torch.channels_last``.
        training: forward and backward, or inference; default: as the module is, or inference.
        gpu: a name of `GPUS`, or a `Gpu`; default: PyTorch's current GPU, where there is none an
            H200.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: the library has no CUDA code, with the reason; or no fused gate ran. What the
            module raises, where it cannot run on meta tensors.
    """
    if dtype is not None:
        _check_one_of("dtype", dtype, tuple(_DTYPES.values()))
    _check_one_of("memory_format", memory_format, _MEMORY_FORMATS)
    if training is not None:
        _check_one_of("training", training, (True, False))
    described = gpus.described(gpu)
    sizes = _sizes(module_or_shape, shape)
    calls: list[Call] = []
    with _alone, torch.inference_mode(False):
        backend = _explaining(described, calls)
        if isinstance(module_or_shape, nn.Module):
            module = without_values(module_or_shape)
        else:
            channels = sizes[1]
            module = CBAM(channels, min(16, channels), device="meta", dtype=dtype).eval()
        if training is not None:
            module.train(training)
        x = torch.empty(sizes, dtype=dtype or dtype_of(module), device="meta")
        x = x.requires_grad_(module.training).clone(memory_format=memory_format)
        with backends.replaced(backend), backends.use_backend(None), ConvolutionLayouts():
            run_once(module, x)
    if not calls:
        raise RuntimeError("explain: no fused gate ran; see cbam_fused.fuse_ and its report")
    return Explanation(described, tuple(calls))


def plan_rows() -> tuple[PlanRow, ...]:
    """The planner's table, in order: the first row that applies is taken."""
    rows = []
    for line in _operation("rows")().splitlines():
        name, strategy, reads, reason = line.split(" ", 3)
        rows.append(PlanRow(name, strategy, reads == "once", reason))
    return tuple(rows)


# ---- Arguments ----------------------------------------------------------------------------------


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def _check_one_of(name: str, value: object, expected: tuple) -> None:
    if not any(value is one for one in expected):
        names = ", ".join(map(str, expected))
        raise TypeError(f"explain: {name} must be one of {names}; got {value!r}")


def _sizes(module_or_shape: object, shape: object) -> list[int]:
    """Of x."""
    if isinstance(module_or_shape, nn.Module):
        if shape is None:
            raise TypeError("explain: shape must be given with a module: that of its input")
        return _checked_shape("shape", "a shape", shape)
    if shape is not None:
        raise TypeError(
            "explain: module_or_shape must be a torch.nn.Module where shape is given; got"
            f" {module_or_shape!r}"
        )
    return _checked_shape("module_or_shape", "a torch.nn.Module or a shape", module_or_shape)


def _checked_shape(name: str, expected: str, shape: object) -> list[int]:
    sizes = list(shape) if isinstance(shape, (list, tuple)) else []
    fits = len(sizes) == 4 and all(type(s) is int and s >= 0 for s in sizes)
    if not fits or 0 in sizes[1:]:
        raise ValueError(
            f"explain: {name} must be {expected} (N, C, H, W), C, H and W of at least 1;"
            f" got {shape!r}"
        )
    return sizes


# ---- Operations ---------------------------------------------------------------------------------

_alone = threading.RLock()
"""Backends are replaced for all threads, and the namespace is defined once."""

_definitions: list[torch.library.Library] = []  # they last as long as these objects


def define_operations(namespace: str) -> torch.library.Library:
    """Defines the operations that explain themselves, for as long as the result lasts."""
    definitions = torch.library.Library(namespace, "DEF")
    for operation, schema in SCHEMAS.items():
        definitions.define(operation + schema)
    definitions.define(
        "begin(int capability, int multiprocessors, int l2_bytes, int shared_bytes,"
        " int block_shared_bytes) -> ()"
    )
    definitions.define("end() -> str")
    definitions.define("rows() -> str")
    return definitions


def _operation(name: str) -> Callable:
    """An operation of the namespace, once the library is known to have its CUDA code."""
    if not library.loaded or not library.build.get("architectures"):
        why = library.reason or library.build.get("cuda", "build it again").removeprefix("none: ")
        raise RuntimeError(f"explain: the library has no CUDA code: {why}")
    with _alone:
        if not _definitions:
            _definitions.append(define_operations(NAMESPACE))
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@contextlib.contextmanager
def _recording(gpu: Gpu) -> Iterator[list[str]]:
    """The lines that the operations within the context write."""
    lines: list[str] = []
    major, minor = cuda_backend.newest_code(library.build["architectures"], gpu.capability)
    _operation("begin")(
        10 * major + minor,
        gpu.multiprocessors,
        gpu.l2_bytes,
        gpu.shared_bytes,
        gpu.block_shared_bytes,
    )
    try:
        yield lines
    finally:
        lines += _operation("end")().splitlines()


def _explaining(gpu: Gpu, calls: list[Call]) -> Backend:
    """The backend for this thread's meta tensors: it adds what is called to `calls`.

    Others are still for the backend that it replaces.
    """
    original, thread = backends.get("reference"), threading.get_ident()

    def function(name: str) -> Callable:
        operation = _operation(name)
        names = [argument.name for argument in operation._schema.arguments]

        def call(*arguments):
            if threading.get_ident() != thread or not arguments[0].is_meta:
                return getattr(original, name)(*arguments)
            with _recording(gpu) as lines:
                results = operation(*arguments)
            by_name = dict(zip(names, arguments, strict=True))
            calls.append(costs.call(gpu, name, by_name, *_written(lines)))
            return results

        return call

    return Backend("reference", *(function(name) for name in Backend._fields[1:]))


def _written(lines: list[str]) -> tuple[PlanRow | None, int, tuple[Launch, ...]]:
    """The plan, its samples a step, and the launches that the library wrote down."""
    plan, group_samples, launches = None, 0, []
    for line in lines:
        kind, *fields = line.split()
        if kind == "plan":
            plan, group_samples = _rows_by_name()[fields[0]], int(fields[1])
        else:
            launches.append(Launch(fields[0], *map(int, fields[1:])))
    return plan, group_samples, tuple(launches)


@functools.cache
def _rows_by_name() -> dict[str, PlanRow]:
    return {row.name: row for row in plan_rows()}


# ---- Command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shape", nargs="?", help="of x, as 64x256x56x56; without it the planner's table is printed"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of x")
    parser.add_argument("--channels-last", action="store_true", help="x is channels_last")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--gpu", choices=GPUS, help="default: the one that is here, else H200")


def run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.shape is None:
            print("\n".join(f"{r.name}: {r.strategy}: {r.reason}" for r in plan_rows()))
            return 0
        print(
            explain(
                _parsed(arguments.shape),
                dtype=_DTYPES[arguments.dtype],
                memory_format=_MEMORY_FORMATS[arguments.channels_last],
                training=arguments.training,
                gpu=arguments.gpu,
            )
        )
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parsed(shape: str) -> list[int]:
    sizes = shape.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"explain: shape must be NxCxHxW, as 64x256x56x56; got {shape!r}")
    return [int(size) for size in sizes]
