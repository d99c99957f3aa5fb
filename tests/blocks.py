"""Residual blocks around a gate, with an epilogue or what only looks like one, and their calls."""

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from timm.layers import DropPath
from timm.layers.cbam import CbamModule
from timm.models.resnet import BasicBlock
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import cbam_fused
from tests import official
from tests.gates import train_step

C = 16
SHAPE = (2, C, 5, 6)


class Block(nn.Module):
    """Convolution, norm, gate, shortcut, ReLU, as in torchvision's blocks; x [N, 16, H, W].

    A subclass says how gate and shortcut are put together.
    """

    def __init__(self, gate=official.CBAM, project=False):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.gate = gate(C, 4) if gate is official.CBAM else gate(C)
        self.project = (
            nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)) if project else None
        )

    def main(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        shortcut = x
        y = self.gate(self.main(x))
        if self.project is not None:
            shortcut = self.project(x)
        y += shortcut
        return self.relu(y)


def block(forward, base=Block, **attributes):
    """Makes a block with another forward; `attributes` make its own, each called without
    arguments.
    """

    def make() -> nn.Module:
        made = type("Block", (base,), {"forward": forward})()
        for name, value in attributes.items():
            setattr(made, name, value())
        return made

    return make


class Unit(nn.Module):
    """As in pytorchcv: a flag says whether the shortcut, computed first, is projected."""

    def __init__(self):
        super().__init__()
        self.resize_identity = True
        self.identity_conv = nn.Conv2d(C, C, 1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 1), nn.ReLU())
        self.cbam = official.CBAM(C, 4)
        self.activ = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = self.identity_conv(x) if self.resize_identity else x
        x = self.cbam(self.body(x))
        x = x + identity
        return self.activ(x)


@dataclass(frozen=True)
class Fusable:
    name: str
    make: Callable[[], nn.Module]
    epilogue: str = "add + relu"


def timm_block(**options) -> nn.Module:
    made = BasicBlock(C, C, attn_layer=CbamModule, **options)
    nn.init.normal_(made.bn2.weight)
    return made


def _two_gates(self, x):
    y = functional.relu(self.gate(self.main(x)) + x)
    return functional.relu(self.other(y) + y)


def _sum_used_twice(self, x):
    y = self.gate(self.main(x)) + x
    return self.relu(y) + y


FUSABLE = [
    Fusable("timm", timm_block),
    Fusable("timm_drop_path", lambda: timm_block(drop_path=DropPath(0.0))),
    Fusable("identity", Block),
    Fusable("projected", partial(Block, project=True)),
    Fusable("unit", Unit),
    Fusable("our_own_gate", partial(Block, gate=cbam_fused.CBAM)),
    Fusable("gate_of_x", block(lambda self, x: self.relu(x + self.gate(x)))),
    Fusable("function", block(lambda self, x: functional.relu(self.gate(self.main(x)) + x, True))),
    Fusable("torch_function", block(lambda self, x: torch.relu(torch.add(x, self.gate(x))))),
    Fusable("methods", block(lambda self, x: self.gate(x).add_(self.main(x)).relu_())),
    Fusable(
        "identity_between",
        block(lambda self, x: self.relu(self.keep(self.gate(x)) + x), keep=nn.Identity),
    ),
    Fusable(
        "parameter",
        block(
            lambda self, x: self.relu(self.gate(x) + self.scale * x),
            scale=lambda: nn.Parameter(torch.rand(C, 1, 1)),
        ),
    ),
    Fusable("two_gates", block(_two_gates, other=lambda: official.CBAM(C, 4))),
    Fusable("relu_first", block(lambda self, x: self.relu(self.gate(x)) + x), "relu"),
    Fusable(
        "dropped_relu",
        block(
            lambda self, x: self.drop(self.gate(self.main(x))).relu(), drop=lambda: DropPath(0.0)
        ),
        "relu",
    ),
    Fusable("sum_returned", block(lambda self, x: x + self.gate(self.main(x))), "add"),
    Fusable("gelu", block(lambda self, x: functional.gelu(self.gate(x) + x)), "add"),
    Fusable("relu6", block(lambda self, x: functional.relu6(self.gate(x) + x)), "add"),
    Fusable("clamped", block(lambda self, x: torch.clamp(self.gate(x) + x, 0, 1)), "add"),
    Fusable("sum_used_twice", block(_sum_used_twice), "add"),
]


