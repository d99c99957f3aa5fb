"""Where a module keeps what the fused gate needs, and the cheap reading of it at every call.

A `GateSpec` names the layers of a gate by their paths. `make_plan` compiles it, with the module at
hand, into a table of every inner module; `collect` walks that table at each call and gathers the
arguments of `cbam_fused.cbam`. It finds what would make the fused result differ from running the
inner modules (a hook, a parametrised, replaced or reconfigured layer) and says so; the caller then
runs the inner modules instead.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from cbam_fused import checks
from cbam_fused.functional import cbam
from cbam_fused.reference import Norm
from cbam_fused.reference_gates import autocasts
from cbam_fused.schemas import POOL_TYPES
from cbam_fused.synchronised import Group, group_of

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


Kind = tuple[type, Callable | None]  # a class, and its forward


class InnerModule(NamedTuple):
    """One module inside a gate or a block, as it was when the plan was made.

    Attributes:
        parent: its parent's place, counted as in `Plan`.
        name, path: its name in the parent, and below the gate or block.
        cls, forward: its class and that one's forward; NoneType and None where there is no module.
        others: what it may become without changing the result.
        children: how many a container had: it runs whatever it contains. None for other classes.
        bypassed: the fused call stands for it, so that its hooks would not run.
    """

    parent: int
    name: str
    path: str
    cls: type
    forward: Callable | None
    others: tuple[Kind, ...]
    children: int | None
    bypassed: bool

    def __reduce__(self) -> tuple:
        """A pickle names the classes; their forwards are those of where it is loaded."""
        others = tuple(cls for cls, _ in self.others)
        return inner_module, (*self[:4], others, self.children, self.bypassed)


def inner_module(
    parent: int,
    name: str,
    path: str,
    cls: type,
    others: tuple[type, ...],
    children: int | None,
    bypassed: bool = True,
) -> InnerModule:
    """An `InnerModule`, with the forwards that its classes have now."""
    (_, forward), *kinds = ((c, getattr(c, "forward", None)) for c in (cls, *others))
    return InnerModule(parent, name, path, cls, forward, tuple(kinds), children, bypassed)


class Setting(NamedTuple):
    """An attribute of the module at `place` that its forward may read: a number, a text, or a tuple
    of them (where the attribute is a list, too); for a block also None, a function or a class.
    """

    place: int
    name: str
    value: Any


class Plan(NamedTuple):
    """A `GateSpec` compiled for one module: its inner modules, parents first, and its layers.

    A layer is given by its place among the inner modules, counted from 1 (0 is the gate itself);
    None where it does not exist.
    """

    inner: tuple[InnerModule, ...]
    settings: tuple[Setting, ...]
    hidden_layer: int | None
    output_layer: int
    conv: int | None
    norm: int | None
    pool: str
    maps: str
    ties: str


class Collected(NamedTuple):
    """What a gate holds of the arguments of `cbam_fused.cbam` for one call.

    Attributes:
        tensors: those of the layers in order, from ``mlp_weight1`` to ``conv_bias``; None where the
            inner modules must run.
        norm: the rest of the tensors, and what the norm does.
        counter: the norm's ``num_batches_tracked``, to be incremented once the call has succeeded,
            if it trains.
        group: of the processes over which the norm is synchronised, if it is.
        reason: why the inner modules must run.
    """

    tensors: tuple[Tensor | None, ...] | None
    norm: Norm = Norm()
    counter: Tensor | None = None
    group: Group | None = None
    reason: str = ""


# What the forward of a layer of PyTorch's reads, where that is not everything it was made with.
_SETTINGS = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.Linear: (),
    nn.ReLU: (),
}
_PLAIN = (bool, int, float, str)
EVERY_MODULE = frozenset(vars(nn.Module()))
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


def pool_of(pool_types: object) -> str | None:
    """The ``pool`` of `cbam_fused.cbam` that the authors' list of pool types asks for; None if it
    is no list of different ones.
    """
    if not isinstance(pool_types, (list, tuple)) or not set(pool_types) <= set(POOL_TYPES):
        return None
    try:
        return checks.canonical_pool("+".join(pool_types))
    except ValueError:
        return None


def make_plan(module: nn.Module, spec: GateSpec) -> Plan:
    """Compiles `spec` for `module`, whose inner modules are taken to be as they should.

    Raises:
        KeyError: a path of `spec` leads to no module.
    """
    inner: list[InnerModule] = []
    settings = [*_settings(module, 0)]
    places: dict[str | None, int | None] = {None: None}

    def visit(parent: nn.Module, place: int, prefix: str) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            path = prefix + name
            others = ()
            if path == spec.norm:
                others = batch_norm_types(child)
            elif place == places.get(spec.norm):  # conversion to a synchronised norm may drop it
                others = (type(None),)
            children = len(child._modules) if isinstance(child, nn.Sequential) else None
            inner.append(inner_module(place, name, path, type(child), others, children))
            places[path] = len(inner)
            if path != spec.norm:  # those of a norm are read at every call
                settings.extend(_settings(child, len(inner)))
            visit(child, len(inner), path + ".")

    visit(module, 0, "")
    layers = (places[path] for path in (spec.hidden_layer, spec.output_layer, spec.conv, spec.norm))
    return Plan(tuple(inner), tuple(settings), *layers, spec.pool, spec.maps, spec.ties)


def _settings(module: nn.Module, place: int) -> Iterator[Setting]:
    state = module.__dict__
    for name in _SETTINGS.get(type(module), [name for name in state if name not in EVERY_MODULE]):
        if is_plain(state[name]):
            yield Setting(place, name, frozen(state[name]))


def frozen(value: object) -> object:
    """The value that a `Setting` holds for an attribute: a tuple for a list."""
    return tuple(value) if type(value) is list else value


def is_plain(value: object) -> bool:
    """Whether an attribute is a number, a text, or a list or tuple of them."""
    if type(value) in (list, tuple):
        return all(type(item) in _PLAIN for item in value)
    return type(value) in _PLAIN


def call_fused(module: nn.Module, plan: Plan, x: Tensor, **epilogue: Any) -> Tensor | None:
    """The fused gate of `module` on x ``[N, C, H, W]``; None where its inner modules must run.

    Args:
        epilogue: ``residual`` and ``activation`` of `cbam_fused.cbam`.
    """
    tensors, norm, counter, group, _reason = collect(module, plan)
    if tensors is None:
        return None
    weight, bias, running_mean, running_var, batch_statistics, momentum, eps = norm
    if batch_statistics and isinstance(x, torch.fx.Proxy):
        return None
    y = cbam(
        x,
        *tensors,
        weight,
        bias,
        running_mean,
        running_var,
        batch_statistics=batch_statistics,
        process_group=group,
        momentum=momentum,
        eps=eps,
        pool=plan.pool,
        maps=plan.maps,
        ties=plan.ties,
        **epilogue,
    )
    if counter is not None:
        counter.add_(1)
    return y


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `cbam_fused.cbam`'s result for x: under autocast its dtype, but for float64."""
    if x.dtype != torch.float64 and autocasts(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def collect(module: nn.Module, plan: Plan) -> Collected:
    """The arguments of one call of `module`, or the reason why its inner modules must run."""
    if has_any_global_hook():
        return _refuse("hooks on all modules are registered")
    states, reason = inner_states(module, plan.inner, plan.settings)
    if reason:
        return _refuse(reason)

    tensors = []
    for place in (plan.hidden_layer, plan.output_layer, plan.conv):
        if place is None:
            tensors += (None, None)
            continue
        parameters = states[place]["_parameters"]
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:
            return _refuse(f"{plan.inner[place - 1].path} has no plain weight and bias")
        if is_wrapper(weight):
            return _refuse(f"{plan.inner[place - 1].path}.weight is a {type(weight).__name__}")
        tensors += (weight, parameters["bias"])

    if plan.norm is None:
        return Collected(tuple(tensors))
    parent, name, path = plan.inner[plan.norm - 1][:3]
    layer = states[parent]["_modules"][name]
    if "weight" not in layer._parameters or "running_mean" not in layer._buffers:
        return _refuse(f"{path} has no plain weight and running_mean")
    return Collected(tuple(tensors), *read_norm(layer), group_of(layer))


def inner_states(
    module: nn.Module, inner: tuple[InnerModule, ...], settings: tuple[Setting, ...]
) -> tuple[list[dict[str, Any]], str]:
    """The attributes (``__dict__``) of `module` and of its `inner` modules, and what of them is no
    longer as it was, or has hooks that would be bypassed; "" if nothing.
    """
    states = [module.__dict__]  # three times as fast as the attributes
    for parent, name, path, cls, forward, others, children, bypassed in inner:
        child = states[parent]["_modules"].get(name)
        same = type(child) is cls and (child is None or cls.forward is forward)
        if not same and (type(child), getattr(type(child), "forward", None)) not in others:
            return states, _replaced(path, child, cls)
        if child is None:
            states.append({})
            continue
        state = child.__dict__
        if bypassed and (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return states, f"{path} has hooks, or a forward set on the instance"
        if children is not None and len(state["_modules"]) != children:
            return states, f"{path} has {len(state['_modules'])} children, it had {children}"
        states.append(state)

    for place, name, expected in settings:
        value = states[place].get(name)
        if value is not expected and (not is_plain(value) or frozen(value) != expected):
            path = inner[place - 1].path + "." if place else ""
            return states, f"{path}{name} is {value!r}, it was {expected!r}"
    return states, ""


def _refuse(reason: str) -> Collected:
    return Collected(None, reason=reason)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor consists of others, as a DTensor or a quantised weight does."""
    kind = type(tensor)
    return kind is not nn.Parameter and kind is not Tensor and hasattr(kind, "__tensor_flatten__")


def _replaced(path: str, child: nn.Module | None, cls: type) -> str:
    if type(child) is cls:
        return f"the forward of {path}'s class, {cls.__name__}, was replaced"
    return f"{path} is a {full_name(type(child), cls)}, it was a {cls.__name__}"


def full_name(cls: type, other: type) -> str:
    """The name of a class, with its module if it is called like `other`: a quantised Linear is."""
    return cls.__name__ if cls.__name__ != other.__name__ else f"{cls.__module__}.{cls.__name__}"


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
