"""`fused`: a model whose gates are fused for as long as a `with` block lasts."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from cbam_fused.fuse.frame import expect_module, fuse_
from cbam_fused.fuse.report import FuseReport
from cbam_fused.fuse.swap import set_classes


@contextlib.contextmanager
def fused(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    strict: bool = False,
    verify: bool = True,
    epilogue: bool = True,
) -> Iterator[FuseReport]:
    """Fuses the gates of `model` within a ``with`` block: ``with fused(model) as report: ...``

    At its end, also by an exception, each gate and block that this call fused has its own class
    again. Those that were fused before stay fused; so do copies made within, until `unfuse_`.

    Args:
        model, filter_fn, strict, verify, epilogue: as those of `fuse_`.

    Yields:
        The report of `fuse_`.

    Raises:
        TypeError, RuntimeError: at the beginning, as `fuse_`.
        RuntimeError: at the end, the class of a gate was swapped again within, as FSDP2 does;
            nothing is restored.
    """
    expect_module("fused", model)
    before = {name: (module, type(module)) for name, module in model.named_modules()}
    report = fuse_(model, filter_fn, strict=strict, verify=verify, epilogue=epilogue)
    swaps = [
        (name, module, cls, type(module))
        for name, (module, cls) in before.items()
        if type(module) is not cls
    ]
    try:
        yield report
    finally:
        for name, module, *expected in swaps:
            if type(module) not in expected:
                raise RuntimeError(
                    f"fused: the class of {name or 'the model'} was swapped again, for "
                    f"{type(module).__name__}; nothing was restored, unfuse_ can do so after that "
                    "is undone"
                )
        set_classes([(module, cls) for _, module, cls, _ in swaps])
