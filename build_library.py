"""Builds `cbam_fused/lib/libcbam_fused.so` with ninja, and writes `build.json` beside it: how.

`setup.py` holds the list of sources; this file turns it into setuptools commands. The library uses
the stable ABI of libtorch, of which it needs the CPU part only, and no Python headers: one file
serves every Python and every PyTorch from 2.11 on. CUDA sources are compiled where there is an nvcc
(`build_cuda.py`), GPU or not.

Environment: CXX (default g++), MAX_JOBS, SOURCE_DATE_EPOCH; CBAM_FUSED_CPP=0 builds the package
without the library. Where it cannot be built (no compiler, no PyTorch, not Linux) the package is
built without it too, and the record says why; so it does of the CUDA part.
"""

import hashlib
import importlib.util
import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar

from setuptools import Command
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

from build_cuda import CudaToolchain, NoCudaError

ROOT = Path(__file__).resolve().parent
OBJECTS = Path(
    "build", "cpp"
)  # relative to ROOT, as every path in build.ninja: no machine path is compiled in
LIBRARY = "libcbam_fused.so"
RECORD = "build.json"
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Source:
    """One object file: a source, its own flags, and a name where several come of one source."""

    path: str
    flags: tuple[str, ...] = ()
    variant: str = ""

    @property
    def object(self) -> str:
        name = Path(self.path).with_suffix("")
        return str(OBJECTS / (f"{name}.{self.variant}.o" if self.variant else f"{name}.o"))

    @property
    def is_cuda(self) -> bool:
        return self.path.endswith(".cu")


@dataclass(frozen=True)
class Flags:
    """Of every source: what all compilers know, and what only the C++ compiler does."""

    common: tuple[str, ...]
    host: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join((*self.common, *self.host))


class NotBuiltError(Exception):
    """The library cannot or shall not be built here; the message goes into the record."""


@dataclass(frozen=True)
class Toolchain:
    """The compilers and the PyTorch that the library is built with."""

    compiler: str
    compiler_version: str
    torch: Path
    torch_version: str
    cuda: CudaToolchain | None
    no_cuda: str  # why; empty where there is CUDA

    @classmethod
    def find(cls) -> "Toolchain":
        if os.environ.get("CBAM_FUSED_CPP") == "0":
            raise NotBuiltError("CBAM_FUSED_CPP=0 was set when the package was built")
        if platform.system() != "Linux":
            raise NotBuiltError(f"the library is built on Linux only, not on {platform.system()}")
        if platform.machine() != "x86_64":
            raise NotBuiltError(f"the library is built for x86_64 only, not {platform.machine()}")
        compiler = os.environ.get("CXX", "g++")
        if not shutil.which(compiler):
            raise NotBuiltError(
                f"no C++ compiler: {compiler} was not found when the package was built"
            )
        if not importlib.util.find_spec("ninja"):
            raise NotBuiltError("the Python package ninja was missing when the package was built")
        spec = importlib.util.find_spec("torch")
        if not spec:
            raise NotBuiltError("PyTorch was missing when the package was built")
        torch = Path(spec.origin).parent
        torch_version = runpy.run_path(str(torch / "version.py"))["__version__"]
        if tuple(int(part) for part in torch_version.split(".")[:2]) < OLDEST_TORCH:
            raise NotBuiltError(
                f"the library needs PyTorch 2.11 or later to build; found {torch_version}"
            )
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True
        )
        try:
            cuda, no_cuda = CudaToolchain.find(), ""
        except NoCudaError as reason:
            cuda, no_cuda = None, str(reason)
        return cls(compiler, version.stdout.splitlines()[0], torch, torch_version, cuda, no_cuda)


def words(arguments: Sequence[str]) -> str:
    """The arguments as part of a command in build.ninja."""
    return shlex.join(arguments).replace("$", "$$")


