"""What a CBAM gate keeps in memory for its backward, counted.

Run as ``python -m benchmarks.saved``. Every tensor that autograd saves passes through a hook;
tensors that share storage count once. ``+ residual, ReLU`` is the end of a residual block: a gate,
an addition and a ReLU in eager PyTorch, one operation when fused. The output is held to the
tolerance rule before anything is counted.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from timm.layers.cbam import CbamModule
from torch import Tensor

import cbam_fused
from benchmarks import report
from cbam_fused.testing import check_close

SHAPE = (8, 256, 56, 56)

Gate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Saved:
    """The storages kept for backward: how many hold at least as much as x, and bytes in all."""

    x_sized: int
    total_bytes: int
    x_bytes: int


def count_saved(function: Callable[[], Tensor], x: Tensor) -> Saved:
    """Runs `function` forward and counts what autograd saved, parameters left out."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    # The result holds the graph, and so the storages, alive: no address was used twice.
    sizes = list(storages.values())
    del result
    x_bytes = x.untyped_storage().nbytes()
    return Saved(sum(size >= x_bytes for size in sizes), sum(sizes), x_bytes)


def eager_block(module: CbamModule) -> Gate:
    """Gate, addition and ReLU by eager PyTorch."""
    return lambda x, residual: torch.relu(module(x) + residual)


def fused_block(module: CbamModule) -> Gate:
    """The same in one call."""
    channel, spatial = module.channel, module.spatial.conv
    norm = spatial.bn

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return cbam_fused.cbam(
            x,
            channel.fc1.weight,
            channel.fc1.bias,
            channel.fc2.weight,
            channel.fc2.bias,
            spatial.conv.weight,
            spatial.conv.bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            residual=residual,
            batch_statistics=module.training,
            momentum=norm.momentum,
            eps=norm.eps,
            maps="mean_max",
            ties="even",
            activation="relu",
        )

    return block


def functions(epilogue: bool) -> tuple[Gate, Gate, Gate]:
    """Eager, fused, and eager in float64, of one module in training mode."""
    module = CbamModule(SHAPE[1]).train()
    fused, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    if epilogue:
        return eager_block(module), fused_block(fused), eager_block(exact)
    cbam_fused.fuse_(fused, strict=True)
    return tuple(lambda x, residual, m=m: m(x) for m in (module, fused, exact))


def measure(epilogue: bool) -> dict[str, Saved]:
    """Counts for the gate alone or with its epilogue, by implementation."""
    torch.manual_seed(0)
    eager, fused, exact = functions(epilogue)
    x = torch.randn(SHAPE, requires_grad=True)
    residual = torch.randn(SHAPE, requires_grad=True)
    with torch.no_grad():
        expected = exact(x.double(), residual.double())
        check_close("y", fused(x, residual), eager(x, residual), expected)
    return {
        name: count_saved(lambda f=function: f(x, residual), x)
        for name, function in (("eager", eager), ("fused", fused))
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.saved", description=__doc__.splitlines()[0])
    report.add_json_option(parser, "saved")
    options = parser.parse_args(arguments)
    title = f"saved for backward, training mode, x {list(SHAPE)} in float32"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("gate")
    table.add_column("implementation")
    for column in ("tensors as large as x", "MB", "in units of x"):
        table.add_column(column, justify="right")
    results: list[dict[str, Any]] = []
    for label, epilogue in (("alone", False), ("+ residual, ReLU", True)):
        for name, saved in measure(epilogue).items():
            units = saved.total_bytes / saved.x_bytes
            numbers = (str(saved.x_sized), f"{saved.total_bytes / 1e6:.1f}", f"{units:.2f}")
            table.add_row(label, name, *numbers)
            results.append({"gate": label, "implementation": name, **vars(saved)})
    report.console.print(table)
    if options.json:
        content = {"environment": report.environment(), "shape": SHAPE, "results": results}
        report.write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
