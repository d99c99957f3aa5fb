"""`fuse_` and `unfuse_`: find the gates of a model, swap those proven equal, report on all."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from cbam_fused import backends
from cbam_fused.fuse import report
from cbam_fused.fuse.adapters import Adapter, NotFusableError, claiming
from cbam_fused.fuse.adapters.layers import (
    expect_layers,
    expect_own_signature,
    expect_parameters,
)
from cbam_fused.fuse.blocks import block_fusion_of
from cbam_fused.fuse.candidates import layers_of_a_gate
from cbam_fused.fuse.epilogues import Epilogues
from cbam_fused.fuse.gates import fused_class
from cbam_fused.fuse.report import FuseReport, GateReport
from cbam_fused.fuse.swap import (
    Fusion,
    fusion_of,
    is_swapped_again,
    set_classes,
)
from cbam_fused.fuse.verify import verify
from cbam_fused.modules import CBAM
from cbam_fused.plan import GateSpec, Plan, collect, make_plan

_NAMED_AS_GATE = re.compile(r"(light_?)?cbam_?(module|block|layer|attention)?", re.IGNORECASE)


def fuse_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    strict: bool = False,
    verify: bool = True,
    epilogue: bool = True,
) -> FuseReport:
    """Makes the CBAM gates of `model` fused ones, in place.

    Known are the CBAM of timm, ultralytics, pytorchcv and mmyolo, and those of the authors
    (Jongchan/attention-module) and of bubbliiiing wherever they were pasted; `register_adapter`
    teaches another. A module that none knows, with the layers of a CBAM, is reported as a candidate
    and left alone. A gate keeps its parameters, buffers, hooks, names, state_dict and repr, and
    `isinstance` still holds: only its class becomes a subclass whose forward is `cbam_fused.cbam`.
    The gate runs its inner modules as before while one of them has a hook, is parametrised, or was
    replaced or reconfigured, and while hooks on all modules are registered. A batch norm that was
    converted to a SyncBatchNorm is synchronised as ever. A gate that was saved fused is compared
    again where it is loaded. Under autocast the result is in the
    autocast dtype, either way, unless x is float64. torch.jit.script of a fused model is not
    supported.

    Args:
        model: any module; it may itself be a gate.
        filter_fn: ``filter_fn(module, name) -> bool``, asked for each gate (for each of its names
            until one is accepted, if it is shared); only accepted ones are fused. Default: all.
        strict: raise if a gate cannot be fused or a candidate is not filtered out, or if there is
            no gate.
        verify: compare every gate with its own forward before it is swapped: forward and backward,
            in training and eval mode, on small random inputs. A gate that differs by more than
            rounding is skipped. On the meta device there is nothing to compare: gates are fused
            without, and the report says so. With its epilogue a gate is compared once for each
            class of blocks that is made.
        epilogue: fuse the additions and ReLUs behind the gates, too.

    Returns:
        A report: what was fused, what was skipped and why, and the same of what follows each gate.
            It can be printed, also with rich, and has ``to_dict()``.

    Raises:
        TypeError: model is not a module.
        RuntimeError: with ``strict``, as said.

    Whatever is raised, the model is as it was.
    """
    expect_module("fuse_", model)
    rows: list[GateReport] = []
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    epilogues = Epilogues(model, verify)
    for module, paths, adapter in _gates(model):
        row, cls = _examine(module, paths, adapter, filter_fn, verify)
        if cls is not None:
            swaps.append((module, cls))
        if epilogue and row.status in (report.FUSED, report.ALREADY_FUSED):
            row = replace(row, **epilogues.examine(module, paths, cls or type(module)))
        rows.append(row)
    swaps += epilogues.swaps
    result = FuseReport(tuple(rows))
    if strict:
        _raise_if_incomplete(result)
    set_classes(swaps)
    return result


def unfuse_(model: nn.Module) -> list[str]:
    """Gives every gate that `fuse_` fused, and the block around it, its own class back.

    The model is then exactly as before.

    Returns:
        The names of the gates restored; empty if there were none.

    Raises:
        TypeError: model is not a module.
        RuntimeError: the class of a fused gate or block was swapped again, for a subclass of the
            fused one (as FSDP2 does); nothing was changed.
    """
    expect_module("unfuse_", model)
    found = [(name, m, fusion_of(m)) for name, m in model.named_modules()]
    gates = [name for name, _, fusion in found if fusion]
    found += [(name, m, block_fusion_of(m)) for name, m in model.named_modules()]
    fused = [(name, module, fusion) for name, module, fusion in found if fusion]
    for name, module, _ in fused:
        if is_swapped_again(module):
            raise RuntimeError(
                f"unfuse_: the class of {name or 'the model'} was swapped again after fuse_, for "
                f"{type(module).__name__}; undo that first; nothing was changed"
            )
    set_classes([(module, fusion.base) for _, module, fusion in fused])
    return gates


def expect_module(function: str, model: object) -> None:
    """Raises TypeError, in the name of `function`, unless `model` is a module."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"{function}: model must be a torch.nn.Module; got {got}")