def compile_rule(name: str, command: list[str]) -> list[str]:
    return [
        f"rule {name}",
        f"  command = {words(command)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def ninja_file(sources: list[Source], flags: Flags, tools: Toolchain) -> str:
    """The text of build.ninja: a rule to compile for each compiler, one to link."""
    sources = [source for source in sources if tools.cuda or not source.is_cuda]
    include = tools.torch / "include"
    common = [*flags.common, "-isystem", str(include)]
    host = (*flags.host, f"-ffile-prefix-map={include}=torch")
    rules = compile_rule("compile", [tools.compiler, *common, *host])
    if tools.cuda:
        command = [*tools.cuda.command(tools.compiler, host), *common]
        rules += compile_rule("compile_cuda", command)
    link_flags = [
        f"-L{tools.torch / 'lib'}",
        "-ltorch_cpu",
        "-Wl,--as-needed",
        "-Wl,-s",  # symbols name temporary files of nvcc
        "-Wl,-z,defs",
        "-Wl,--exclude-libs,ALL",
        *(tools.cuda.libraries if tools.cuda else ()),
    ]
    lines = [
        f"builddir = {OBJECTS}",
        *rules,
        "rule link",
        f"  command = {words([tools.compiler])} -shared $in -o $out {words(link_flags)}",
        "  description = link $out",
    ]
    for source in sources:
        rule = "compile_cuda" if source.is_cuda else "compile"
        lines += [
            f"build {source.object}: {rule} {source.path}",
            f"  flags = {words(source.flags)}",
        ]
    lines += [
        f"build {OBJECTS / LIBRARY}: link {' '.join(source.object for source in sources)}",
        "",
    ]
    return "\n".join(lines)


def compile_library(sources: list[Source], flags: Flags, tools: Toolchain) -> Path:
    """Compile what has changed, link, and return the path of the library among the objects."""
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
    text = ninja_file(sources, flags, tools)
    (ROOT / OBJECTS / "build.ninja").write_text(text)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    command = [sys.executable, "-m", "ninja", "-f", str(OBJECTS / "build.ninja"), "-j", str(jobs)]
    environment = os.environ.copy()
    if tools.cuda:
        environment |= tools.cuda.environment(jobs // sum(source.is_cuda for source in sources))
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SystemExit(
            "cbam_fused: the library did not build; with CBAM_FUSED_CUDA=0 the package installs"
            " without its CUDA part, with CBAM_FUSED_CPP=0 without the library"
        )
    return ROOT / OBJECTS / LIBRARY


def schemas_digest() -> str:
    """SHA-256 of the operations' schemas, which `cbam_fused/library.py` compares with its own."""
    schemas = runpy.run_path(str(ROOT / "cbam_fused" / "schemas.py"))["SCHEMAS"]
    return hashlib.sha256(repr(schemas).encode()).hexdigest()


def build_record(
    library: Path, flags: Flags, capabilities: tuple[str, ...], tools: Toolchain
) -> dict:
    content = library.read_bytes()
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH", library.stat().st_mtime))
    return {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "schemas": schemas_digest(),
        "compiler": tools.compiler_version,
        "torch": tools.torch_version,
        "flags": str(flags),
        "capabilities": capabilities,
        "cuda": tools.cuda.version if tools.cuda else f"none: {tools.no_cuda}",
        "architectures": tools.cuda.architectures if tools.cuda else (),
        "date": datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds"),
    }


def replace(path: Path, content: bytes) -> None:
    """Write a file, if it changes, by renaming: who has the old one mapped keeps it intact."""
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def commands(sources: list[Source], flags: Flags, capabilities: tuple[str, ...]) -> dict:
    """The setuptools commands: `build_library`, `build` with it, a wheel tagged by its contents."""

    class BuildLibrary(Command):
        description = "build the library (compile and link what has changed)"
        user_options: ClassVar = [("inplace", "i", "put the library into the source tree")]
        boolean_options: ClassVar = ["inplace"]
        editable_mode = False

        def initialize_options(self):
            self.build_lib = None
            self.inplace = False

        def finalize_options(self):
            self.set_undefined_options("build_py", ("build_lib", "build_lib"))

        def run(self):
            in_tree = self.editable_mode or self.inplace
            folder = (ROOT if in_tree else Path(self.build_lib)) / "cbam_fused" / "lib"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                tools = Toolchain.find()
                library = compile_library(sources, flags, tools)
                replace(folder / LIBRARY, library.read_bytes())
                record = build_record(library, flags, capabilities, tools)
            except NotBuiltError as reason:
                (folder / LIBRARY).unlink(missing_ok=True)
                record = {"reason": str(reason)}
                print(f"cbam_fused: built without the library: {reason}")
            replace(folder / RECORD, json.dumps(record, indent=2).encode() + b"\n")
            self.built = "reason" not in record

        def get_source_files(self):
            return sorted({source.path for source in sources})

        def get_outputs(self):
            return [
                str(Path(self.build_lib, "cbam_fused", "lib", name)) for name in (LIBRARY, RECORD)
            ]

        def get_output_mapping(self):
            return {}

    class Build(build):
        sub_commands: ClassVar = [*build.sub_commands, ("build_library", None)]

    class BdistWheel(bdist_wheel):
        def run(self):
            self.run_command("build_library")
            self.root_is_pure = not self.get_finalized_command("build_library").built
            super().run()

        def get_tag(self):
            python, abi, machine = super().get_tag()
            return ("py3", "none", machine) if not self.root_is_pure else (python, abi, machine)

    return {"build_library": BuildLibrary, "build": Build, "bdist_wheel": BdistWheel}
