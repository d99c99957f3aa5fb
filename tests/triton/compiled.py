"""Kernels compiled for GPUs that are not there, and what became of them.

`recorded` notes launches in place of making them; `compile_for` gives each the very compilation
that launching it on such a GPU would. `resources` reads the machine code, `access_widths` the PTX,
in which every access can be followed back to an argument.
"""

import contextlib
import functools
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from cbam_fused import triton_kernels
from cbam_fused.testing import Gate
from cbam_fused.triton_kernels.configurations import Configuration
from cbam_fused.triton_kernels.launch import launch
from tests import machine_code
from tests.machine_code import Resources

CAPABILITIES = (80, 90, 100, 120)


class Record(NamedTuple):
    """A launch that was not made: what `launch` was called with."""

    kernel: JITFunction
    arguments: tuple
    configuration: Configuration
    constants: dict

    def __str__(self) -> str:
        types = [str(a.dtype) for a in self.arguments if isinstance(a, torch.Tensor)]
        return f"{self.kernel.__name__} {self.configuration} {self.constants} {types}"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors among the arguments, by name."""
        named = zip(self.kernel.arg_names, self.arguments, strict=False)
        return {name: value for name, value in named if isinstance(value, torch.Tensor)}


class _Driver(NamedTuple):
    """As much of a driver as the compiler asks for."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def recorded() -> Iterator[list[Record]]:
    """The launches that are asked for within."""
    records = []

    def note(kernel, programs, *arguments, configuration, **constants):
        records.append(Record(kernel, arguments, configuration, constants))

    package = triton_kernels.__name__
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(package) and getattr(module, "launch", None) is launch:
                stack.enter_context(mock.patch.object(module, "launch", note))
        yield records


def on_meta(gate: Gate) -> Gate:
    """The gate with tensors that have shapes, strides and dtypes only."""
    values = vars(gate).items()
    return Gate(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values})


def compile_for(capability: int, record: Record):
    """The kernel as Triton compiles it for this launch on a GPU of that compute capability."""
    compiled = []

    def compile_only(kernel, grid):
        def start(*arguments, **options):
            compiled.append(kernel.warmup(*arguments, grid=grid, **options))

        return start

    previous = driver._active
    driver.set_active(_Driver(capability))
    try:
        with mock.patch.object(JITFunction, "__getitem__", compile_only):
            launch(
                *(record.kernel, 1, *record.arguments),
                configuration=record.configuration,
                **record.constants,
            )
    finally:
        driver._active = previous
    return compiled[0]


@contextlib.contextmanager
def _cubin(compiled) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        yield Path(file.name)


@functools.cache
def resources(compiled) -> Resources:
    """With the shared memory that a launch asks for."""
    with _cubin(compiled) as file:
        (used,) = machine_code.resources(file).values()
    return used._replace(shared=compiled.metadata.shared)


def instructions(compiled) -> str:
    """The machine code, disassembled."""
    with _cubin(compiled) as file:
        return machine_code.run_tool("nvdisasm", file)


_REDUCTION = re.compile(r'"tt\.reduce"\(.*?\}\) : \(([^)]*)\) ->', re.DOTALL)


def sums(compiled) -> list[str]:
    """The tensors of floats that are added up, in order, with how threads hold their elements."""
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", code, re.MULTILINE))
    types = [re.sub(r"#\w+\b(?!\.)", lambda m: layouts[m[0]], t) for t in _REDUCTION.findall(code)]
    return [t for t in types if re.search(r"xf(32|64),", t)]


# In PTX: `ld.global.L1::evict_first.v4.b32 {...}, [ %rd4 + 16 ];`, and for asynchronous copies
# `cp.async.cg.shared.global [ %r5 + 0 ], [ %rd7 + 0 ], 0x10, 0x10;`.
_ACCESS = re.compile(r"\b(ld|st)\.(?:volatile\.)?global([\w.:]*)\s[^\[]*\[\s*(%rd\d+)")
_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[.*?\],\s*\[\s*(%rd\d+).*?\],\s*(\w+)"
)
_PARAMETER = re.compile(r"\bld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_ASSIGNMENT = re.compile(r"^\s*(?:@!?%p\d+ )?(?!ld|st|cp|atom)[a-z][\w.:]*\s+(%rd\d+),\s*([^;]*);")


def access_widths(compiled) -> dict[tuple[str, str], set[int]]:
    """The widths in bits of all accesses to global memory: {(argument, "ld" or "st"): widths}."""
    names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    lines = compiled.asm["ptx"].splitlines()
    sources: dict[str, set[int]] = defaultdict(set)  # of a register: the pointers it comes from
    for line in lines:
        if found := _PARAMETER.search(line):
            sources[found[1]].add(int(found[2]))
    changed = True
    while changed:
        changed = False
        for found in filter(None, map(_ASSIGNMENT.match, lines)):
            inputs = re.findall(r"%rd\d+", found[2])
            known = set().union(*(sources[register] for register in inputs))
            changed |= not known <= sources[found[1]]
            sources[found[1]] |= known
    widths: dict[tuple[str, str], set[int]] = defaultdict(set)
    for line in lines:
        if found := _ACCESS.search(line):
            kind, form, register = found.groups()
            lanes = re.search(r"\.v(\d)", form)
            bits = int(re.search(r"\.[bfus](\d+)$", form)[1]) * int(lanes[1] if lanes else 1)
        elif found := _COPY.search(line):
            kind, register, bits = "ld", found[1], 8 * int(found[2], 0)
        else:
            continue
        pointers = {i for i in sources[register] if i < len(names)}
        if not pointers:
            raise ValueError(f"no argument is known behind {line.strip()}")
        for index in pointers:
            widths[names[index], kind].add(bits)
    return dict(widths)
