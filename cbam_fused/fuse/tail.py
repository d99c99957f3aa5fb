"""The tail of a gate in its block's graph: gate, perhaps a drop path, then the addition of a
shortcut, a ReLU, or both.

It is taken for one only if nobody else sees what lies between, nothing between acts in eval mode,
and the gate may as well run where the addition does.

The fused ReLU keeps its output for the backward, as PyTorch's does: changed in place afterwards, it
is an error with both. A ReLU6 is left alone: PyTorch's keeps its input, or a copy of it where it
acts in place, so that what follows may change its output.
"""

import operator
import sys
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from cbam_fused.fuse.adapters import NotFusableError
from cbam_fused.plan import batch_norm_types

_IN_PLACE = (operator.iadd, "add_")
_ADDITIONS = (operator.add, torch.add, "add", *_IN_PLACE)
_RELUS = (nn.ReLU, functional.relu, torch.relu, torch.relu_, "relu", "relu_")
_PURE_FUNCTIONS = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add)


class Tail(NamedTuple):
    """The nodes of a tail, in order; `dropped` are the drop paths, and one of `addition` and `relu`
    may be None.
    """

    gate: fx.Node
    dropped: tuple[fx.Node, ...]
    addition: fx.Node | None
    relu: fx.Node | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Those that there are."""
        end = (node for node in (self.addition, self.relu) if node is not None)
        return (self.gate, *self.dropped, *end)

    @property
    def x(self) -> fx.Node:
        """What the gate takes."""
        return self.gate.args[0]

    @property
    def shortcut(self) -> fx.Node | None:
        """What is added to the gate's output, if anything is."""
        if self.addition is None:
            return None
        operand = (self.gate, *self.dropped)[-1]
        (other,) = (argument for argument in self.addition.args if argument is not operand)
        return other


def find_tail(graph: fx.Graph, block: nn.Module, name: str) -> Tail:
    """The tail that begins with the gate called `name`, in the graph of a block.

    Raises:
        NotFusableError: there is none; the message says what is in the way.
    """
    gate = block._modules[name]
    calls = [node for node in graph.nodes if _module(node, block) is gate]
    if len(calls) != 1:
        raise NotFusableError(f"its block calls it {len(calls)} times")
    (call,) = calls
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], fx.Node):
        raise NotFusableError("its block calls it with other arguments than x")
    dropped: list[fx.Node] = []
    user = _only_user(call)
    while is_drop_path(_module(user, block)):
        dropped.append(user)
        user = _only_user(user)
    operand = (call, *dropped)[-1]
    if relu := _relu(operand, block):
        return Tail(call, tuple(dropped), None, relu)
    _expect_addition(user, operand, block)
    tail = Tail(call, tuple(dropped), user, _relu(user, block))
    _expect_movable(graph, block, tail)
    return tail


def tail_graph(tail: Tail) -> fx.Graph:
    """The tail by itself, a function of x and the shortcut (anything where none is added)."""
    graph = fx.Graph()
    copies = {tail.x: graph.placeholder("x")}
    shortcut = graph.placeholder("shortcut")
    for node in tail.nodes:
        if node is tail.addition:
            copies[tail.shortcut] = shortcut  # which may be x
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[tail.nodes[-1]])
    return graph


def replace_tail(graph: fx.Graph, tail: Tail, method: str) -> None:
    """Puts a call ``self.method(x, shortcut)`` in the tail's place, where its addition is."""
    with graph.inserting_before(tail.addition or tail.gate):
        call = graph.create_node("call_module", method, (tail.x, tail.shortcut))
    tail.nodes[-1].replace_all_uses_with(call)
    for node in reversed(tail.nodes):
        graph.erase_node(node)


def is_drop_path(module: nn.Module | None) -> bool:
    """Whether a module hands its input on in eval mode: an Identity, or timm's DropPath."""
    return type(module) is nn.Identity or _is_timms(module)


