"""The class of a fused gate, and how copies and pickles come by it.

A copy in this process is of the same class, which was proven for the original. What another process
saved, or what is copied while a class in it has another forward than it had, is compared again: the
code may be of another version. Where it computes something else it has its own class.
"""

import uuid
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cbam_fused.fuse.adapters import NotFusableError
from cbam_fused.fuse.adapters.layers import expect_parameters
from cbam_fused.fuse.swap import Fusion, subclass
from cbam_fused.fuse.verify import verify
from cbam_fused.plan import Plan, call_fused, result_dtype

_process = uuid.uuid4().hex
_classes: dict[Fusion, type[nn.Module]] = {}


def fused_class(fusion: Fusion) -> type[nn.Module]:
    """The subclass of ``fusion.base`` that computes the fused gate; one for equal fusions."""
    if fusion not in _classes:
        _classes[fusion] = _make_class(fusion)
    return _classes[fusion]


def _make_class(fusion: Fusion) -> type[nn.Module]:
    base, known_forward, adapter, plan = fusion

    def forward(self, x: Tensor) -> Tensor:
        y = call_fused(self, plan, x) if base.forward is known_forward else None
        if y is not None:
            return y
        y = base.forward(self, x)
        return y if isinstance(x, torch.fx.Proxy) else y.to(result_dtype(x))

    def rebuilt(build: Callable, arguments: tuple) -> tuple:
        return _rebuild, (_process, base, adapter, plan, build, arguments)

    return subclass(base, rebuilt, forward=forward, _cbam_fused=fusion)


def _rebuild(
    process: str,
    base: type[nn.Module],
    adapter: str,
    plan: Plan,
    build: Callable,
    arguments: tuple,
) -> nn.Module:
    """A copy of a gate; where it is not certainly the same, to be compared once it is complete."""
    fusion = Fusion(base, base.forward, adapter, plan)
    module = build(*arguments)
    is_same = process == _process and fusion in _classes
    module.__class__ = fused_class(fusion) if is_same else _loading_class(fusion)
    return module


def _loading_class(fusion: Fusion) -> type[nn.Module]:
    """A class that becomes the fused one when the state is set, or ``fusion.base``."""
    base = fusion.base

    def set_state(self, state: dict) -> None:
        self.__class__ = base
        self.__setstate__(state)
        try:
            expect_parameters(self)
            if next(self.parameters()).is_meta:
                raise NotFusableError("its parameters are on the meta device")
            verify(self, fusion, own_parameters=False)  # which torch.load may not have read yet
        except NotFusableError as obstacle:
            warnings.warn(
                f"cbam_fused: a {base.__name__} that was saved fused is not fused here, "
                f"but runs its own forward: {obstacle}",
                stacklevel=2,
            )
        else:
            self.__class__ = fused_class(fusion)

    return type(base)(base.__name__, (base,), {"__setstate__": set_state})
