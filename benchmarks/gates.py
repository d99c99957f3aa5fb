"""One CBAM gate on the CPU: timm's module by eager PyTorch, by torch.compile, and fused.

Run as ``python -m benchmarks.gates``. Every implementation is first held, in the very
configuration that is timed, to the tolerance rule against float64. A fused gate that fails is not
timed, and the exit status is 1; where torch.compile fails, its time is given and marked.

``eval``: the module's forward in inference mode. ``train``: forward and backward, batch norm in
training mode, with a fixed gradient of y, from gradients set to None. ``copy``: ``y.copy_(x)``,
the least that reading x and writing y takes.
"""

import argparse
import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.table import Table
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

import cbam_fused
from benchmarks import report
from benchmarks.timing import Timing, geometric_mean, interleave, ratio
from benchmarks.verify import Oracle, draws, separate_maxima

SHAPES = ("256x56x56", "512x28x28", "1024x14x14", "2048x7x7")
BATCHES = (8, 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("eval", "train")
COMPILED: Mapping[str, dict[str, Any]] = {"compile": {}}
"""What torch.compile is timed with: options of ``Module.compile``, by name."""
IMPLEMENTATIONS = ("eager", *COMPILED, "fused")
RATIOS = (("eager", "fused"), ("compile", "fused"), ("fused", "copy"))


@dataclass(frozen=True)
class Configuration:
    """What is measured: one mode, shape of a sample, batch, dtype and layout."""

    mode: str
    shape: str
    batch: int
    dtype: str
    layout: str

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, *(int(extent) for extent in self.shape.split("x"))

    def __str__(self) -> str:
        return f"{self.mode} {self.batch}x{self.shape} {self.dtype} {self.layout}"


@dataclass
class Measurement:
    """The times of one configuration, and why an implementation is outside the tolerance rule."""

    configuration: Configuration
    timings: dict[str, Timing]
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, numerator: str, denominator: str) -> float | None:
        if numerator not in self.timings or denominator not in self.timings:
            return None
        return ratio(self.timings[numerator], self.timings[denominator])


def gate(configuration: Configuration) -> CbamModule:
    """timm's module, with a norm that does something."""
    module = CbamModule(configuration.size[1])
    norm = module.spatial.conv.bn
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    return module.train(configuration.mode == "train").to(DTYPES[configuration.dtype])


def implementations(
    module: CbamModule, compiled: Mapping[str, dict[str, Any]] = COMPILED
) -> dict[str, nn.Module]:
    """Copies of one module by the name of how they run."""
    torch._dynamo.reset()
    modules = {name: copy.deepcopy(module) for name in ("eager", *compiled, "fused")}
    for name, options in compiled.items():
        modules[name].compile(**options)
    cbam_fused.fuse_(modules["fused"], strict=True)
    return modules


def draw(configuration: Configuration, module: CbamModule) -> tuple[Tensor, Tensor | None]:
    """An x and, for training, a gradient of y."""
    dtype, layout = DTYPES[configuration.dtype], LAYOUTS[configuration.layout]
    x = torch.randn(configuration.size).to(dtype, memory_format=layout)
    if configuration.mode == "eval":
        return x, None
    channel = copy.deepcopy(module.channel).double()
    with torch.no_grad():
        x = separate_maxima(x, channel)
    return x, torch.randn(configuration.size).to(dtype, memory_format=layout)