def drops(module: nn.Module) -> bool:
    """Whether a drop path would act now."""
    return _is_timms(module) and module.training and module.drop_prob != 0


def _is_timms(module: nn.Module | None) -> bool:
    return type(module) is getattr(sys.modules.get("timm.layers.drop"), "DropPath", None)


def _module(node: fx.Node, block: nn.Module) -> nn.Module | None:
    return block._modules[node.target] if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise NotFusableError(f"what {node.target} returns is used {len(node.users)} times")
    return next(iter(node.users))


def _expect_addition(node: fx.Node, operand: fx.Node, block: nn.Module) -> None:
    """`node` adds another tensor to `operand`, and changes none but that."""
    if node.target not in _ADDITIONS:
        raise NotFusableError(
            f"it is followed by {_text(node, block)}, neither by an addition nor by a ReLU"
        )
    others = [argument for argument in node.args if argument is not operand]
    if len(node.args) != 2 or node.kwargs or len(others) != 1 or not isinstance(others[0], fx.Node):
        raise NotFusableError("what is added behind it is not just another tensor")
    if node.target in _IN_PLACE and node.args[0] is not operand:
        raise NotFusableError("it is added to the shortcut in place")


def _text(node: fx.Node, block: nn.Module) -> str:
    module = _module(node, block)
    if module is not None:
        return f"{node.target}, a {type(module).__name__}"
    return (
        f"the {node.op}" if node.op == "output" else getattr(node.target, "__name__", node.target)
    )


def _relu(operand: fx.Node, block: nn.Module) -> fx.Node | None:
    """The ReLU, in place or not, that alone takes `operand`; None if there is none."""
    if len(operand.users) != 1:
        return None
    (node,) = operand.users
    module = _module(node, block)
    options = (*node.args[1:], *node.kwargs.values())
    plain = node.args[:1] == (operand,) and all(isinstance(option, bool) for option in options)
    is_relu = (node.target if module is None else type(module)) in _RELUS
    return node if plain and is_relu else None


def _expect_movable(graph: fx.Graph, block: nn.Module, tail: Tail) -> None:
    """Nothing that runs between gate and addition may change the gate's input."""
    sharing = _may_share_memory(tail.x, block, tail)
    nodes = list(graph.nodes)
    for node in nodes[nodes.index(tail.gate) : nodes.index(tail.addition)]:
        touches = not sharing.isdisjoint(node.all_input_nodes)
        if touches and not _is_pure(node, block) and node not in tail.nodes:
            raise NotFusableError(
                f"{_text(node, block)}, runs before the addition and may change its input"
            )


def _may_share_memory(x: fx.Node, block: nn.Module, tail: Tail) -> set[fx.Node]:
    """x and every node that may be a view of the same memory."""

    def hands_on(node: fx.Node) -> bool:
        return node.op != "output" and node not in tail.nodes and not _is_pure(node, block)

    found, new = set(), {x}
    while new:
        found |= new
        users = {user for node in new for user in node.users if hands_on(user)}
        inputs = {source for node in new if hands_on(node) for source in node.all_input_nodes}
        new = (users | inputs) - found
    return found


def _is_pure(node: fx.Node, block: nn.Module) -> bool:
    if node.op == "call_function":
        return node.target in _PURE_FUNCTIONS and not node.kwargs
    return is_pure(_module(node, block))


def is_pure(module: nn.Module | None) -> bool:
    """Whether a module certainly leaves its input alone and returns memory of its own; a Sequential
    does if one of its `leading_layers` does.
    """
    layers = (module, *leading_layers(module).values())
    return any(type(x) in (nn.Conv2d, nn.AvgPool2d) or batch_norm_types(x) for x in layers)


def leading_layers(module: nn.Module | None) -> dict[str, nn.Module]:
    """The layers of a Sequential, by name, to the first that is no Identity; {} for others."""
    layers: dict[str, nn.Module] = {}
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, layer in module._modules.items():
            layers[name] = layer
            if type(layer) is not nn.Identity:
                break
    return layers
