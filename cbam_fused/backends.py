"""The backends: objects with the five operations, and the choice between them.

The choice is made per call and per device: on a CPU the compiled library if it loaded, else the
reference (pure PyTorch); the reference on every other device. It can be overridden with
`use_backend` or the environment variable ``CBAM_FUSED_BACKEND``, and `choose` says why it chose.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from cbam_fused import library, reference


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


_BACKENDS = {"reference": _from("reference", lambda name: getattr(reference, name))}
if library.loaded:
    _BACKENDS["cpu"] = _from("cpu", lambda name: getattr(torch.ops.cbam_fused, name).default)

NAMES = ("cpu", "reference")
_forced: str | None = os.environ.get("CBAM_FUSED_BACKEND") or None


def get(name: str) -> Backend:
    """The backend called `name`.

    Raises ValueError for an unknown name, RuntimeError if it is not usable here.
    """
    if name not in NAMES:
        raise ValueError(f"cbam_fused: backend must be one of {', '.join(NAMES)}; got {name!r}")
    if name not in _BACKENDS:
        raise RuntimeError(f"cbam_fused: backend {name} is not usable here: {library.reason}")
    return _BACKENDS[name]


def available() -> tuple[str, ...]:
    """Names of the usable backends."""
    return tuple(name for name in NAMES if name in _BACKENDS)


def status() -> list[tuple[str, bool, str]]:
    """(name, usable, reason) of every backend this package knows."""
    reasons = {"cpu": library.reason, "reference": "pure PyTorch, any device"}
    return [(name, name in _BACKENDS, reasons[name]) for name in NAMES]


def choose(device: torch.device) -> tuple[Backend, str]:
    """The backend for tensors on `device`, and the reason for the choice."""
    if _forced is not None:
        backend = get(_forced)
        if backend.name == "cpu" and device.type != "cpu":
            raise RuntimeError(f"cbam_fused: backend cpu needs tensors on a cpu; got {device}")
        return backend, "asked for by use_backend or CBAM_FUSED_BACKEND"
    if device.type == "cpu" and "cpu" in _BACKENDS:
        return _BACKENDS["cpu"], "the compiled library is loaded"
    if device.type == "cpu":
        return _BACKENDS["reference"], library.reason
    return _BACKENDS["reference"], f"no fused backend for {device.type}"


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
