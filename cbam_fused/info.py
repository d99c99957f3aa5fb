"""What `python -m cbam_fused info` prints: versions, backends, build, machine; fit for a report."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path

import torch

from cbam_fused import backends, library
from cbam_fused.version import __version__

# The features that the instruction-set variants of csrc/cpu are built for, as Linux names them.
CPU_FEATURES = ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")


def collect() -> dict[str, dict[str, str]]:
    """Sections of name and value, all strings."""
    return {
        "versions": {
            "cbam_fused": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torch cuda": torch.version.cuda or "none",
            "triton": _triton_version(),
            "system": platform.platform(),
        },
        "backends": {
            name: "usable" + (f" ({reason})" if reason else "") if usable else f"no: {reason}"
            for name, usable, reason in backends.status()
        },
        "library": _library(),
        "cpu": {
            "model": _cpu_info("model name"),
            "features": _cpu_features(),
            "capability in use": _capability(),
            "cores": str(os.cpu_count()),
            "torch threads": str(torch.get_num_threads()),
        },
        "gpus": _gpus(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _is_relevant(name)
        },
    }


def _triton_version() -> str:
    if not importlib.util.find_spec("triton"):
        return "not installed"
    return importlib.metadata.version("triton")


def _library() -> dict[str, str]:
    state = "loaded" if library.loaded else f"not loaded: {library.reason}"
    built = {
        name: ", ".join(value) if isinstance(value, list) else str(value)
        for name, value in library.build.items()
        if name != "reason"
    }
    return {"state": state, **built}


def _capability() -> str:
    return torch.ops.cbam_fused.cpu_capability() if library.loaded else "none: no library"


def _cpu_info(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(values, "unknown")


def _cpu_features() -> str:
    present = set(_cpu_info("flags").split())
    return " ".join(name for name in CPU_FEATURES if name in present) or "none of interest"


def _gpus() -> dict[str, str]:
    count = torch.cuda.device_count()
    devices = (torch.cuda.get_device_properties(index) for index in range(count))
    return {
        f"{index}": f"{device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.multi_processor_count} multiprocessors, {device.total_memory >> 30} GiB"
        for index, device in enumerate(devices)
    }


def _is_relevant(name: str) -> bool:
    prefixes = ("CBAM_FUSED_", "OMP_", "MKL_NUM_", "TRITON_", "CUDA_VISIBLE_")
    return name.startswith(prefixes) or name == "ATEN_CPU_CAPABILITY"


def as_text(sections: dict[str, dict[str, str]]) -> str:
    """The sections as aligned plain text."""
    width = max(len(name) for values in sections.values() for name in values)
    blocks = (
        "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in values.items())])
        for title, values in sections.items()
        if values
    )
    return "\n\n".join(blocks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    sections = collect()
    print(json.dumps(sections, indent=2) if arguments.json else as_text(sections))
    return 0
