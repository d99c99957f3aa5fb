"""One CBAM gate on a GPU: timm's module by eager PyTorch, by torch.compile, and fused.

Run as ``python -m benchmarks.gpu``, or as a part of ``benchmarks/gpu.sh``. Every implementation is
first held, in the very configuration that is timed, to the tolerance rule against float64; a fused
gate that fails is not timed, and the exit status is 1. ``eval`` and ``train`` are those of
`benchmarks.gates`; no implementation may round to TF32.

``graph``: each implementation is captured in a CUDA graph, and its replay is timed: the work of the
GPU alone. ``stream``: called from Python as in a program, which a small gate keeps waiting.
``copy``: the fastest of ``copy_``, ``x + 0`` and a vectorised kernel. ``GB/s`` counts what no
implementation can do without, in units of x: in eval mode one read and one write; in a training
step eight, since batch statistics need all of x before the first y, and two sums of the backward
before the first gradient. The fraction of the copy is the ratio of two such speeds.

Results are written after each configuration. ``--time-limit`` begins no further one after so many
seconds (exit status 2 if some are left), and ``--continue`` measures those that the file lacks.
"""

import argparse
import dataclasses
import datetime
import gc
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cbam_fused
from benchmarks import gates, plots, report
from benchmarks.device import DeviceClock, copies, graphed
from benchmarks.gates import DTYPES, LAYOUTS, MODES, SHAPES, Measurement
from benchmarks.timing import Clock, Timing, interleave
from cbam_fused import backends

BATCHES = (64, 1)
LAUNCHES = ("graph", "stream")
COMPILED = {
    "compile": {},
    # Graphs are captured here, for all alike.
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}
NAMES = ("eager", *COMPILED, "fused", "copy")
RATIOS = tuple((name, "fused") for name in ("eager", *COMPILED))
TITLE = "{c.mode}, {c.launch}, batch {c.batch}"
PASSES = {"eval": 2, "train": 8}
"""Reads and writes of a tensor as large as x that no implementation can do without."""


@dataclass(frozen=True)
class Configuration(gates.Configuration):
    """As on a CPU, and how the work is given to the GPU."""

    launch: str

    @property
    def gate(self) -> gates.Configuration:
        """The same without the launch."""
        names = [field.name for field in dataclasses.fields(gates.Configuration)]
        return gates.Configuration(**{name: getattr(self, name) for name in names})

    @property
    def bytes(self) -> int:
        """What has to be moved at least."""
        return PASSES[self.mode] * math.prod(self.size) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.launch}"


def fraction_of_copy(measurement: Measurement, name: str) -> float | None:
    """The speed of an implementation over that of the copy."""
    value = measurement.ratio("copy", name)
    return value and value * PASSES[measurement.configuration.mode] / PASSES["eval"]


def with_best_copy(timings: dict[str, Timing]) -> dict[str, Timing]:
    """The timings, and ``copy``: the fastest of the copies among them."""
    names = [name for name in timings if name in ("copy_", "x + 0", "copy kernel")]
    return timings | {"copy": min((timings[name] for name in names), key=lambda t: t.median)}


def measure(
    configuration: gates.Configuration, options: argparse.Namespace, clock: Clock
) -> list[Measurement]:
    """Checks one configuration and times it, launched in each way that is asked for."""
    torch.manual_seed(0)
    with torch.device(options.device):
        module = gates.gate(configuration)
    compiled = {name: COMPILED[name] for name in options.compiled}
    modules = gates.implementations(module, compiled)
    (x, grad), failures = gates.check(configuration, module, modules)
    calls = {name: gates.timed(module, x, grad) for name, module in modules.items()}
    calls |= copies(x.detach(), torch.empty_like(x))
    measurements = []
    with torch.inference_mode(configuration.mode == "eval"):
        for launch in options.launch:
            launched = calls if launch == "stream" else captured(calls, failures)
            timings = interleave(
                launched, repetitions=options.repetitions, min_time=options.min_time, clock=clock
            )
            how = Configuration(**vars(configuration), launch=launch)
            measurements.append(Measurement(how, with_best_copy(timings), dict(failures)))
    return measurements


