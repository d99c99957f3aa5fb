"""The backends: objects with the five operations, and the choice between them.

The choice is made per call and per device: on a GPU the compiled library's CUDA kernels, else the
Triton kernels, on a CPU the compiled library, where they can be used; else, and on every other
device, the reference (pure PyTorch). It can be overridden with `use_backend` or the environment
variable ``CBAM_FUSED_BACKEND``, and `choose` says why it chose.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from cbam_fused import cuda_backend, library, reference, triton_backend


class Backend(NamedTuple):
    """One implementation of the operations of `cbam_fused.schemas`.

    Each is callable with its arguments in their order.
    """

    name: str
    cbam_inference: Callable
    cbam_attend: Callable
    cbam_apply: Callable
    cbam_backward_reduce: Callable
    cbam_backward_input: Callable


def _from(name: str, functions: Callable[[str], Callable]) -> Backend:
    return Backend(name, *(functions(operation) for operation in Backend._fields[1:]))


def _compiled(operation: str) -> Callable:
    """The library's operation, which has kernels for both kinds of device."""
    return getattr(torch.ops.cbam_fused, operation).default


_BACKENDS = {
    "cuda": _from("cuda", _compiled),
    "triton": _from("triton", triton_backend.operation),
    "cpu": _from("cpu", _compiled),
    "reference": _from("reference", lambda name: getattr(reference, name)),
}

NAMES = tuple(_BACKENDS)
_forced: str | None = os.environ.get("CBAM_FUSED_BACKEND") or None


def _unusable(name: str, device: torch.device | None = None) -> str:
    """Why tensors on `device` (None: on any) are not for this backend; empty where they are."""
    if name == "cuda":
        return cuda_backend.unusable(device)
    if name == "triton":
        return triton_backend.unusable(device)
    if name == "cpu" and not library.loaded:
        return library.reason
    if name == "cpu" and device is not None and device.type != "cpu":
        return "it needs a cpu"
    return ""


def get(name: str, device: torch.device | None = None) -> Backend:
    """The backend called `name`, for tensors on `device` (None: on any).

    Raises ValueError for an unknown name, RuntimeError if it is not usable there.
    """
    if name not in NAMES:
        raise ValueError(f"cbam_fused: backend must be one of {', '.join(NAMES)}; got {name!r}")
    if why := _unusable(name, device):
        where = "here" if device is None else f"for tensors on {device}"
        raise RuntimeError(f"cbam_fused: backend {name} is not usable {where}: {why}")
    return _BACKENDS[name]


def available(device: torch.device | None = None) -> tuple[str, ...]:
    """Names of the backends that are usable for tensors on `device` (None: on any)."""
    return tuple(name for name in NAMES if not _unusable(name, device))


def status() -> list[tuple[str, bool, str]]:
    """(name, usable, reason) of every backend this package knows."""
    places = {
        "cuda": "on a GPU",
        "triton": triton_backend.place(),
        "cpu": "",
        "reference": "pure PyTorch, any device",
    }
    rows = ((name, _unusable(name)) for name in NAMES)
    return [(name, not why, why or places[name]) for name, why in rows]


# By type of device: the fused backends from the best on, and why each can be used.
_AUTOMATIC = {
    "cuda": {
        "cuda": "the compiled library has code for this GPU",
        "triton": "Triton can be imported",
    },
    "cpu": {"cpu": "the compiled library is loaded"},
}


def chosen(device: torch.device) -> Backend:
    """The backend for tensors on `device`."""
    if _forced is not None:
        return get(_forced, device)
    for name in _AUTOMATIC.get(device.type, ()):
        if not _unusable(name, device):
            return _BACKENDS[name]
    return _BACKENDS["reference"]


def choose(device: torch.device) -> tuple[Backend, str]:
    """The backend for tensors on `device`, and the reason for the choice."""
    backend = chosen(device)
    if _forced is not None:
        return backend, "asked for by use_backend or CBAM_FUSED_BACKEND"
    candidates = _AUTOMATIC.get(device.type, {})
    better = itertools.takewhile(lambda name: name != backend.name, candidates)
    passed_over = [f"{name} is not usable: {_unusable(name, device)}" for name in better]
    reasons = [candidates[backend.name]] if backend.name in candidates else []
    return backend, "; ".join(reasons + passed_over) or f"no fused backend for {device.type}"


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context every call uses the backend `name`, in all threads.

    None: the automatic choice. Raises ValueError for an unknown name and RuntimeError if that
    backend is not usable here. A backward pass uses the backend of its forward pass.
    """
    global _forced
    if name is not None:
        get(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@contextlib.contextmanager
def replaced(backend: Backend) -> Iterator[None]:
    """Within the context `backend` stands in for the one of its name."""
    original = _BACKENDS[backend.name]
    _BACKENDS[backend.name] = backend
    try:
        yield
    finally:
        _BACKENDS[backend.name] = original
