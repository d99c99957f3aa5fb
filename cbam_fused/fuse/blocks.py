"""Blocks whose gate, shortcut and activation become one call of the fused gate.

A block's forward is traced (`trace`); where gates are followed by an addition or a ReLU (`tail`),
the graph with fused calls in their place becomes the forward of a subclass, swapped in as that of a
gate is.
At each call the block is compared with what was traced: where something changed, or a hook or a
drop path acts in between, its own forward runs, or the tail as it was, with the gate fused alone.
"""

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from cbam_fused.fuse.adapters import NotFusableError
from cbam_fused.fuse.adapters.layers import expect_own_signature
from cbam_fused.fuse.swap import Fusion, subclass
from cbam_fused.fuse.tail import (
    Tail,
    drops,
    find_tail,
    is_pure,
    leading_layers,
    replace_tail,
    tail_graph,
)
from cbam_fused.fuse.trace import compiled, trace
from cbam_fused.fuse.verify import Epilogue
from cbam_fused.modules import CBAM
from cbam_fused.plan import (
    InnerModule,
    Setting,
    batch_norm_types,
    call_fused,
    inner_module,
    inner_states,
    result_dtype,
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class BlockTail(NamedTuple):
    """A gate of a fused block, and what is fused behind it.

    Attributes:
        gate: the gate's name.
        dropped: the names of the drop paths behind it.
        adds: whether a shortcut is added.
        activation: ``relu`` or ``none``.
        own: the tail as it was: ``own(self, x, shortcut)``.
    """

    gate: str
    dropped: tuple[str, ...]
    adds: bool
    activation: str
    own: Callable[[nn.Module, Tensor, Tensor | None], Tensor]

    @property
    def epilogue(self) -> str:
        """For the report: ``add + relu``, ``add`` or ``relu``."""
        return " + ".join(["add"] * self.adds + [self.activation] * (self.activation != "none"))


class BlockFusion(NamedTuple):
    """What the class of a fused block knows.

    Attributes:
        base: the class that it replaces.
        methods, absent, settings: what was traced depends on, see `trace.Trace`.
        children: how many children the block has.
        inner: these children, and the first layers of those that are a Sequential.
        tails: what is fused, for each of its gates.
        body: the traced forward, with ``self._cbam_tail_{i}(x, shortcut)`` for the i-th tail.
    """

    base: type[nn.Module]
    methods: tuple[tuple[type, str, Callable], ...]
    absent: tuple[str, ...]
    settings: tuple[Setting, ...]
    children: int
    inner: tuple[InnerModule, ...]
    tails: tuple[BlockTail, ...]
    body: Callable[[nn.Module, Tensor], Tensor]

    def tail_of(self, gate: str) -> BlockTail | None:
        """What is fused behind the child `gate`; None if nothing is."""
        return next((tail for tail in self.tails if tail.gate == gate), None)

    def with_class(self, name: str, cls: type[nn.Module]) -> "BlockFusion":
        """The same, but for a child `name` of class `cls`, if that is fused or unfused by it."""
        rows = list(self.inner)
        for place, row in enumerate(rows):
            if row.path == name and (issubclass(cls, row.cls) or issubclass(row.cls, cls)):
                rows[place] = row._replace(cls=cls, forward=cls.forward)
        return self._replace(inner=tuple(rows))


def block_fusion_of(module: nn.Module) -> BlockFusion | None:
    """The `BlockFusion` of a module whose class was swapped, else None."""
    return getattr(type(module), "_cbam_block", None)


def describe(
    block: nn.Module, gates: tuple[str, ...], classes: dict[str, type[nn.Module]]
) -> BlockFusion:
    """How `block` would be fused behind its children `gates`; `classes` are those that children
    will have.

    Raises:
        NotFusableError: nothing can be fused behind one of them; the message says why.
    """
    for name in gates:
        gate = block._modules.get(name)
        if gate_fusion(gate, classes.get(name, type(gate))) is None:
            raise NotFusableError(f"{name} is no fused gate")
    try:
        return _describe(_unfused(block), gates, classes)
    except NotFusableError:
        raise
    except Exception as error:
        raise NotFusableError(f"its block: {type(error).__name__}: {error}") from error


def _unfused(block: nn.Module) -> nn.Module:
    """A fused block as it was before, with all that it has; others themselves."""
    fusion = block_fusion_of(block)
    if fusion is None:
        return block
    view = object.__new__(fusion.base)
    object.__setattr__(view, "__dict__", block.__dict__)
    return view


def _describe(
    block: nn.Module, gates: tuple[str, ...], classes: dict[str, type[nn.Module]]
) -> BlockFusion:
    try:
        expect_own_signature(block)
        graph, settings, absent, methods = trace(block)
    except NotFusableError as obstacle:
        raise NotFusableError(f"its block: {obstacle}") from obstacle
    tails = {name: find_tail(graph, block, name) for name in gates}
    nodes = [node for tail in tails.values() for node in tail.nodes]
    if len(nodes) != len(set(nodes)):
        raise NotFusableError("it is added to another gate, which is fused with the addition")
    fused = tuple(_block_tail(name, tail) for name, tail in tails.items())
    bypassed = {node.target for node in nodes if node.op == "call_module"}
    for place, tail in enumerate(tails.values()):
        replace_tail(graph, tail, f"_cbam_tail_{place}")
    inner = tuple(_inner(block, classes, bypassed))
    fixed = (methods, absent, settings, len(block._modules), inner)
    return BlockFusion(type(block), *fixed, fused, compiled(graph))


def _block_tail(gate: str, tail: Tail) -> BlockTail:
    dropped = tuple(node.target for node in tail.dropped)
    activation = "none" if tail.relu is None else "relu"
    own = compiled(tail_graph(tail))
    return BlockTail(gate, dropped, tail.addition is not None, activation, own)


def _inner(block: nn.Module, classes: dict[str, type], bypassed: set[str]) -> Iterator[InnerModule]:
    """The table of `BlockFusion.inner`; `classes` are those that children will have."""
    place = 0
    for name, child in block._modules.items():
        place += 1
        yield _row(0, name, name, classes.get(name, type(child)), child, name in bypassed)
        if is_pure(child):
            parent = place
            for number, layer in leading_layers(child).items():
                place += 1
                yield _row(parent, number, f"{name}.{number}", type(layer), layer, False)


def _row(parent, name, path, cls: type, module: nn.Module | None, bypassed: bool) -> InnerModule:
    others = () if module is None else batch_norm_types(module)
    children = len(module._modules) if isinstance(module, _CONTAINERS) else None
    return inner_module(parent, name, path, cls, others, children, bypassed)


def changed(block: nn.Module, fusion: BlockFusion) -> str:
    """What of a block is not as it was traced, or has hooks that would not run; "" if nothing."""
    state = block.__dict__
    for cls, name, method in fusion.methods:
        if getattr(cls, name) is not method:
            return f"the {name} of its class, {cls.__name__}, was replaced"
    for name in fusion.absent:
        if name in state or name in state["_parameters"] or name in state["_buffers"]:
            return f"it has {name}, which it had not"
    if len(state["_modules"]) != fusion.children:
        return f"it has {len(state['_modules'])} children, it had {fusion.children}"
    _, reason = inner_states(block, fusion.inner, fusion.settings)
    return reason


def acting(block: nn.Module, tail: BlockTail) -> str:
    """What acts behind the gate of `tail` now, before what is fused; "" if nothing."""
    for name in tail.dropped:
        if drops(block._modules[name]):
            return f"{name} drops paths, which is in training mode"
    return ""


def epilogue_of(fusion: BlockFusion, name: str) -> Epilogue:
    """What is fused behind the child `name`, as it was, for any gate, where no drop path acts."""
    tail = fusion.tail_of(name)

    def own(gate: nn.Module, x: Tensor, shortcut: Tensor | None) -> Tensor:
        stand_in = nn.Module()
        for row in fusion.inner:
            if row.bypassed and not fusion.tail_of(row.name):
                stand_in.add_module(row.name, row.cls())
        stand_in.add_module(name, gate)
        return tail.own(stand_in, x, shortcut)

    return Epilogue(own, tail.adds, tail.activation)


def gate_fusion(gate: nn.Module | None, cls: type) -> Fusion | None:
    """How a gate of class `cls` is fused, `CBAM` included; None if it is not."""
    if cls is CBAM:
        return Fusion(CBAM, CBAM.forward, "cbam_fused", gate._plan)
    return getattr(cls, "_cbam_fused", None)


def _fused_tail(block: nn.Module, tail: BlockTail, x: Tensor, shortcut: Tensor | None):
    """The whole tail in one call; None where it must run as it was."""
    gate = block._modules[tail.gate]
    base, known_forward, _, plan = gate_fusion(gate, type(gate))
    if base.forward is not known_forward or acting(block, tail):
        return None
    if tail.adds and not _is_like(shortcut, x):
        return None
    return call_fused(gate, plan, x, residual=shortcut, activation=tail.activation)


def _is_like(shortcut: Tensor, x: Tensor) -> bool:
    """Whether the sum has the shape and dtype of the gate's result, so that nothing is broadcast or
    promoted.
    """
    return (
        isinstance(x, Tensor)
        and isinstance(shortcut, Tensor)
        and shortcut.shape == x.shape
        and shortcut.device == x.device
        and shortcut.dtype == result_dtype(x)
    )


_classes: dict[str, type[nn.Module]] = {}  # of this process, by a name that no other one has


@functools.cache
def block_class(fusion: BlockFusion) -> type[nn.Module]:
    """The subclass of ``fusion.base`` with the fused tail; one for equal fusions."""
    base = fusion.base
    token = uuid.uuid4().hex

    def forward(self, x: Tensor) -> Tensor:
        if changed(self, fusion):
            return base.forward(self, x)
        return fusion.body(self, x)

    def rebuilt(build: Callable, arguments: tuple) -> tuple:
        gates = tuple(tail.gate for tail in fusion.tails)
        return _rebuild, (token, base, gates, build, arguments)

    methods = {f"_cbam_tail_{place}": _method(tail) for place, tail in enumerate(fusion.tails)}
    cls = subclass(base, rebuilt, forward=forward, _cbam_block=fusion, **methods)
    return _classes.setdefault(token, cls)


def _method(tail: BlockTail) -> Callable[[nn.Module, Tensor, Tensor | None], Tensor]:
    def method(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        y = _fused_tail(self, tail, x, shortcut)
        return tail.own(self, x, shortcut) if y is None else y

    return method


def _rebuild(
    token: str, base: type[nn.Module], gates: tuple[str, ...], build: Callable, arguments: tuple
) -> nn.Module:
    """A copy of a block, of the same class; in another process traced again once it is complete."""
    module = build(*arguments)
    module.__class__ = _classes.get(token) or _loading_class(base, gates)
    return module


@functools.cache
def _loading_class(base: type[nn.Module], gates: tuple[str, ...]) -> type[nn.Module]:
    """A class that becomes `base`, or the fused one, when the state is set."""

    def set_state(self, state: dict) -> None:
        self.__class__ = base
        self.__setstate__(state)
        with contextlib.suppress(NotFusableError):
            self.__class__ = block_class(describe(self, gates, {}))

    return type(base)(base.__name__, (base,), {"__setstate__": set_state})