@dataclass(frozen=True)
class Unfusable:
    """How to make one, and a pattern of the reason why its gate is fused alone."""

    name: str
    make: Callable[[], nn.Module]
    reason: str


def _to_itself(self, x):
    y = self.gate(x)
    return self.relu(y + y)


def _gate_used_twice(self, x):
    y = self.gate(x)
    return self.relu(y + x) * y.mean()


def _added_in_place_to_the_shortcut(self, x):
    shortcut = self.conv(x)
    shortcut += self.gate(x)
    return self.relu(shortcut)


def _changed_in_between(self, x):
    z = self.main(x)
    y = self.gate(z)
    return self.relu(y + z.mul_(2))


def _changed_in_between_by_a_child(self, x):
    z = self.main(x)
    y = self.gate(z)
    return self.relu(y + self.relu(z))


def _changed_by_way_of_a_view(self, x):
    z = self.main(x)
    view = z[:]
    y = self.gate(z)
    return self.relu(y + self.other(view))


def _without_gradients(self, x):
    with torch.no_grad():
        z = self.conv(x)
    return self.relu(self.gate(z) + x)


def _without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        z = self.conv(x)
    return self.relu(self.gate(z) + x)


def _remembers(self, x):
    self.last = self.gate(x)
    return self.relu(self.last + x)


def _counts_in_a_child(self, x):
    self.conv.calls = 1
    return self.relu(self.gate(x) + x)


def _branches_on_x(self, x):
    return self.relu(self.gate(x) + x) if x.sum() > 0 else x


def _trains_otherwise(self, x):
    y = self.gate(x)
    return self.relu(y + x) if self.training else self.relu(y)


def _drops_by_chance(draw):
    return lambda self, x: self.relu(self.gate(x) + x) if draw() < 2 else x


def _checkpoints(self, x):
    z = checkpoint(self.conv, x, use_reentrant=False)
    return self.relu(self.gate(z) + x)


def _without_a_parameter(self, x):
    return self.relu(self.gate(x) + x) if self.scale is None else x


def _without_a_bias(self, x):
    return self.relu(self.gate(x) + x) if self.conv.bias is None else x


def _reads_a_child(self, x):
    return self.relu(self.gate(x) + x) if self.conv.stride == (1, 1) else x


def _reads_a_dict(self, x):
    return self.relu(self.gate(x) + x) if self.options["add"] else x


def _another_argument(self, x, add=True):
    return self.relu(self.gate(x) + x) if add else x


def scaleless_block():
    made = block(_without_a_parameter)()
    made.register_parameter("scale", None)
    return made


