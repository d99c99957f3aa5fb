"""Builds the harness with ninja: the CUDA sources as C++, and a runtime that stands for a device.

In each mode: the Python module `simt_kernels`, which registers the operations of ``csrc/cuda/*.cu``
(or of ``sample.cu``), and the program `runner`, which runs the kernels of ``planted/*.cu``.

===========  =======================================================================================
mode         how kernels are compiled
===========  =======================================================================================
plain        optimised, nothing else
access       every access to memory calls the runtime, which finds races in shared memory and
             accesses to global memory that are not counted
address      with AddressSanitizer and UndefinedBehaviorSanitizer
thread       with ThreadSanitizer
===========  =======================================================================================

Needs g++ on x86-64, ninja, pybind11, and the headers of CUDA: of the toolkit, or of a CUDA build of
PyTorch.
"""

import fcntl
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("tests", "simt")  # relative to ROOT, as every path in build.ninja
OUTPUT = Path("build", "simt")

FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",  # of classes that hold tensors, which PyTorch's headers hide
    "-ffp-contract=off",
    "-DTORCH_STABLE_ONLY",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DCBAM_NAMESPACE=cbam_fused_simt",
    "-DCBAM_DISPATCH_KEY=CPU",
    "-DCBAM_EXPLAIN_NAMESPACE=cbam_fused_simt_explain",
)

