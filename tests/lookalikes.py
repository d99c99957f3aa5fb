"""Modules that look like a CBAM that `fuse_` knows, and are none: not one may be swapped."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers.cbam import CbamModule
from torch import nn
from torch.nn import functional

from tests import official


@dataclass(frozen=True)
class Lookalike:
    """How to make one, and a pattern of the reason it is skipped for."""

    name: str
    make: Callable[[], nn.Module]
    reason: str


def authors(*, forward=None, spatial=None, pooled=None) -> Callable[[], nn.Module]:
    """The authors' module with another forward: its own, its spatial gate's, its channel pool's."""

    def make() -> nn.Module:
        module = official.CBAM(32, 4)
        changes = {
            "": forward,
            "SpatialGate": spatial,
            "SpatialGate.compress": pooled,
        }
        for path, method in changes.items():
            if method is not None:
                part = module.get_submodule(path)
                part.__class__ = type(type(part).__name__, (type(part),), {"forward": method})
        return module

    return make


def changed(change: Callable[[nn.Module], None], base: Callable[[], nn.Module] | None = None):
    """A genuine module (the authors', by default) to which `change` was done."""

    def make() -> nn.Module:
        module = official.CBAM(32, 4) if base is None else base()
        change(module)
        return module

    return make


def replaced(path: str, *arguments, base: Callable[[], nn.Module] | None = None):
    """A genuine module whose child at `path` was replaced."""
    return changed(lambda module: module.set_submodule(path, *arguments), base)


def _returns_the_map(self, x):
    return torch.sigmoid(self.spatial(self.compress(x)))


def _returns_a_pair(self, x):
    return official.CBAM.forward(self, x), x


def _adds_x(self, x):
    return official.CBAM.forward(self, x) + x


def _other_order_of_gates(self, x):
    return self.ChannelGate(self.SpatialGate(x))


def _only_in_training(self, x):
    return official.CBAM.forward(self, x) if self.training else x


def _drops_out(self, x):
    return functional.dropout(official.CBAM.forward(self, x), 0.1, self.training)


def _changes_its_input(self, x):
    return official.CBAM.forward(self, x.mul_(2))


def _stops_the_gradient(self, x):
    return x * official.CBAM.forward(self, x).detach()


def _runs_its_norm_twice(self, x):
    official.CBAM.forward(self, x)
    return official.CBAM.forward(self, x)


def _takes_a_mask(self, x, mask=None):
    return official.CBAM.forward(self, x)


def _fails(self, x):
    raise LookupError("no such gate")


def _hard_sigmoid(self, x):
    return x * functional.hardsigmoid(self.spatial(self.compress(x)))


def _maps(self, x):
    return torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)


def _even_ties(self, x):
    return torch.cat((x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)), dim=1)


def _extra_parameter(module):
    module.ChannelGate.gamma = nn.Parameter(torch.zeros(1))


def _extra_child(module):
    module.SpatialGate.drop = nn.Dropout()


def _own_forward(module):
    module.forward = lambda x: x


def _parametrised(module):
    nn.utils.parametrizations.weight_norm(module.ChannelGate.mlp[1])


def _pool_types(*types):
    return changed(lambda module: setattr(module.ChannelGate, "pool_types", list(types)))


def _integer_weights(module):
    weight = torch.zeros(8, 32, dtype=torch.int8)
    module.ChannelGate.mlp[1].weight = nn.Parameter(weight, requires_grad=False)


