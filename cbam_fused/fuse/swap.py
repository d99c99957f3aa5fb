"""The swap itself: a module's class becomes a subclass of it whose forward is the fused gate.

Nothing of the instance is touched: parameters, buffers, hooks, names, state_dict and repr stay,
`isinstance` holds, and giving the class back restores the module exactly. Copies and pickles are
rebuilt from the original class.
"""

import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from cbam_fused.plan import Plan, call_fused


class Fusion(NamedTuple):
    """What a fused class knows: the class it replaces, the adapter's name, where everything is."""

    base: type[nn.Module]
    adapter: str
    plan: Plan


def fusion_of(module: nn.Module) -> Fusion | None:
    """The `Fusion` of a module whose class was swapped, else None."""
    return type(module).__dict__.get("_cbam_fused")


@functools.cache
def fused_class(fusion: Fusion) -> type[nn.Module]:
    """The subclass of ``fusion.base`` that computes the fused gate; one for equal fusions."""
    base, plan = fusion.base, fusion.plan

    def forward(self, x: Tensor) -> Tensor:
        y = call_fused(self, plan, x)
        return base.forward(self, x) if y is None else y

    def reduce(self, protocol: int) -> tuple:
        build, arguments, *state = super(cls, self).__reduce_ex__(protocol)
        arguments = tuple(base if argument is cls else argument for argument in arguments)
        return (_rebuild, (fusion, build, arguments), *state)

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_cbam_fused": fusion,
    }
    cls = type(base)(base.__name__, (base,), namespace)
    return cls


def _rebuild(fusion: Fusion, build: Any, arguments: tuple) -> nn.Module:
    module = build(*arguments)
    module.__class__ = fused_class(fusion)
    return module