def captured(
    calls: dict[str, Callable[[], object]], failures: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """The calls as CUDA graphs; those that cannot be captured are added to `failures`."""
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = graphed(call)
        except Exception as error:
            failures[name] = f"no CUDA graph: {type(error).__name__}: {error}"
    return graphs


def as_json(measurement: Measurement) -> dict[str, Any]:
    bytes_, timings = measurement.configuration.bytes, measurement.timings
    return {
        **gates.as_json(measurement, RATIOS),
        "bytes": bytes_,
        "gigabytes_per_second": {n: round(bytes_ / t.median / 1e9, 1) for n, t in timings.items()},
        "fractions_of_copy": {
            name: round(fraction_of_copy(measurement, name) or 0.0, 4)
            for name in timings
            if name in NAMES
        },
    }


def from_json(record: dict[str, Any]) -> Measurement:
    """A measurement as `as_json` wrote it."""
    names = [field.name for field in dataclasses.fields(Configuration)]
    timings = {
        name: Timing(tuple(ms / 1e3 for ms in t["repetitions_ms"]), t["calls_per_repetition"])
        for name, t in record["times"].items()
    }
    configuration = Configuration(**{name: record[name] for name in names})
    return Measurement(configuration, timings, record["failures"])


def summarise(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """Geometric means of each mode, launch and batch, and where fused is not the fastest."""
    summaries = []
    for title, members in plots.grouped(measurements, TITLE).items():
        summary = gates.summary(title, members, RATIOS)
        for group, means in summary["geometric_means"].items():
            fractions = [
                fraction_of_copy(m, "fused")
                for m in members
                if group in ("all", f"{m.configuration.layout} {m.configuration.dtype}")
            ]
            means["fraction of copy"] = gates.geometric_mean(f for f in fractions if f)
        summaries.append(summary)
    return summaries


def gigabytes_per_second(measurement: Measurement, name: str) -> str:
    if name not in measurement.timings:
        return "-"
    return f"{measurement.configuration.bytes / measurement.timings[name].median / 1e9:.0f}"


def percent_of_copy(measurement: Measurement, name: str) -> str:
    value = fraction_of_copy(measurement, name)
    return "-" if value is None else f"{value:.0%}"


def print_tables(measurements: list[Measurement], summaries: list[dict[str, Any]]) -> None:
    names = [name for name in NAMES if any(name in m.timings for m in measurements)]
    ratios = [pair for pair in RATIOS if pair[0] in names]
    others = {
        "copy\nGB/s": lambda m: gigabytes_per_second(m, "copy"),
        "fused\nGB/s": lambda m: gigabytes_per_second(m, "fused"),
        "of copy": lambda m: percent_of_copy(m, "fused"),
    }
    for title, members in plots.grouped(measurements, TITLE).items():
        report.console.print(gates.table(title, members, names, ratios, others))
    report.console.print(gates.summary_table(summaries))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="CxHxW")
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=tuple(LAYOUTS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--launch", nargs="+", choices=LAUNCHES, default=LAUNCHES)
    parser.add_argument("--compiled", nargs="*", choices=COMPILED, default=tuple(COMPILED))
    parser.add_argument("--backend", choices=backends.NAMES, help="default: the automatic choice")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--min-time", type=float, default=0.001, help="seconds per measurement")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--continue", action="store_true", dest="resume")
    parser.add_argument("--output", type=Path, default=report.RESULTS, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="batch 64, bfloat16, 7 repetitions")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.dtype, options.repetitions = BATCHES[:1], ("bfloat16",), 7
    return options


def results_path(folder: Path, device: str, backend: str) -> Path:
    """Today's file of a device and a backend, with the strategy where one was asked for."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{name}-{backend}-gates-{datetime.date.today().isoformat()}.json"


def earlier(path: Path, environment: dict[str, Any]) -> list[Measurement]:
    """The measurements that the file holds.

    Raises ValueError if they were made with another device or other versions.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    for section, names in {"versions": ("torch", "triton"), "gpu in use": ("name",)}.items():
        for name in names:
            values = [e.get(section, {}).get(name) for e in (content["environment"], environment)]
            if values[0] != values[1]:
                raise ValueError(f"{path}: {name} was {values[0]}, is {values[1]}; not continued")
    return [from_json(record) for record in content["results"]]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with cbam_fused.use_backend(options.backend):
        return run(options)


def run(options: argparse.Namespace) -> int:
    """Measures what `options` ask for; the exit status."""
    begin = time.monotonic()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        report.console.print("benchmarks.gpu: there is no GPU that PyTorch can use here")
        return 1
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    environment = report.environment(options.device)
    report.console.print(report.heading(environment))
    device = environment.get("gpu in use", environment["cpu"])
    backend, _reason = backends.choose(options.device)
    strategy = os.environ.get("CBAM_FUSED_CUDA_STRATEGY")
    measured = "-".join(filter(None, (backend.name, strategy)))
    path = results_path(options.output, device.get("name", "cpu"), measured)
    measurements = earlier(path, environment) if options.resume else []

    axes = (options.batch, options.mode, options.dtype, options.layout, options.shape)
    known = {m.configuration.gate for m in measurements}
    configurations = [
        configuration
        for batch, mode, dtype, layout, shape in itertools.product(*axes)
        if (configuration := gates.Configuration(mode, shape, batch, dtype, layout)) not in known
    ]
    clock, errors = DeviceClock(options.device), []
    settings = {"repetitions": options.repetitions, "min_time_s": options.min_time}
    settings |= {"backend": backend.name, "strategy": strategy or "by the planner"}
    with report.progress() as progress:
        task = progress.add_task("", total=len(configurations))
        while configurations and time.monotonic() - begin < options.time_limit:
            configuration = configurations.pop(0)
            progress.update(task, description=str(configuration))
            try:
                measurements += measure(configuration, options, clock)
            except Exception as error:  # out of memory, say: the others are measured all the same
                errors.append(f"{configuration}: {type(error).__name__}: {error}")
            gc.collect()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
            content = {
                "environment": environment,
                "settings": settings,
                "summary": summarise(measurements),
                "results": [as_json(m) for m in measurements],
                "errors": errors,
            }
            report.save_json(path, content)

    summaries = summarise(measurements)
    print_tables(measurements, summaries)
    failures = [
        f"{m.configuration}, {name}: {reason}"
        for m in measurements
        for name, reason in m.failures.items()
    ]
    for title, lines in (
        ("Fused is slower in:", [line for entry in summaries for line in entry["slower"]]),
        ("* outside the tolerance rule, or failed:", failures),
        ("Not measured, because of errors:", errors),
        ("Not measured, for lack of time (--continue):", [str(c) for c in configurations]),
    ):
        if lines:
            report.console.print(title, *lines, sep="\n  ", markup=False)
    for picture in plots.draw(measurements, path, fraction_of_copy):
        report.console.print(f"written: {picture}")
    report.console.print(f"written: {path}")
    if errors or any("fused" in m.failures for m in measurements):
        return 1
    return 2 if configurations else 0


if __name__ == "__main__":
    sys.exit(main())
