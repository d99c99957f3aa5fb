"""The kernels of the library as they were compiled: what they take, how wide their accesses are.

``python -m tests.cuda.compiled > tests/cuda/resources.txt`` writes the table that is kept there,
for a library that was built for the architectures in `TABLED`.
"""

import functools
import re
import subprocess
from collections import Counter
from typing import NamedTuple

from cbam_fused import library
from tests import machine_code

TABLED = ("sm_80", "sm_90", "sm_100", "sm_120")

# A multiprocessor has four parts with so many registers each.
REGISTERS = 16384
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 48}  # that a multiprocessor holds
SHARED_MEMORY = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # its KiB
# Their unaligned rows come through shared memory; there is no skewed kernel for them.
ALWAYS_ALIGNED = ("resident_kernel", "skewed_kernel")
RESERVED = 1024  # bytes that every block takes besides what it asks for


class Kernel(NamedTuple):
    """`name<element, ...>`; those that access tensors as large as x are further templated on
    whether it is by whole vectors of 16 bytes, but for those that always do.
    """

    name: str
    element: str
    others: tuple[str, ...]

    @classmethod
    def parse(cls, demangled: str) -> "Kernel":
        name, arguments = re.match(r"void cbam_fused::(\w+)<(.*?)>\(", demangled).groups()
        element, *others = arguments.split(", ")
        return cls(name, element, tuple(others))

    @property
    def is_aligned(self) -> bool:
        return self.others[:1] == ("true",) and self.name not in ALWAYS_ALIGNED

    def unaligned(self) -> "Kernel":
        return self._replace(others=("false", *self.others[1:]))


class Code(NamedTuple):
    """What a kernel takes, as it was compiled."""

    symbol: str
    resources: machine_code.Resources
    threads: int  # of a block

    def blocks(self, architecture: str) -> int:
        """How many a multiprocessor holds at once, but for shared memory that launches ask for."""
        warps = self.threads // 32
        registers = -(-self.resources.registers // 8) * 8  # a warp gets 256 at a time
        own = self.resources.shared
        if own and architecture != "sm_80":  # where the compiler counts what is reserved, too
            own -= RESERVED
        return min(
            WARPS[architecture] // warps,
            4 * (REGISTERS // (32 * registers)) // warps,
            1024 * SHARED_MEMORY[architecture] // (own + RESERVED),
        )


_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG|LD|ST|LDL|STL)((?:\.\w+)*) ")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)\b")


@functools.cache
def accesses(architecture: str) -> dict[str, Counter[tuple[str, int]]]:
    """By symbol, the accesses among the disassembled instructions, by (kind, bits). It takes half a
    minute.
    """
    option = f"--gpu-architecture={architecture}"
    found: dict[str, Counter] = {}
    for line in machine_code.run_tool("cuobjdump", "-sass", option, library.path).splitlines():
        if name := re.search(r"Function : (\w+)", line):
            counts = found[name[1]] = Counter()
        elif access := _ACCESS.search(line):
            bits = _WIDTH.search(access[2])
            counts[access[1], int(bits[1]) if bits else 32] += 1
    return found


def _threads(option: str) -> dict[str, int]:
    """Of a block of each kernel, at most."""
    found = {}
    lines = machine_code.run_tool("cuobjdump", "-elf", option, library.path).splitlines()
    for i, line in enumerate(lines):
        if line.startswith(".nv.info."):
            name = line.removeprefix(".nv.info.")
        elif line.endswith("EIATTR_MAX_THREADS"):
            found[name] = int(lines[i + 2].split()[1], 16)
    return found


def _demangled(names: list[str]) -> list[str]:
    process = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return process.stdout.splitlines()


@functools.cache
def code(architecture: str) -> dict[Kernel, Code]:
    """The library's kernels for an architecture that it was built for."""
    option = f"--gpu-architecture={architecture}"
    used = machine_code.resources(library.path, option)
    threads = _threads(option)
    return {
        Kernel.parse(demangled): Code(name, used[name], threads[name])
        for name, demangled in zip(used, _demangled(list(used)), strict=True)
    }


def table() -> str:
    """Of every kernel and element type, the most over the variants; blocks, the fewest."""
    compiled = {architecture: code(architecture) for architecture in TABLED}
    lines = [
        f"nvcc {library.build['cuda']}: bytes of shared memory; registers of a thread / blocks",
        "that a multiprocessor then holds; the worst of all variants of a kernel",
        f"{'kernel':28}{'element':15}{'shared':>7}" + "".join(f"{name:>10}" for name in TABLED),
    ]
    for name, element in sorted({kernel[:2] for kernel in compiled[TABLED[0]]}):
        variants = {
            architecture: [c for kernel, c in codes.items() if kernel[:2] == (name, element)]
            for architecture, codes in compiled.items()
        }
        shared = max(c.resources.shared for c in variants[TABLED[0]])
        cells = (
            f"{max(c.resources.registers for c in codes)}"
            f" /{min(c.blocks(architecture) for c in codes):2}"
            for architecture, codes in variants.items()
        )
        lines.append(f"{name:28}{element:15}{shared:7}" + "".join(f"{c:>10}" for c in cells))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
