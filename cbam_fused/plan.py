"""Where a module keeps what the fused gate needs, and the cheap reading of it at every call.

A `GateSpec` names the layers of a gate by their paths. `make_plan` compiles it, with the module at
hand, into a table of every inner module; `collect` walks that table at each call and gathers the
arguments of `cbam_fused.cbam`. It finds what would make the fused result differ from running the
inner modules (a hook, a parametrised or replaced layer, a synchronised norm) and says so; the
caller then runs the inner modules instead.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbam_fused.functional import cbam
from cbam_fused.reference import Norm

torch.fx.wrap("cbam")


@dataclass(frozen=True)
class GateSpec:
    """A gate's layers, as paths of children below the module (``"channel.fc1"``), and its options.

    Attributes:
        hidden_layer: first layer of the MLP (Linear or 1x1 convolution); None: there is only the
            output layer.
        output_layer: last layer of the MLP.
        conv: convolution of the spatial gate; None: there is no spatial gate.
        norm: batch norm behind it, or None.
        pool, maps, ties: as in `cbam_fused.cbam`.
    """

    hidden_layer: str | None
    output_layer: str
    conv: str | None
    norm: str | None
    pool: str
    maps: str
    ties: str


class InnerModule(NamedTuple):
    """One module inside a gate, as it was when the plan was made."""

    parent: int
    name: str
    path: str
    types: tuple[type, ...]
    children: int | None  # of a Sequential, which runs whatever it contains


class Plan(NamedTuple):
    """A `GateSpec` compiled for one module: its inner modules, parents first, and its layers.

    A layer is given by its place among the inner modules, counted from 1 (0 is the gate itself);
    None where it does not exist.
    """

    inner: tuple[InnerModule, ...]
    hidden_layer: int | None
    output_layer: int
    conv: int | None
    norm: int | None
    pool: str
    maps: str
    ties: str


class Collected(NamedTuple):
    """The keyword arguments of `cbam_fused.cbam` for one call (all but x), or None and the reason.

    ``counter`` is the norm's ``num_batches_tracked``, to be incremented once the call has
    succeeded, if it trains.
    """

    arguments: dict[str, Any] | None
    counter: Tensor | None = None
    reason: str = ""


_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def batch_norm_types(norm: nn.Module) -> tuple[type, ...]:
    """The classes that a batch norm in the place of `norm` may have; () if `norm` is no batch norm.

    Besides PyTorch's own two these are timm's batch norms that end in an activation, which is an
    Identity in a gate.
    """
    if type(norm) in _BATCH_NORMS:
        return _BATCH_NORMS
    timm = sys.modules.get("timm.layers.norm_act")
    names = ("BatchNormAct2d", "SyncBatchNormAct")
    known = tuple(getattr(timm, name) for name in names if hasattr(timm, name))
    return (*_BATCH_NORMS, *known) if type(norm) in known else ()


def make_plan(module: nn.Module, spec: GateSpec) -> Plan:
    """Compiles `spec` for `module`, whose inner modules are taken to be as they should.

    Raises:
        KeyError: a path of `spec` leads to no module.
    """
    inner: list[InnerModule] = []
    places: dict[str | None, int | None] = {None: None}

    def visit(parent: nn.Module, place: int, prefix: str) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            path = prefix + name
            types = batch_norm_types(child) if path == spec.norm else (type(child),)
            children = len(child._modules) if isinstance(child, nn.Sequential) else None
            inner.append(InnerModule(place, name, path, types, children))
            places[path] = len(inner)
            if path != spec.norm:  # conversion to a synchronised one may drop its children
                visit(child, len(inner), path + ".")

    visit(module, 0, "")
    layers = (places[path] for path in (spec.hidden_layer, spec.output_layer, spec.conv, spec.norm))
    return Plan(tuple(inner), *layers, spec.pool, spec.maps, spec.ties)


def call_fused(module: nn.Module, plan: Plan, x: Tensor, **epilogue: Any) -> Tensor | None:
    """The fused gate of `module` on x ``[N, C, H, W]``; None where its inner modules must run.

    Args:
        epilogue: ``residual`` and ``activation`` of `cbam_fused.cbam`.
    """
    arguments, counter, _reason = collect(module, plan)
    if arguments is None or (arguments["batch_statistics"] and isinstance(x, torch.fx.Proxy)):
        return None
    y = cbam(x, **arguments, **epilogue)
    if counter is not None:
        counter.add_(1)
    return y


def collect(module: nn.Module, plan: Plan) -> Collected:
    """The arguments of one call of `module`, or the reason why its inner modules must run."""
    found = [module]
    for parent, name, path, types, children in plan.inner:
        child = found[parent]._modules.get(name)
        if type(child) not in types:
            return _refuse(f"{path} is a {type(child).__name__}, it was a {types[0].__name__}")
        state = child.__dict__  # three times as fast as the attributes
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return _refuse(f"{path} has hooks, or a forward set on the instance")
        if children is not None and len(child._modules) != children:
            return _refuse(f"{path} has {len(child._modules)} children, it had {children}")
        found.append(child)

    tensors = []
    for place in (plan.hidden_layer, plan.output_layer, plan.conv):
        if place is None:
            tensors += (None, None)
            continue
        parameters = found[place]._parameters
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:
            return _refuse(f"{plan.inner[place - 1].path} has no plain weight and bias")
        tensors += (weight, parameters["bias"])

    norm, counter = Norm(), None
    if plan.norm is not None:
        layer = found[plan.norm]
        path = plan.inner[plan.norm - 1].path
        if obstacle := _norm_obstacle(layer):
            return _refuse(f"{path} {obstacle}")
        norm, counter = read_norm(layer)
    weight1, bias1, weight2, bias2, conv_weight, conv_bias = tensors
    arguments = {
        "mlp_weight1": weight1,
        "mlp_bias1": bias1,
        "mlp_weight2": weight2,
        "mlp_bias2": bias2,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "batch_statistics": norm.batch_statistics,
        "momentum": norm.momentum,
        "eps": norm.eps,
        "pool": plan.pool,
        "maps": plan.maps,
        "ties": plan.ties,
    }
    return Collected(arguments, counter)


def _refuse(reason: str) -> Collected:
    return Collected(None, None, reason)


def _norm_obstacle(norm: nn.Module) -> str:
    for name, child in norm._modules.items():
        if type(child) is not nn.Identity or child._forward_hooks or child._forward_pre_hooks:
            return f"has a {name} that is a {type(child).__name__} or has hooks"
    if "weight" not in norm._parameters or "running_mean" not in norm._buffers:
        return "has no plain weight and running_mean"
    synchronised = (
        norm.training
        and isinstance(norm, nn.SyncBatchNorm)
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    )
    return "is synchronised over processes" if synchronised else ""


def read_norm(norm: nn.Module) -> tuple[Norm, Tensor | None]:
    """What a call of the batch norm `norm` would do, and its counter if it counts this batch.

    As BatchNorm2d: the batch's statistics in training mode, or where no running ones are kept;
    ``momentum=None`` makes the running statistics a plain average over all batches counted.
    """
    parameters, buffers = norm._parameters, norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    batch_statistics = norm.training or (mean is None and var is None)
    momentum, counter = norm.momentum or 0.0, None
    if norm.training and norm.track_running_stats:
        counter = buffers["num_batches_tracked"]
        if norm.momentum is None and counter is not None:
            momentum = 1.0 / (float(counter) + 1.0)
    elif norm.training:
        mean = var = None
    weight, bias = parameters["weight"], parameters["bias"]
    return Norm(weight, bias, mean, var, batch_statistics, momentum, norm.eps), counter
