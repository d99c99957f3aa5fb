"""The CUDA kernels on a CPU: `load` them, run them as the backend `simt`, ask what they did.

    kernels = harness.load()
    with harness.settings(order="random", seed=3, resident=0, count_sectors=True):
        y = harness.backend().cbam_apply(...)
    kernels.traffic()["x"].loaded

A kernel's error is a RuntimeError that names kernel, block and thread.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from cbam_fused import backends, cuda_backend, explanation, ops
from cbam_fused.backends import Backend
from cbam_fused.schemas import SCHEMAS
from tests.simt import build

NAMESPACE = "cbam_fused_simt"

# One mode a process: an operation has one implementation.
MODE = os.environ.get("SIMT_MODE", "plain")
if MODE not in build.MODES:
    raise ValueError(f"SIMT_MODE must be one of {', '.join(build.MODES)}; got {MODE}")

unavailable = build.unavailable


def environment(mode: str) -> dict[str, str]:
    """The environment of a Python process whose harness has this mode.

    A sanitizer's library must be there from the start. ThreadSanitizer sees the kernels and none of
    the threads that Python and PyTorch have of their own.
    """
    added = {"SIMT_MODE": mode, "OMP_NUM_THREADS": "1"}
    if mode == "address":
        # It takes the place of functions of libstdc++ only if that is there, too.
        libraries = f"{build.library('asan')} {build.library('stdc++')}"
        added |= {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0"}
    if mode == "thread":
        options = "halt_on_error=1 ignore_noninstrumented_modules=1"
        added |= {"LD_PRELOAD": build.library("tsan"), "TSAN_OPTIONS": options}
    return {**os.environ, **added}


def load(operations: str = "cuda") -> ModuleType:
    """The module `simt_kernels`, built if need be; its operations are then registered.

    With "sample" it is another one, with settings and counts of its own and the operation of
    ``sample.cu``.
    """
    return _load(operations)


@functools.cache
def _load(operations: str) -> ModuleType:
    path = build.module_path(MODE, operations)
    build.build(path)
    if operations == "cuda":
        _define_operations()
    spec = importlib.util.spec_from_file_location("simt_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_definitions: list[torch.library.Library] = []  # they last as long as these objects


def _define_operations() -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _definitions.extend((library, explanation.define_operations(f"{NAMESPACE}_explain")))
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", ops._FAKES[name], lib=library)


def backend() -> Backend:
    """The operations as a backend, to be called with tensors on the CPU."""
    load()
    namespace = getattr(torch.ops, NAMESPACE)
    return Backend("simt", *(getattr(namespace, name).default for name in Backend._fields[1:]))


def stand_in() -> None:
    """From now on `cbam_fused` takes these kernels for its backend `cuda`, on the CPU."""

    def usable(device: torch.device | None = None) -> str:
        return ""

    usable._dynamo_marked_constant = True
    cuda_backend.unusable = usable
    backends._BACKENDS["cuda"] = backend()._replace(name="cuda")


@contextlib.contextmanager
def settings(operations: str = "cuda", **values) -> Iterator[ModuleType]:
    """Within the context launches run as `configure` says with these values.

    Counts begin at 0.
    """
    kernels = load(operations)
    kernels.reset()
    kernels.configure(**values)
    try:
        yield kernels
    finally:
        kernels.configure()
        kernels.reset()


@contextlib.contextmanager
def device(**values) -> Iterator[None]:
    """Within the context operations are told that the device has these properties.

    ``multiprocessors`` and ``l2_bytes``; default: those of an H200.
    """
    kernels = load()
    kernels.device(**values)
    try:
        yield
    finally:
        kernels.device()
