"""The swap itself: a module's class becomes a subclass of it whose forward is the fused gate.

Nothing of the instance is touched: parameters, buffers, hooks, names, state_dict and repr stay,
`isinstance` holds, and giving the class back restores the module exactly. Copies and pickles are
rebuilt from the original class.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from cbam_fused.plan import Plan


class Fusion(NamedTuple):
    """What a fused class knows: the class it replaces and the forward that one had, the adapter's
    name, where everything is.
    """

    base: type[nn.Module]
    forward: Callable
    adapter: str
    plan: Plan


def fusion_of(module: nn.Module) -> Fusion | None:
    """The `Fusion` of a module whose class was swapped, else None.

    Its class may have been swapped again, for a subclass of the fused one.
    """
    return getattr(type(module), "_cbam_fused", None)


def is_swapped_again(module: nn.Module) -> bool:
    """Whether the class of a fused module or block is no longer the one it was given, but a
    subclass.
    """
    return type(module).__dict__.keys().isdisjoint({"_cbam_fused", "_cbam_block"})


def set_classes(swaps: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Gives each module its class; all of them or none."""
    before = [(module, type(module)) for module, _ in swaps]
    try:
        for module, cls in swaps:
            module.__class__ = cls
    except BaseException:
        for module, cls in before:
            module.__class__ = cls
        raise


def subclass(
    base: type[nn.Module], rebuilt: Callable[[Callable, tuple], tuple], **namespace: object
) -> type[nn.Module]:
    """A subclass of `base` with `namespace` that looks like it.

    Args:
        rebuilt: how pickles and copies make an instance: from the function and arguments for one of
            `base`, a function and arguments that name no class made here.
    """

    def reduce(self, protocol: int) -> tuple:
        build, arguments, *state = super(cls, self).__reduce_ex__(protocol)
        if type(self) is not cls:
            return (build, arguments, *state)
        arguments = tuple(base if argument is cls else argument for argument in arguments)
        return (*rebuilt(build, arguments), *state)

    def refuse_script(self) -> None:  # torch.jit.script asks for it
        raise RuntimeError(
            f"torch.jit.script: {base.__name__} is fused; cbam_fused.unfuse_(model) first"
        )

    namespace |= {
        "__prepare_scriptable__": refuse_script,
        "__reduce_ex__": reduce,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    cls = type(base)(base.__name__, (base,), namespace)
    return cls