# What the kernels of a mode are compiled with; what its runtime is, which is never instrumented
# (`access` has that of `plain`, whose accesses.cpp answers the compiler's calls to
# ThreadSanitizer); what both are linked with. Of UndefinedBehaviorSanitizer there is only what may
# escape the runtime: with all of it kernels take twice as long to compile.
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
KERNEL_FLAGS = {
    "plain": ("-O1",),
    "access": ("-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
    "address": (
        "-O1",
        f"-fsanitize=address,{UNDEFINED}",
        "-fno-sanitize-recover=all",
        # Calls instead of inlined checks: kernels compile in two thirds of the time.
        *("--param", "asan-instrumentation-with-call-threshold=0"),
    ),
    "thread": ("-O1", "-fsanitize=thread"),
}
RUNTIME_FLAGS = {
    "plain": ("-O2",),
    "address": ("-O2", "-DSIMT_ADDRESS"),
    "thread": ("-O2", "-DSIMT_THREAD"),
}
LINK_FLAGS = {
    "plain": (),
    "access": (),
    "address": (f"-fsanitize=address,{UNDEFINED}",),
    "thread": ("-fsanitize=thread",),
}
MODES = tuple(KERNEL_FLAGS)

# Of compilers and other programs: a sanitizer that this process has preloaded is not for them.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@functools.cache
def cuda_include() -> Path | None:
    """The folder with CUDA's headers, or None."""
    candidates = [Path(home, "include") for home in [os.environ.get("CUDA_HOME")] if home]
    if nvcc := shutil.which("nvcc"):
        # It may be a wrapper: the compiler itself says where its toolkit is.
        dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        lines = _run(dry_run).stderr.splitlines()
        tops = [line.split("TOP=")[1] for line in lines if "TOP=" in line]
        candidates += [Path(top, "include") for top in tops]
    packages = [*site.getsitepackages(), sysconfig.get_paths()["purelib"]]
    for folder in packages:
        candidates += sorted(Path(folder, "nvidia").glob("*/include"))
    headers = ("cuda_runtime_api.h", "cuda_fp16.h")
    usable = (c.resolve() for c in candidates if all((c / name).exists() for name in headers))
    return next(usable, None)


@functools.cache
def unavailable() -> str:
    """Why the harness cannot be built here; empty where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it runs on Linux on x86-64, not on {platform.system()} on {platform.machine()}"
    if not shutil.which("g++"):
        return "g++ was not found"
    for package in ("ninja", "pybind11", "torch"):
        if not importlib.util.find_spec(package):
            return f"the Python package {package} is missing"
    if cuda_include() is None:
        return "there are no CUDA headers: neither nvcc nor a CUDA build of PyTorch was found"
    return ""


def module_path(mode: str, operations: str = "cuda") -> Path:
    """The module with the operations of ``csrc/cuda``, or "sample": that of ``sample.cu``."""
    name = f"simt_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    return ROOT / OUTPUT / mode / operations / name


def runner_path(mode: str) -> Path:
    return ROOT / OUTPUT / mode / "runner"


def library(name: str) -> str:
    """The path of a sanitizer's library, which a program that is not built with it must preload."""
    command = ["g++", f"-print-file-name=lib{name}.so"]
    return _run(command).stdout.strip()


def _words(arguments) -> str:
    return shlex.join(map(str, arguments)).replace("$", "$$")


def ninja_file() -> str:
    """The text of build.ninja, for every mode."""
    import pybind11

    torch = Path(importlib.util.find_spec("torch").origin).parent
    cuda = cuda_include()
    include = ["-I", HERE / "include", "-isystem", cuda, "-isystem", cuda / "cccl"]
    include += ["-isystem", torch / "include", "-isystem", pybind11.get_include()]
    include += ["-isystem", sysconfig.get_paths()["include"]]
    compiler = _words(["g++", *FLAGS, *include])
    lines = [
        "rule compile",
        f"  command = {compiler} $flags -MMD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = g++ $in -o $out $flags",
        "  description = link $out",
    ]

    def build(target, rule, sources, flags):
        lines.append(f"build {target}: {rule} {' '.join(map(str, sources))}")
        lines.append(f"  flags = {_words(flags)}")
        return target

    def objects(folder, sources, flags):
        return [build(OUTPUT / folder / f"{s}.o", "compile", [s], flags) for s in sources]

    def files(folder, pattern):
        return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))

    runtime = files(HERE / "runtime", "*.cpp")
    planted = files(HERE / "planted", "*.cu")
    operations = {"cuda": files("csrc/cuda", "*.cu"), "sample": [HERE / "sample.cu"]}
    runner, module = objects("main", [HERE / "runner.cpp", HERE / "module.cpp"], ["-O1"])
    runtimes = {
        variant: objects(f"runtime-{variant}", runtime, flags)
        for variant, flags in RUNTIME_FLAGS.items()
    }
    for mode in MODES:
        common = runtimes["plain" if mode == "access" else mode]
        if mode == "thread":  # has the functions of accesses.cpp from its library
            common = [path for path in common if path.name != "accesses.cpp.o"]
        build(
            runner_path(mode).relative_to(ROOT),
            "link",
            [*common, runner, *objects(mode, planted, KERNEL_FLAGS[mode])],
            ["-rdynamic", *LINK_FLAGS[mode]],
        )
        # -Bsymbolic: its own functions of the CUDA runtime, not those that PyTorch has loaded.
        shared = ["-shared", "-Wl,-Bsymbolic", f"-L{torch / 'lib'}", "-ltorch_cpu"]
        for name, sources in operations.items():
            build(
                module_path(mode, name).relative_to(ROOT),
                "link",
                [*common, module, *objects(mode, sources, KERNEL_FLAGS[mode])],
                [*shared, *LINK_FLAGS[mode]],
            )
    return "\n".join([f"builddir = {OUTPUT}", *lines, ""])


def build(*targets: Path) -> None:
    """Brings module_path(mode)s and runner_path(mode)s up to date.

    Raises RuntimeError with the compiler's messages. One process builds at a time.
    """
    folder = ROOT / OUTPUT
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = ninja_file()
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [sys.executable, "-m", "ninja", "-f", str(OUTPUT / "build.ninja"), "-k", "0"]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        command += [str(target.relative_to(ROOT)) for target in targets]
        done = _run(command)
    if done.returncode:
        raise RuntimeError(f"the harness did not build:\n{done.stdout}{done.stderr}")
