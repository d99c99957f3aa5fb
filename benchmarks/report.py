"""What every measurement is reported with: the machine, the versions, a console, a JSON file."""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.timing import Timing
from cbam_fused import backends, info

RESULTS = Path(__file__).parent / "results"

# A log has no width of its own, and tables would wrap at 80 columns.
console = Console(width=None if sys.stdout.isatty() else 140)


def progress() -> Progress:
    """A progress bar that leaves no trace when it is done, nor in a log."""
    description = TextColumn("{task.description}")
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=quiet)


_CPU = torch.device("cpu")


def environment(device: torch.device = _CPU) -> dict[str, Any]:
    """Date, threads, load, versions, backends, build and machine, before anything is measured."""
    backend, reason = backends.choose(device)
    sections = info.collect()
    sections["versions"]["timm"] = timm.__version__
    if device.type == "cuda":
        sections["gpu in use"] = gpu(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "backend": f"{backend.name}: {reason}",
        **sections,
    }


# As `nvidia-smi --query-gpu` names them.
_GPU_STATE = (
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def gpu(device: torch.device) -> dict[str, str]:
    """A GPU, its driver, and its clocks and power at this moment."""
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(_GPU_STATE)}"]
    try:
        printed = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout
        state = dict(zip(_GPU_STATE, (value.strip() for value in printed.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        state = {"nvidia-smi": f"{type(error).__name__}: {error}"}
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        **state,
    }


def heading(environment: dict[str, Any]) -> str:
    """The machine and the versions in a few lines."""
    cpu, versions = environment["cpu"], environment["versions"]
    used = ", ".join(f"{k} {v}" for k, v in environment.get("gpu in use", {}).items())
    return (used and f"{used}\n") + (
        f"{cpu['model']}, {environment['threads']} threads, {cpu['cores']} cores, "
        f"load average {environment['load_average']} (times want an idle machine)\n"
        f"torch {versions['torch']}, timm {versions['timm']}, cbam_fused {versions['cbam_fused']}\n"
        f"backend {environment['backend']}"
    )


def add_json_option(parser: argparse.ArgumentParser, name: str) -> None:
    """``--json [PATH]``; without a path, today's file of this measurement."""
    today = RESULTS / f"cpu-{name}-{datetime.date.today().isoformat()}.json"
    text = "write the results; without a path, to benchmarks/results"
    parser.add_argument("--json", nargs="?", type=Path, const=today, metavar="PATH", help=text)


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file in one step: whoever interrupts it keeps the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    save_json(path, content)
    console.print(f"written: {os.path.relpath(path)}")


def timing_record(timing: Timing) -> dict[str, Any]:
    """A timing as JSON, in milliseconds."""
    low, high = timing.quartiles
    return {
        "median_ms": round(timing.median * 1e3, 5),
        "quartiles_ms": [round(low * 1e3, 5), round(high * 1e3, 5)],
        "repetitions_ms": [round(value * 1e3, 5) for value in timing.seconds],
        "calls_per_repetition": timing.calls,
    }


SPREAD = "ms, median ± half the interquartile range"


def milliseconds(timing: Timing) -> str:
    """``12.34 ±2%``: the median, and half the interquartile range relative to it."""
    low, high = timing.quartiles
    digits = 3 if timing.median < 1e-3 else 2 if timing.median < 0.1 else 1
    spread = (high - low) / 2 / timing.median
    return f"{timing.median * 1e3:.{digits}f} ±{spread:.0%}"


def times(value: float | None) -> str:
    """A ratio, as 2.50x, or a dash."""
    return "-" if value is None else f"{value:.2f}x"
