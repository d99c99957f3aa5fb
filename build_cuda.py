"""The CUDA part of the library: the compiler, the GPU architectures, how a source is compiled.

Environment: CUDA_HOME, or else nvcc on the PATH; TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX");
CBAM_FUSED_CUDA=0 leaves the CUDA sources out, and with CBAM_FUSED_CUDA=1 it is an error, not a
remark in the record, where they cannot be compiled.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# What TORCH_CUDA_ARCH_LIST is where it is not set, as far as nvcc knows them. +PTX: also code that
# the driver of a later GPU translates.
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"

# Of a kernel that needs more registers than there are, or an array in memory of its own, there is a
# warning (tests/cuda allows none). No contraction: see FLAGS of setup.py.
FLAGS = (
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-Xfatbin=-compress-all",
    "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage",
)


class NoCudaError(Exception):
    """The CUDA sources cannot or shall not be compiled here; the message goes into the record."""


@dataclass(frozen=True)
class CudaToolchain:
    """nvcc, and what it compiles for: sm_90 is machine code, compute_90 PTX."""

    nvcc: str
    version: str
    runtime: Path  # the static library
    architectures: tuple[str, ...]

    @classmethod
    def find(cls) -> "CudaToolchain":
        wanted = os.environ.get("CBAM_FUSED_CUDA")
        if wanted == "0":
            raise NoCudaError("CBAM_FUSED_CUDA=0 was set when the package was built")
        try:
            nvcc = _find_nvcc()
            return cls(nvcc, _version(nvcc), _runtime(nvcc), _architectures(nvcc))
        except NoCudaError as error:
            if wanted == "1":
                raise SystemExit(f"cbam_fused: CBAM_FUSED_CUDA=1 is set, but {error}") from None
            raise

    def command(self, host_compiler: str, host_flags: tuple[str, ...]) -> list[str]:
        """The compiler with all flags that are the same for every source."""
        return [
            self.nvcc,
            f"-ccbin={host_compiler}",
            *FLAGS,
            *(f"-gencode={_code(architecture)}" for architecture in self.architectures),
            f"-Xcompiler={','.join(host_flags)}",
        ]

    def environment(self, threads: int) -> dict[str, str]:
        """Lets each compiler serve so many architectures at once. (A changed command would mean
        compiling again.)
        """
        given = os.environ.get("NVCC_APPEND_FLAGS", "")
        return {"NVCC_APPEND_FLAGS": f"{given} --threads={max(threads, 1)}".strip()}

    @property
    def libraries(self) -> tuple[str, ...]:
        """What the linker needs."""
        return (str(self.runtime), "-ldl", "-lrt", "-lpthread")


def _find_nvcc() -> str:
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.exists():
            raise NoCudaError(f"there was no bin/nvcc in CUDA_HOME={home}")
        return str(nvcc)
    if nvcc := shutil.which("nvcc"):
        return nvcc
    raise NoCudaError("no nvcc was found, neither by CUDA_HOME nor on the PATH")


def _ask(nvcc: str, *arguments: str) -> str:
    process = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    if process.returncode:
        raise NoCudaError(f"`{nvcc} {' '.join(arguments)}` failed: {process.stderr.strip()}")
    return process.stdout + process.stderr


def _version(nvcc: str) -> str:
    return re.search(r", V(\S+)", _ask(nvcc, "--version"))[1]


def _runtime(nvcc: str) -> Path:
    """nvcc may be a wrapper: what it runs says where the toolkit is."""
    top = re.search(r"^#\$ TOP=(.*)$", _ask(nvcc, "--dryrun", "-c", "none.cu"), re.MULTILINE)[1]
    folders = ("lib64", "lib", "targets/x86_64-linux/lib")
    found = (Path(top, folder, "libcudart_static.a").resolve() for folder in folders)
    if runtime := next(filter(Path.exists, found), None):
        return runtime
    raise NoCudaError(f"the CUDA toolkit in {Path(top).resolve()} has no libcudart_static.a")


def _architectures(nvcc: str) -> tuple[str, ...]:
    known = _ask(nvcc, "--list-gpu-code").split()
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    architectures = []
    for entry in listed or ARCHITECTURES.split(";"):
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if not parts:
            raise SystemExit(
                "cbam_fused: TORCH_CUDA_ARCH_LIST must be entries such as 9.0 or 9.0+PTX,"
                f" separated by semicolons; got {entry!r}"
            )
        number = parts[1] + parts[2]
        if listed or f"sm_{number}" in known:
            architectures += [f"sm_{number}"] + [f"compute_{number}"] * bool(parts[3])
    return tuple(architectures)


def _code(architecture: str) -> str:
    virtual = architecture.replace("sm_", "compute_")
    return f"arch={virtual},code={architecture}"
