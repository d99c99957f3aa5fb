"""The Triton kernels as a backend: when they can be used, and as operations of PyTorch.

In eager execution the kernels are called as they are, from Python. Where something watches which
operations run (torch.compile, torch.export, tracers, fake tensors and other subclasses) they are
called as `torch.ops.cbam_fused_triton.*`, with the schemas of `cbam_fused.schemas`.

Triton is imported when it is first asked for, not with this package.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from cbam_fused.schemas import SCHEMAS

NAMESPACE = "cbam_fused_triton"
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # of an NVIDIA GPU; the oldest that the tests compile the kernels for

_NO_INTERPRETER = "and TRITON_INTERPRET=1 is not set"


class _Kernels(NamedTuple):
    module: ModuleType | None
    interpreted: bool = False  # TRITON_INTERPRET=1: they run on a CPU, in Triton's interpreter
    unusable: str = ""


@functools.cache
def _kernels() -> _Kernels:
    try:
        import triton
    except ImportError as error:
        return _Kernels(None, unusable=f"triton cannot be imported: {error}")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        needed = ".".join(map(str, OLDEST_TRITON))
        return _Kernels(
            None, unusable=f"it needs Triton {needed} or later; this is {triton.__version__}"
        )
    try:
        from cbam_fused import triton_kernels
    except ImportError as error:  # a checkout that is not installed has them beside the package
        return _Kernels(None, unusable=f"the kernels cannot be imported: {error}")
    return _Kernels(triton_kernels, triton.knobs.runtime.interpret)


@functools.cache
def _too_old(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "there is no GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability >= OLDEST_CAPABILITY:
        return ""
    needed, got = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
    return f"it needs a GPU of compute capability {needed} or later; {device} has {got}"


def unusable(device: torch.device | None = None) -> str:
    """Why tensors on `device` (None: on any) cannot be computed on; empty where they can."""
    kernels = _kernels()
    if kernels.unusable:
        return kernels.unusable
    if kernels.interpreted:
        return "" if device is None or device.type == "cpu" else "its interpreter runs on a cpu"
    if device is None:
        return "" if torch.cuda.is_available() else f"there is no GPU, {_NO_INTERPRETER}"
    return _too_old(device) if device.type == "cuda" else f"it needs a GPU, {_NO_INTERPRETER}"


# What torch.compiler.assume_constant_result does, without its import of the compiler.
unusable._dynamo_marked_constant = True


def place() -> str:
    """Where the kernels run, if they can."""
    return "in Triton's interpreter, on a cpu" if _kernels().interpreted else "on a GPU"


def _is_watched(x: Tensor) -> bool:
    """Whether kernels that no dispatcher sees would be missed."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
    )


def _launch(name: str, *arguments):
    """The operation called `name` by the kernels."""
    device = arguments[0].device
    if why := unusable(device):
        raise RuntimeError(
            f"cbam_fused: backend triton is not usable for tensors on {device}: {why}"
        )
    return getattr(_kernels().module, name)(*arguments)


def _register() -> torch.library.Library:
    registrations = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        registrations.define(name + schema)
        for device in ("CPU", "CUDA"):
            registrations.impl(name, functools.partial(_launch, name), device)
    return registrations


# When the package is imported again in one process the first registration stays.
if not hasattr(getattr(torch.ops, NAMESPACE), next(iter(SCHEMAS))):
    _registrations = _register()  # it lasts as long as this object


def operation(name: str) -> Callable:
    """The operation called `name`, to be called with its schema's arguments in their order."""
    watched = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*arguments):
        if _is_watched(arguments[0]):
            return watched(*arguments)
        return getattr(_kernels().module, name)(*arguments)

    return call
