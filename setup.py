"""What is built: the packages, and one shared library from the sources listed here.

`build_library.py` turns the list into the library; nothing is downloaded.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build leaves this folder off the path

from build_library import Flags, Source, commands

# No contraction of a * b + c: the result of an expression must not depend on where the compiler
# sees it. Hidden visibility: the library exports nothing, it registers its operations when loaded.
FLAGS = Flags(
    common=(
        "-std=c++17",
        "-O3",
        "-DTORCH_STABLE_ONLY",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",  # 2.11, the oldest PyTorch that loads it
    ),
    host=(
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
    ),
)

SCHEMA_SOURCES = ("csrc/library.cpp",)

CPU_SOURCES = (
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/cbam_apply.cpp",
    "csrc/cpu/cbam_attend.cpp",
    "csrc/cpu/cbam_backward_input.cpp",
    "csrc/cpu/cbam_backward_reduce.cpp",
    "csrc/cpu/cbam_inference.cpp",
)

# Compiled once per instruction set; the launchers choose among them when the library runs.
CPU_KERNEL_SOURCES = ("csrc/cpu/kernels.cpp",)
# GCC 12 warns of its own intrinsics: no -Wuninitialized there.
CPU_KERNEL_FLAGS = (
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
CPU_CAPABILITIES = {
    "baseline": (),
    "avx2": ("-mavx2", "-mf16c", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mfma"),
}

CUDA_SOURCES = (
    "csrc/cuda/cbam_attend.cu",
    "csrc/cuda/skewed.cu",
    "csrc/cuda/resident.cu",
    "csrc/cuda/cbam_inference.cu",
    "csrc/cuda/cbam_backward_input.cu",
    "csrc/cuda/cbam_backward_reduce.cu",
    "csrc/cuda/cbam_apply.cu",
    "csrc/cuda/channel_gate.cu",
    "csrc/cuda/explain.cu",
)
# What the operations are registered with.
CUDA_FLAGS = (
    "-DCBAM_NAMESPACE=cbam_fused",
    "-DCBAM_DISPATCH_KEY=CUDA",
    "-DCBAM_EXPLAIN_NAMESPACE=cbam_fused_explain",
    "-Icsrc/cuda/device",
)

# What takes longest to compile comes first.
SOURCES = [
    *(Source(path, CUDA_FLAGS) for path in CUDA_SOURCES),
    *(
        Source(path, (*CPU_KERNEL_FLAGS, *flags, f"-DCBAM_CPU_CAPABILITY={name}"), variant=name)
        for path in CPU_KERNEL_SOURCES
        for name, flags in CPU_CAPABILITIES.items()
    ),
    *(Source(path) for path in CPU_SOURCES + SCHEMA_SOURCES),
]

setup(
    packages=[*find_packages(include=["cbam_fused", "cbam_fused.*"]), "cbam_fused.triton_kernels"],
    package_dir={"cbam_fused.triton_kernels": "triton_kernels"},
    include_package_data=False,
    cmdclass=commands(SOURCES, FLAGS, capabilities=tuple(CPU_CAPABILITIES)),
)
