"""The adapters that `fuse_` asks: the built-in ones, and before them those that users register."""

from torch import nn

from cbam_fused.fuse.adapters import bubbliiiing, mmyolo, official, pytorchcv, timm, ultralytics
from cbam_fused.fuse.adapters.base import Adapter

_BUILT_IN: tuple[Adapter, ...] = tuple(
    source.ADAPTER for source in (timm, official, ultralytics, pytorchcv, bubbliiiing, mmyolo)
)
_OWN = "cbam_fused"  # what the report calls a `cbam_fused.CBAM`
_registered: list[Adapter] = []


class RegisteredAdapter:
    """What `register_adapter` returns; as a context manager it unregisters the adapter at its end.

    Attributes:
        adapter: what was registered.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def unregister(self) -> None:
        """`fuse_` no longer asks the adapter. Gates that are fused stay so; twice does nothing."""
        _registered[:] = [adapter for adapter in _registered if adapter is not self.adapter]

    def __enter__(self) -> "RegisteredAdapter":
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()


def register_adapter(adapter: Adapter) -> RegisteredAdapter:
    """Teaches `fuse_` another implementation of CBAM, for this process.

    It is asked before the built-in adapters and those registered earlier. What it describes is
    held to the same rules as theirs: the layers it names must exist and be plain ones, and the gate
    is compared with the module's own forward, unless ``verify=False``.

    Args:
        adapter: its name, what it claims, and how it describes that; see `Adapter`.

    Returns:
        A handle with ``unregister()``, also a context manager.

    Raises:
        TypeError: not an `Adapter`, or it is not made of a text and two functions.
        ValueError: its name is empty or taken.
    """
    if not isinstance(adapter, Adapter):
        got = type(adapter).__name__
        raise TypeError(f"register_adapter: adapter must be a cbam_fused.Adapter; got {got}")
    name = adapter.name
    if not isinstance(name, str):
        raise TypeError(f"register_adapter: adapter.name must be a string; got {name!r}")
    for field in ("claims", "describe"):
        value = getattr(adapter, field)
        if not callable(value):
            raise TypeError(f"register_adapter: adapter.{field} must be callable; got {value!r}")
    taken = [_OWN, *(known.name for known in (*_BUILT_IN, *_registered))]
    if not name or name in taken:
        expected = f"not empty and none of {', '.join(taken)}"
        raise ValueError(f"register_adapter: adapter.name must be {expected}; got {name!r}")
    _registered.insert(0, adapter)
    return RegisteredAdapter(adapter)


def claiming(module: nn.Module) -> Adapter | None:
    """The first adapter that claims `module`."""
    known = (*_registered, *_BUILT_IN)
    return next((adapter for adapter in known if adapter.claims(module)), None)