UNFUSABLE = [
    Unfusable("in_a_sequential", lambda: nn.Sequential(official.CBAM(C, 4)), r"takes \(self, inp"),
    Unfusable("nothing_behind", block(lambda self, x: self.gate(x)), "by the output, neither by"),
    Unfusable(
        "relu6_alone", block(lambda self, x: functional.relu6(self.gate(x))), "by relu6, neither"
    ),
    Unfusable("subtracted", block(lambda self, x: self.relu(self.gate(x) - x)), "by sub, neither"),
    Unfusable("constant", block(lambda self, x: self.relu(self.gate(x) + 1)), "another tensor"),
    Unfusable(
        "alpha", block(lambda self, x: torch.add(self.gate(x), x, alpha=2)), "another tensor$"
    ),
    Unfusable("to_itself", block(_to_itself), "what is added behind it is not just"),
    Unfusable("used_twice", block(_gate_used_twice), "what gate returns is used 2 times"),
    Unfusable("called_twice", block(lambda self, x: self.gate(self.gate(x)) + x), "it 2 times"),
    Unfusable("never_called", block(lambda self, x: self.relu(self.conv(x) + x)), "calls it 0 tim"),
    Unfusable(
        "keyword", block(lambda self, x: self.relu(self.gate(x=x) + x)), "other arguments than x"
    ),
    Unfusable(
        "dropout",
        block(lambda self, x: self.relu(self.drop(self.gate(x)) + x), drop=nn.Dropout),
        "followed by drop, a Dropout",
    ),
    Unfusable(
        "shape_between",
        block(lambda self, x: self.relu(self.gate(x).flatten(2) + x.flatten(2))),
        "followed by flatten",
    ),
    Unfusable("shortcut_changed", block(_added_in_place_to_the_shortcut), "shortcut in place"),
    Unfusable("input_changed", block(_changed_in_between), "mul_, runs before the addition"),
    Unfusable("input_changed_by_child", block(_changed_in_between_by_a_child), "relu, a ReLU, run"),
    Unfusable(
        "view_changed",
        block(_changed_by_way_of_a_view, other=lambda: nn.ReLU(inplace=True)),
        "other, a ReLU, runs before",
    ),
    Unfusable("no_grad", block(_without_gradients), "block: its forward switches autocast, grad"),
    Unfusable("no_autocast", block(_without_autocast), "its forward switches autocast, gradients"),
    Unfusable("remembers", block(_remembers), "its forward sets last$"),
    Unfusable("sets_in_child", block(_counts_in_a_child), r"its forward sets conv\.calls$"),
    Unfusable("branches", block(_branches_on_x), "torch.fx cannot trace it: TraceError: symbolic"),
    Unfusable("trains_otherwise", block(_trains_otherwise), "another in training than in eval"),
    Unfusable("chance", block(_drops_by_chance(lambda: torch.rand(1))), "draws random numbers$"),
    Unfusable("chance_python", block(_drops_by_chance(random.random)), "draws random numbers$"),
    Unfusable("chance_numpy", block(_drops_by_chance(numpy.random.rand)), "draws random numbers$"),
    Unfusable("checkpoints", block(_checkpoints), "autocast, gradients or checkpointing$"),
    Unfusable("no_parameter", scaleless_block, "its forward reads scale, which is no tensor$"),
    Unfusable("no_bias", block(_without_a_bias), r"its forward reads conv\.bias$"),
    Unfusable("reads_a_child", block(_reads_a_child), r"its forward reads conv\.stride$"),
    Unfusable(
        "reads_a_dict",
        block(_reads_a_dict, options=lambda: {"add": True}),
        "its forward reads options, a dict$",
    ),
    Unfusable(
        "makes_a_tensor",
        block(lambda self, x: self.relu(self.gate(x * torch.ones(1)) + x)),
        "uses a tensor that is no parameter",
    ),
    Unfusable(
        "inner_call",
        block(
            lambda self, x: self.relu(self.gate(self.layers[0](x)) + x),
            layers=lambda: nn.ModuleList([nn.Conv2d(C, C, 1)]),
        ),
        "its forward calls a Conv2d that is no child",
    ),
    Unfusable("argument", block(_another_argument), r"forward takes \(self, x, add=True\), not"),
]


def _branching(self, x):
    y = self.gate(self.main(x))
    if hasattr(self, "bias"):
        y = y + self.bias
    if self.sizes[0] > 1 and self.mode != "off":
        y = self.function(y + x)
    return self.rest(y)


def _rest(self, y):
    return y


def branching_block():
    module = block(_branching)()
    type(module).rest = _rest
    module.sizes, module.mode, module.function = [2, 3], "on", torch.relu
    return module


@contextlib.contextmanager
def watched():
    """The options of every call of the fused gate: with a residual, with which activation."""
    calls, own = [], cbam_fused.plan.cbam

    def cbam(*arguments, residual=None, activation="none", **options):
        calls.append((residual is not None, activation))
        return own(*arguments, residual=residual, activation=activation, **options)

    cbam_fused.plan.cbam = cbam
    try:
        yield calls
    finally:
        cbam_fused.plan.cbam = own


def runs_fused(module, x=None):
    """Whether a call takes shortcut and activation along into the fused gate."""
    with watched() as calls:
        module(torch.randn(SHAPE) if x is None else x)
    return any(residual for residual, _ in calls)


def step(module, x):
    """`train_step` with the gradient of x; x itself must stay."""
    leaf = x.clone().requires_grad_()
    results = train_step(module, leaf) | {"gradient of x": leaf.grad}
    assert torch.equal(leaf, x)
    return results
