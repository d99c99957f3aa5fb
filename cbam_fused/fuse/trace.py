"""The forward of a block as a graph of torch.fx, its children as leaves, with all it depends on.

A trace shows what one call did. That every call does it needs more: the forward is run on a twin of
the block that notes each attribute read, so that a call can compare them; what cannot be compared
(an attribute of a child, a dict), and what a graph does not show (an attribute set, a tensor made,
another autocast or gradient mode, a random number) makes the block untraceable. So does a forward
that is another in training than in eval mode. In-place operators are recorded as what they are.
"""

import contextlib
import functools
import operator
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from cbam_fused.fuse.adapters import NotFusableError
from cbam_fused.plan import EVERY_MODULE, Setting, frozen, is_plain

_AUTOCAST_DEVICES = ("cpu", "cuda")
_COMPARED = (type(None), type, types.FunctionType, types.BuiltinFunctionType)


class Trace(NamedTuple):
    """A block's forward, and what of the block it depends on besides its children.

    Attributes:
        graph: with a ``call_module`` node for every call of a child.
        settings: the attributes of the instance that it reads.
        absent: attributes it reads that the instance has not: its class may have them.
        methods: those that it calls, with their class, and the ``forward`` of each class it is of.
    """

    graph: fx.Graph
    settings: tuple[Setting, ...]
    absent: tuple[str, ...]
    methods: tuple[tuple[type, str, Callable], ...]


def trace(block: nn.Module) -> Trace:
    """Traces the forward of `block`, which is left alone.

    Raises:
        NotFusableError: it cannot be traced, or depends on what cannot be compared at a call.
    """
    traces = [_trace_once(block, training) for training in (True, False)]
    training, evaluation = (source_of(graph) for graph, _ in traces)
    if training != evaluation:
        raise NotFusableError("its forward is another in training than in eval mode")
    graph, _ = traces[0]
    names = dict.fromkeys(name for _, read in traces for name in read)
    return Trace(graph, *_dependencies(block, names))


def source_of(graph: fx.Graph) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The source of ``forward(self, ...)`` for a graph, and its globals."""
    code = graph.python_code("self")
    return code.src, tuple(code.globals.items())


def compiled(graph: fx.Graph) -> Callable:
    """The function ``forward(self, ...)`` of a graph; one for equal graphs."""
    return _compiled(*source_of(graph))


@functools.cache
def _compiled(source: str, names: tuple[tuple[str, Any], ...]) -> Callable:
    namespace = dict(names)
    exec(compile(source, "<cbam_fused block>", "exec"), namespace)
    return namespace["forward"]


def _trace_once(block: nn.Module, training: bool) -> tuple[fx.Graph, list[str]]:
    read: list[str] = []
    children = {
        name: _twin(child, name, functools.partial(_refuse, name), training=training)
        for name, child in block._modules.items()
        if child is not None
    }
    names = {id(child): name for name, child in children.items()}
    twin = _twin(block, "", read.append, training=training, _modules=block._modules | children)
    try:
        with _no_random_numbers(), _surroundings(training):
            return _Tracer(names).trace(twin), read
    except NotFusableError:
        raise
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        raise NotFusableError(
            f"torch.fx cannot trace it: {type(error).__name__}: {cause}"
        ) from error


def _refuse(child: str, name: str) -> None:
    raise NotFusableError(f"its forward reads {child}.{name}")


def _twin(
    module: nn.Module, name: str, on_read: Callable[[str], object], **changes: object
) -> nn.Module:
    """A module with the attributes of `module`, but for `changes`, that reports what is read of
    those that not every module has, and refuses to be changed.
    """
    cls = type(module)

    def read(self, attribute: str) -> object:
        if attribute not in EVERY_MODULE and not hasattr(nn.Module, attribute):
            state = object.__getattribute__(self, "__dict__")
            if not name or attribute in state or _is_no_tensor(state, attribute):
                on_read(attribute)
        return cls.__getattribute__(self, attribute)

    def write(self, attribute: str, *_value: object) -> None:
        raise NotFusableError(f"its forward sets {name}{'.' if name else ''}{attribute}")

    namespace = {"__getattribute__": read, "__setattr__": write, "__delattr__": write}
    twin = object.__new__(type(cls)(cls.__name__, (cls,), namespace))
    object.__setattr__(twin, "__dict__", module.__dict__ | changes)
    return twin


def _is_no_tensor(state: dict[str, Any], name: str) -> bool:
    """Whether a module has a place for a parameter or buffer `name`, and None is in it."""
    return any(
        name in state[kind] and state[kind][name] is None for kind in ("_parameters", "_buffers")
    )


def _dependencies(block: nn.Module, names: dict[str, None]) -> tuple[tuple, tuple, tuple]:
    """The settings, absent attributes and methods among the attributes read."""
    cls, state = type(block), block.__dict__
    bases = (base for base in cls.__mro__ if "forward" in vars(base) and base is not nn.Module)
    methods = [(base, "forward", base.forward) for base in bases]
    settings, absent = [], []
    for name in names:
        if _is_no_tensor(state, name):
            raise NotFusableError(f"its forward reads {name}, which is no tensor")
        if name in state:
            value = state[name]
            if not is_plain(value) and not isinstance(value, _COMPARED):
                raise NotFusableError(f"its forward reads {name}, a {type(value).__name__}")
            settings.append(Setting(0, name, frozen(value)))
        elif not any(name in state[kind] for kind in ("_modules", "_parameters", "_buffers")):
            absent.append(name)
            if isinstance(getattr(cls, name, None), types.FunctionType):
                methods.append((cls, name, getattr(cls, name)))
    return tuple(settings), tuple(absent), tuple(methods)


class _Proxy(fx.Proxy):
    """A proxy that records ``a += b`` as what it is; fx's own records ``a = a + b``."""


