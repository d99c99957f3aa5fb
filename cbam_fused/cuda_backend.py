"""The library's CUDA code as a backend: when it can be used.

It is compiled for some architectures, by number as NVIDIA writes them: sm_86 is machine code, for
GPUs of compute capability 8.6 and later ones of 8; compute_90 is PTX, which the driver of any GPU
from 9.0 on translates. A driver runs code of its own major version of CUDA and older ones, and
translates PTX of its own version and older ones.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cbam_fused import library


class _Architecture(NamedTuple):
    is_ptx: bool
    major: int
    minor: int
    only_there: bool  # sm_90a, sm_100f: for no other capability, or not for every later one

    @classmethod
    def parse(cls, name: str) -> "_Architecture":
        kind, major, minor, suffix = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name).groups()
        return cls(kind == "compute", int(major), int(minor), bool(suffix))

    def serves(self, capability: tuple[int, int]) -> bool:
        own = (self.major, self.minor)
        if self.only_there:
            return capability == own
        return capability >= own and (self.is_ptx or capability[0] == self.major)


def newest_code(names: Sequence[str], capability: tuple[int, int]) -> tuple[int, int]:
    """What the code that a GPU of this capability runs was compiled for: one of `names`, those of a
    library; `capability` itself where it serves no such GPU.
    """
    serving = [a for a in map(_Architecture.parse, names) if a.serves(capability)]
    native = [(a.major, a.minor) for a in serving if not a.is_ptx]
    return max(native or [(a.major, a.minor) for a in serving], default=capability)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver knows."""
    number = torch._C._cuda_getDriverVersion()
    return number // 1000, number % 1000 // 10


@functools.cache
def _unusable_on(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "there is no GPU"
    capability = torch.cuda.get_device_capability(device)
    names = library.build["architectures"]
    serving = [a for a in map(_Architecture.parse, names) if a.serves(capability)]
    if not serving:
        return (
            f"the library has CUDA code for {', '.join(names)};"
            f" {device} has compute capability {_text(capability)}"
        )
    built = tuple(int(part) for part in library.build["cuda"].split(".")[:2])
    needed = built if all(a.is_ptx for a in serving) else (built[0], 0)
    driver = _driver_version()
    if driver < needed:
        return f"it needs a driver of CUDA {_text(needed)} or later; this one's is {_text(driver)}"
    return ""


def unusable(device: torch.device | None = None) -> str:
    """Why tensors on `device` (None: on any) cannot be computed on; empty where they can."""
    if not library.loaded:
        return library.reason
    if not library.build.get("architectures"):
        why = library.build.get("cuda", "build it again").removeprefix("none: ")
        return f"the library has no CUDA code: {why}"
    if torch.version.hip is not None:
        return "it needs a GPU by NVIDIA"
    if device is None:
        return "" if torch.cuda.is_available() else "there is no GPU"
    return _unusable_on(device) if device.type == "cuda" else "it needs a GPU"


# What torch.compiler.assume_constant_result does, without its import of the compiler.
unusable._dynamo_marked_constant = True