def _gates(model: nn.Module) -> Iterator[tuple[nn.Module, list[str], Adapter | None]]:
    """Every module that is, looks like or is called a gate; its names; the adapter claiming it."""
    names: dict[int, list[str]] = {}
    inside: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for module in model.modules():
        adapter = None if _is_fused(module) else claiming(module)
        if adapter or _is_fused(module):
            inside.update(map(id, module.modules()))
        elif id(module) in inside or not _is_unknown_gate(module):
            continue
        yield module, names[id(module)], adapter


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, CBAM) or fusion_of(module) is not None


def _is_unknown_gate(module: nn.Module) -> bool:
    """Whether `module` has the layers or the name of a gate, and what is inside it has not."""
    if not layers_of_a_gate(module) and not _NAMED_AS_GATE.fullmatch(type(module).__name__):
        return False
    return not any(
        _is_fused(inner) or claiming(inner) or layers_of_a_gate(inner)
        for inner in module.modules()
        if inner is not module
    )


def _examine(
    module: nn.Module,
    paths: list[str],
    adapter: Adapter | None,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    verified: bool,
) -> tuple[GateReport, type[nn.Module] | None]:
    """The row of one gate, and the class it shall have, if it can be fused (and, where it has to be
    `verified`, is equal).
    """
    row = {"paths": tuple(paths), "class_name": type(module).__name__}
    if _is_fused(module):
        fusion = fusion_of(module)
        name, plan = (fusion.adapter, fusion.plan) if fusion else ("cbam_fused", module._plan)
        row |= {"adapter": name, "reason": _remark(module, plan), **_found(module, plan)}
        return GateReport(status=report.ALREADY_FUSED, **row), None
    if filter_fn is not None and not any(filter_fn(module, path) for path in paths):
        return GateReport(status=report.FILTERED, **row), None
    if adapter is None:
        reason = "no adapter knows this implementation"
        if seen := layers_of_a_gate(module):
            reason = f"it has {seen}, but {reason}; cbam_fused.register_adapter can teach it"
            return GateReport(status=report.CANDIDATE, reason=reason, **row), None
        return GateReport(status=report.SKIPPED, reason=reason, **row), None

    row["adapter"] = adapter.name
    try:
        fusion = _fusion(module, adapter)
        row |= _found(module, fusion.plan)
        if not verified:
            row["reason"] = "not verified, as asked"
        elif next(module.parameters()).is_meta:
            row["reason"] = "not verified: its parameters are on the meta device"
        else:
            worst = verify(module, fusion)
            row |= {"compared": worst.compared, "error": worst.error, "bound": worst.bound}
    except NotFusableError as obstacle:
        return GateReport(status=report.SKIPPED, **row | {"reason": str(obstacle)}), None
    if remark := _remark(module, fusion.plan):
        row["reason"] = remark
    return GateReport(status=report.FUSED, **row), fused_class(fusion)


def _found(module: nn.Module, plan: Plan) -> dict:
    """What the report says of a known gate."""
    device = next(module.parameters()).device
    backend = "" if device.type == "meta" else backends.chosen(device).name
    return {"options": _options(module, plan), "backend": backend}


def _remark(module: nn.Module, plan: Plan) -> str:
    """What keeps a gate from being computed by the fused operation at present, "" if nothing."""
    obstacle = collect(module, plan).reason
    return f"runs its inner modules as long as {obstacle}" if obstacle else ""


def _fusion(module: nn.Module, adapter: Adapter) -> Fusion:
    """How `module` would be fused. Raises NotFusableError if it cannot be."""
    base = type(module)
    expect_own_signature(module)
    spec = adapter.describe(module)
    if not isinstance(spec, GateSpec):
        raise TypeError(
            f"fuse_: describe of the adapter {adapter.name} must return a GateSpec; got {spec!r}"
        )
    expect_layers(module, spec)
    expect_parameters(module)
    return Fusion(base, base.forward, adapter.name, make_plan(module, spec))


def _options(module: nn.Module, plan: Plan) -> dict[str, str | int]:
    """What the report says of a gate; its sizes only while its layers are plain."""
    options: dict[str, str | int] = {"pool": plan.pool}
    if plan.conv is not None:
        options["maps"] = plan.maps
    options["ties"] = plan.ties
    if tensors := collect(module, plan).tensors:
        mlp_weight1, _, mlp_weight2, _, conv_weight, _ = tensors
        options["channels"] = mlp_weight2.shape[0]
        if mlp_weight1 is not None:
            options["hidden"] = mlp_weight1.shape[0]
        if conv_weight is not None:
            options["kernel"] = conv_weight.shape[-1]
    return options


def _raise_if_incomplete(result: FuseReport) -> None:
    if result.skipped or result.candidates:
        raise RuntimeError(
            f"fuse_: strict, and gates cannot be fused; nothing was changed\n{result}"
        )
    if not result.fused and not result.with_status(report.ALREADY_FUSED):
        raise RuntimeError(f"fuse_: strict, and there is no gate to fuse\n{result}")