def _recorded(target: Callable) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Records the calls of children by the names that `names` has for them (by identity)."""

    proxy_buffer_attributes = True

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self._modes = _modes()
        self._thread = threading.get_ident()

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True

    def path_of_module(self, module: nn.Module) -> str:
        if id(module) not in self._names:
            raise NotFusableError(f"its forward calls a {type(module).__name__} that is no child")
        return self._names[id(module)]

    def call_module(self, module: nn.Module, forward: Callable, arguments, keywords) -> Any:
        if threading.get_ident() != self._thread:  # fx patches nn.Module for all threads
            return forward(*arguments, **keywords)
        return super().call_module(module, forward, arguments, keywords)

    def getattr(self, name: str, value: Any, cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return value
        return super().getattr(name, value, cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *arguments, **keywords) -> fx.Node:
        if _modes() != self._modes:
            raise NotFusableError("its forward switches autocast, gradients or checkpointing")
        return super().create_node(*arguments, **keywords)

    def create_arg(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            raise NotFusableError("its forward uses a tensor that is no parameter or buffer of it")
        return super().create_arg(argument)


def _modes() -> tuple:
    autocast = (
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
    )
    saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    gradients = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return *gradients, saved_tensors_hooks, *autocast


@contextlib.contextmanager
def _surroundings(training: bool) -> Iterator[None]:
    """Gradients in training, autocast in eval mode: one of the two differs from whatever a forward
    switches to.
    """
    before = {device: torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES}
    try:
        for device in before:
            torch.set_autocast_enabled(device, not training)
        with torch.inference_mode(False), torch.set_grad_enabled(training):
            yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raises if any is drawn, and puts the generators back."""
    before, numpy = _random_states(), sys.modules.get("numpy")
    try:
        yield
        if _random_states() != before:
            raise NotFusableError("its forward draws random numbers")
    finally:
        torch.random.set_rng_state(torch.tensor(before[0], dtype=torch.uint8, device="cpu"))
        random.setstate(before[1])
        if numpy is not None:
            numpy.random.set_state(before[2])


def _random_states() -> tuple:
    numpy, drawn = sys.modules.get("numpy"), ()
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        drawn = (name, tuple(keys), *rest)
    return torch.random.get_rng_state().tolist(), random.getstate(), drawn