def timed(module: nn.Module, x: Tensor, grad: Tensor | None) -> Callable[[], object]:
    """The call that is timed."""
    if grad is None:
        return lambda: module(x)
    leaves = [x, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(x).backward(grad)

    return step


def check(
    configuration: Configuration, module: CbamModule, modules: dict[str, nn.Module]
) -> tuple[tuple[Tensor, Tensor | None], dict[str, str]]:
    """Holds `modules` but the eager one to the tolerance rule. What is not to be timed is removed:
    a fused gate that is off, and whatever raises an error.

    Returns:
        An x with its gradient of y, to be timed with, and the failures by name.
    """
    device = next(module.parameters()).device
    with torch.device(device):
        inputs = [draw(configuration, module) for _ in range(draws(math.prod(configuration.size)))]
    oracle = Oracle(module, inputs)
    failures = {}
    for name in [name for name in modules if name != "eager"]:
        try:
            oracle.check(modules[name])
        except AssertionError as error:
            failures[name] = str(error)
            if name == "fused":
                del modules[name]
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
            del modules[name]
    x, grad = inputs[0]
    return (x.requires_grad_(grad is not None), grad), failures


def measure(configuration: Configuration, repetitions: int, min_time: float) -> Measurement:
    """Checks and times one configuration."""
    torch.manual_seed(0)
    module = gate(configuration)
    modules = implementations(module)
    (x, grad), failures = check(configuration, module, modules)
    source, target = x.detach(), torch.empty_like(x)
    calls = {name: timed(module, x, grad) for name, module in modules.items()}
    calls["copy"] = lambda: target.copy_(source)
    with torch.inference_mode(configuration.mode == "eval"):
        timings = interleave(calls, repetitions=repetitions, min_time=min_time)
    return Measurement(configuration, timings, failures)


def cell(measurement: Measurement, name: str) -> str:
    """A time; with an asterisk if the implementation is outside the tolerance rule."""
    if name not in measurement.timings:
        return "[red]wrong"
    mark = "*" if name in measurement.failures else ""
    return report.milliseconds(measurement.timings[name]) + mark


def table(
    title: str,
    measurements: Iterable[Measurement],
    names: Sequence[str] = (*IMPLEMENTATIONS, "copy"),
    ratios: Sequence[tuple[str, str]] = RATIOS,
    others: Mapping[str, Callable[[Measurement], str]] | None = None,
) -> Table:
    """The times of `names`, the `ratios` of two of them and `others`, a row a configuration."""
    others = others or {}
    result = Table(title=f"{title}: {report.SPREAD}", box=box.SIMPLE_HEAD)
    for column in ("x", "dtype", "layout"):
        result.add_column(column, no_wrap=True)
    for column in (*names, *(f"{a} /\n{b}" for a, b in ratios), *others):
        result.add_column(column, justify="right", no_wrap=True)
    for measurement in measurements:
        c = measurement.configuration
        cells = [cell(measurement, name) for name in names]
        cells += [report.times(measurement.ratio(*pair)) for pair in ratios]
        cells += [column(measurement) for column in others.values()]
        result.add_row(f"{c.batch}x{c.shape}", c.dtype, c.layout, *cells)
    return result


def summary(
    mode: str, measurements: list[Measurement], ratios: Sequence[tuple[str, str]] = RATIOS
) -> dict[str, Any]:
    """Geometric means, over all and over each layout and dtype; where fused is not the fastest."""
    groups = {"all": measurements}
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        chosen = [
            m
            for m in measurements
            if (m.configuration.layout, m.configuration.dtype) == (layout, dtype)
        ]
        if chosen:
            groups[f"{layout} {dtype}"] = chosen
    means = {}
    for group, members in groups.items():
        values = {f"{a} / {b}": [m.ratio(a, b) for m in members] for a, b in ratios}
        means[group] = {
            name: geometric_mean(value for value in chosen if value is not None)
            for name, chosen in values.items()
        }
    slower = [
        f"{m.configuration}: {m.ratio('fused', other):.2f}x the time of {other}"
        for m in measurements
        for other in (a for a, b in ratios if b == "fused")
        if (m.ratio("fused", other) or 0) > 1
    ]
    return {"mode": mode, "geometric_means": means, "slower": slower}


def summary_table(summaries: list[dict[str, Any]]) -> Table:
    result = Table(title="geometric means", box=box.SIMPLE_HEAD)
    for column in ("mode", "over"):
        result.add_column(column)
    for name in summaries[0]["geometric_means"]["all"] if summaries else ():
        result.add_column(name, justify="right")
    for entry in summaries:
        for group, means in entry["geometric_means"].items():
            result.add_row(entry["mode"], group, *(report.times(value) for value in means.values()))
    return result


def as_json(measurement: Measurement, ratios: Sequence[tuple[str, str]] = RATIOS) -> dict[str, Any]:
    values = {f"{a} / {b}": measurement.ratio(a, b) for a, b in ratios}
    return {
        **vars(measurement.configuration),
        "times": {name: report.timing_record(t) for name, t in measurement.timings.items()},
        "ratios": {name: value and round(value, 4) for name, value in values.items()},
        "failures": measurement.failures,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gates", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="CxHxW")
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=tuple(LAYOUTS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--min-time", type=float, default=0.01, help="seconds per measurement")
    parser.add_argument("--quick", action="store_true", help="one shape, 5 repetitions")
    report.add_json_option(parser, "gates")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.batch, options.dtype = SHAPES[-1:], (1,), ("float32",)
        options.repetitions = 5
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    environment = report.environment()
    report.console.print(report.heading(environment))
    axes = (options.mode, options.layout, options.dtype, options.batch, options.shape)
    configurations = [
        Configuration(mode, shape, batch, dtype, layout)
        for mode, layout, dtype, batch, shape in itertools.product(*axes)
    ]
    measurements = []
    with report.progress() as progress:
        task = progress.add_task("", total=len(configurations))
        for configuration in configurations:
            progress.update(task, description=str(configuration))
            measurements.append(measure(configuration, options.repetitions, options.min_time))
            progress.advance(task)

    by_mode = {
        mode: [m for m in measurements if m.configuration.mode == mode] for mode in options.mode
    }
    summaries = [summary(mode, chosen) for mode, chosen in by_mode.items()]
    for mode, chosen in by_mode.items():
        report.console.print(table(mode, chosen))
    report.console.print(summary_table(summaries))
    slower = [line for entry in summaries for line in entry["slower"]]
    verdict = "Fused is slower in:" if slower else "Fused is the fastest of what was timed."
    report.console.print(verdict, *slower, sep="\n  ")
    failures = [
        f"{m.configuration}, {name}: {reason}"
        for m in measurements
        for name, reason in m.failures.items()
    ]
    if failures:
        report.console.print("* outside the tolerance rule:", *failures, sep="\n  ")
    if options.json:
        content = {
            "environment": environment,
            "settings": {"repetitions": options.repetitions, "min_time_s": options.min_time},
            "summary": summaries,
            "results": [as_json(m) for m in measurements],
        }
        report.write_json(options.json, content)
    return 1 if any("fused" in m.failures for m in measurements) else 0


if __name__ == "__main__":
    sys.exit(main())