class NamedOnly(nn.Module):
    """A CBAM by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


NamedOnly.__name__ = "CBAM"


class TimmSubclass(CbamModule):
    def forward(self, x):
        return super().forward(x) + x


def _timm(**options) -> Callable[[], nn.Module]:
    return lambda: CbamModule(32, **options)


DIFFERS = (
    "^its own forward computes something else: the .* error .* > bound |counter of .* differs$"
)

LOOKALIKES = [
    Lookalike("returns_the_map", authors(spatial=_returns_the_map), r"^its own forward returns \["),
    Lookalike(
        "returns_a_pair", authors(forward=_returns_a_pair), "^its own forward returns a tuple"
    ),
    Lookalike("adds_x", authors(forward=_adds_x), DIFFERS),
    Lookalike("gates_in_another_order", authors(forward=_other_order_of_gates), DIFFERS),
    Lookalike("only_in_training", authors(forward=_only_in_training), "^only one of its own"),
    Lookalike("drops_out", authors(forward=_drops_out), "^its own forward draws random numbers$"),
    Lookalike("stops_the_gradient", authors(forward=_stops_the_gradient), "^only one of its own"),
    Lookalike(
        "changes_its_input", authors(forward=_changes_its_input), "^its own forward failed: "
    ),
    Lookalike("runs_its_norm_twice", authors(forward=_runs_its_norm_twice), DIFFERS),
    Lookalike("fails", authors(forward=_fails), "failed: LookupError: .*no such gate"),
    Lookalike("takes_a_mask", authors(forward=_takes_a_mask), r"takes \(self, x, mask=None\), not"),
    Lookalike("hard_sigmoid", authors(spatial=_hard_sigmoid), DIFFERS),
    Lookalike("maps", authors(pooled=_maps), DIFFERS),
    Lookalike("even_ties", authors(pooled=_even_ties), DIFFERS),
    Lookalike("own_forward", changed(_own_forward), "^it has a forward of its own, set on"),
    Lookalike("extra_parameter", changed(_extra_parameter), "tensors of its own: gamma$"),
    Lookalike("extra_child", changed(_extra_child), "children compress, spatial, drop, not "),
    Lookalike(
        "parametrised", changed(_parametrised), "mlp.1 is a ParametrizedLinear, not a Linear$"
    ),
    Lookalike(
        "old_spectral_norm",
        changed(lambda m: nn.utils.spectral_norm(m.ChannelGate.mlp[1])),
        "mlp.1 has no plain weight and bias$",
    ),
    Lookalike("integer_weights", changed(_integer_weights), "is a Parameter in int8, not a "),
    Lookalike("two_devices", changed(lambda m: m.SpatialGate.to("meta")), "devices: cpu, meta$"),
    Lookalike(
        "pool_twice", _pool_types("avg", "avg"), r"pool_types must be a list of different ones of "
    ),
    Lookalike("pool_unknown", _pool_types("avg", "median"), r"it is \['avg', 'median'\]$"),
    Lookalike("pool_none", _pool_types(), r"pool_types must be a list .*; it is \[\]$"),
    Lookalike("gelu", replaced("ChannelGate.mlp.2", nn.GELU()), "mlp.2 is a GELU, not a ReLU$"),
    Lookalike(
        "dilated",
        replaced("SpatialGate.spatial.conv", nn.Conv2d(2, 1, 7, padding=6, dilation=2, bias=False)),
        "not a k x k convolution, 2 to 1",
    ),
    Lookalike(
        "reflected",
        replaced("SpatialGate.spatial.conv", nn.Conv2d(2, 1, 7, padding=3, padding_mode="reflect")),
        "that keeps the size",
    ),
    Lookalike(
        "instance_norm",
        replaced("SpatialGate.spatial.bn", nn.InstanceNorm2d(1)),
        "bn is a InstanceNorm2d, not a batch norm$",
    ),
    Lookalike(
        "no_layers",
        replaced("ChannelGate.mlp", nn.Sequential(nn.Flatten())),
        "ChannelGate.mlp has the children 0, not 0, 1, 2, 3$",
    ),
    Lookalike("named_only", NamedOnly, "^no adapter knows this implementation$"),
    Lookalike("timm_subclass", lambda: TimmSubclass(32), "another forward than CbamModule$"),
    Lookalike("timm_silu", _timm(act_layer=nn.SiLU), "channel.act is a SiLU, not a ReLU$"),
    Lookalike(
        "timm_gate", _timm(gate_layer="hard_sigmoid"), "gate is a Hardsigmoid, not a Sigmoid$"
    ),
    Lookalike(
        "timm_grouped",
        replaced("channel.fc1", nn.Conv2d(32, 2, 1, groups=2), base=_timm()),
        "channel.fc1 is not a plain 1x1 convolution",
    ),
    Lookalike(
        "timm_activation",
        replaced("spatial.conv.bn.act", nn.ReLU(), base=_timm()),
        "spatial.conv.bn.act is a ReLU, not an Identity$",
    ),
    Lookalike(
        "timm_dropout",
        replaced("spatial.conv.bn.drop", nn.Dropout(), base=_timm()),
        "spatial.conv.bn.drop is a Dropout, not an Identity$",
    ),
]
