"""What NVIDIA's tools, which come with Triton, say of code for GPUs that are not there."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia


class Resources(NamedTuple):
    """What a thread takes, in registers and bytes; `shared`: the bytes of a block, as compiled."""

    registers: int
    stack: int
    local: int
    shared: int


_RESOURCES = re.compile(
    r" Function (\w+):\n +REG:(?P<REG>\d+) STACK:(?P<STACK>\d+) "
    r"SHARED:(?P<SHARED>\d+) LOCAL:(?P<LOCAL>\d+)"
)


def run_tool(name: str, *arguments: object) -> str:
    """What the tool prints."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(file: Path, *options: object) -> dict[str, Resources]:
    """By name of each kernel in a cubin, or in a library for one architecture (an option)."""
    usage = run_tool("cuobjdump", "--dump-resource-usage", *options, file)
    return {
        found[1]: Resources(*(int(found[name]) for name in ("REG", "STACK", "LOCAL", "SHARED")))
        for found in _RESOURCES.finditer(usage)
    }
