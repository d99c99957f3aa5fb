"""The compiled library: what it needs, what it registers, what happens where it cannot be used."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import cbam_fused
from cbam_fused import library
from cbam_fused.schemas import NAMESPACE, SCHEMAS

PACKAGE = Path(cbam_fused.__file__).parent
BUILT_OBJECTS = Path(__file__).parent.parent / "build" / "cpp"

# Runs in a process of its own: one gate through the package, then what `info` says, as JSON.
USE_PACKAGE = """
import json, sys, torch, cbam_fused
from cbam_fused import backends, info, library, reference
x, w1, w2 = torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.randn(8, 2)
y = cbam_fused.cbam(x, w1, None, w2, None)
torch.testing.assert_close(y, reference.cbam(x, w1, None, w2, None))
print(json.dumps({
    "folder": cbam_fused.__path__[0],
    "loaded": library.loaded,
    "reason": library.reason,
    "backend": backends.choose(x.device)[0].name,
    "schemas": [str(getattr(torch.ops.cbam_fused, n).default._schema) for n in sys.argv[1:]],
    "info": info.as_text(info.collect()),
}))
"""


def use_package(parent: Path, **environment: str) -> dict:
    """What USE_PACKAGE reports about the package found in `parent`."""
    unset = ("CBAM_FUSED_LIBRARY", "CBAM_FUSED_BACKEND")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.run(
        [sys.executable, "-B", "-c", USE_PACKAGE, *SCHEMAS],
        cwd=parent,
        env=inherited | {"PYTHONPATH": str(parent)} | environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert Path(report["folder"]) == parent / "cbam_fused"
    return report


@pytest.fixture
def parent(tmp_path) -> Path:
    """A folder with a copy of the package, library included, that a test may damage."""
    assert library.loaded, f"this test needs the library: {library.reason}"
    shutil.copytree(PACKAGE, tmp_path / "cbam_fused")
    return tmp_path


def truncate(lib: Path) -> None:
    content = (lib / "libcbam_fused.so").read_bytes()
    (lib / "libcbam_fused.so").write_bytes(content[: len(content) // 2])


def flip_a_bit(lib: Path) -> None:
    content = bytearray((lib / "libcbam_fused.so").read_bytes())
    content[len(content) // 2] ^= 1
    (lib / "libcbam_fused.so").write_bytes(content)


def edit_record(**changes: object) -> Callable[[Path], None]:
    def edit(lib: Path) -> None:
        record = json.loads((lib / "build.json").read_text())
        (lib / "build.json").write_text(json.dumps(record | changes))

    return edit


class Damage(NamedTuple):
    name: str
    inflict: Callable[[Path], None]
    reason: str
    environment: dict[str, str] = {}  # noqa: RUF012 (a NamedTuple's default)


DAMAGES = [
    Damage("truncated", truncate, "bytes, "),
    Damage("altered", flip_a_bit, "its SHA-256 differs"),
    Damage("missing", lambda lib: (lib / "libcbam_fused.so").unlink(), "No such file"),
    Damage("no_record", lambda lib: (lib / "build.json").unlink(), "it was never built"),
    Damage("bad_record", lambda lib: (lib / "build.json").write_text("{"), "cannot be read"),
    Damage("not_built", edit_record(reason="no C++ compiler"), "no C++ compiler"),
    Damage("other_schemas", edit_record(schemas="0"), "built for other schemas"),
    Damage(
        "disabled", lambda lib: None, "CBAM_FUSED_LIBRARY=0 is set", {"CBAM_FUSED_LIBRARY": "0"}
    ),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_without_library_the_reference_serves_and_info_says_why(parent, damage):
    damage.inflict(parent / "cbam_fused" / "lib")
    report = use_package(parent, **damage.environment)
    assert not report["loaded"]
    assert damage.reason in report["reason"]
    assert report["backend"] == "reference"
    assert f"not loaded: {report['reason']}" in report["info"]


def test_library_is_used_and_registers_the_schemas_of_the_package(parent):
    """The texts of csrc/library.cpp and of schemas.py, as PyTorch parses them, are equal."""
    with_library = use_package(parent)
    without = use_package(parent, CBAM_FUSED_LIBRARY="0")
    assert with_library["loaded"]
    assert with_library["backend"] == "cpu"
    assert "state" in with_library["info"]
    assert not without["loaded"]
    assert with_library["schemas"] == without["schemas"]
    assert len(without["schemas"]) == len(SCHEMAS)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cpu", "1.13.1"])
def test_older_torch_is_a_reason(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(library.UnusableError, match=r"needs PyTorch 2\.11 or later; this is"):
        library._check(library.build)


IMPORT_TWICE = """
import sys
import cbam_fused
for name in [name for name in sys.modules if name.split(".")[0] == "cbam_fused"]:
    del sys.modules[name]
sys.path[:0] = sys.argv[1:]
from cbam_fused import library
assert library.loaded, library.reason
"""


def import_twice(*folders: Path, **environment: str) -> subprocess.CompletedProcess:
    """Imports the package, forgets it, and imports it again, from `folders` first."""
    command = [sys.executable, "-c", IMPORT_TWICE, *map(str, folders)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_package_can_be_imported_again():
    """As by tools that purge sys.modules."""
    process = import_twice()
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("second", ["without_library", "another_copy"])
def test_second_registration_is_an_import_error(second, parent):
    """PyTorch would abort the process."""
    if second == "another_copy":
        process = import_twice(parent)
    else:
        process = import_twice(CBAM_FUSED_LIBRARY="0")
    assert "ImportError: cbam_fused: the operations were registered before" in process.stderr


def test_import_neither_compiles_nor_writes():
    code = """
import sys, torch
def forbid(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("subprocess.Popen", "os.posix_spawn", "os.system", "os.mkdir"):
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(forbid)
import cbam_fused
"""
    subprocess.run([sys.executable, "-B", "-c", code], check=True)


def readelf(*arguments: str) -> str:
    command = ["readelf", "--wide", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def dynamic_symbols() -> list[tuple[str, str]]:
    """(section, name) of the library's dynamic symbols; section UND: taken from another library."""
    assert library.loaded, f"this test needs the library: {library.reason}"
    rows = [line.split() for line in readelf("--dyn-syms", str(library.path)).splitlines()]
    return [(row[6], row[7].split("@")[0]) for row in rows if len(row) > 7 and row[0] != "Num:"]


def test_library_needs_no_other_library_of_pytorch_or_python(dynamic_symbols):
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", readelf("--dynamic", str(library.path))))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    system |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}  # parts of libc before 2.34
    assert "libtorch_cpu.so" in needed
    assert needed - {"libtorch_cpu.so"} - system <= {
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    }
    assert "RUNPATH" not in readelf("--dynamic", str(library.path))


def test_library_uses_only_the_stable_abi(dynamic_symbols):
    """C functions of libtorch, whose meaning is fixed; no C++ of PyTorch, nothing of Python."""
    taken = [name for section, name in dynamic_symbols if section == "UND"]
    assert any(name.startswith("aoti_torch_") for name in taken)
    forbidden = re.compile(r"_?Py[A-Z_]|_ZN?K?(2at|3c10|5torch)")
    assert [name for name in taken if forbidden.match(name)] == []


def test_library_exports_nothing_of_its_own(dynamic_symbols):
    exported = [name for section, name in dynamic_symbols if section != "UND"]
    assert [name for name in exported if NAMESPACE in name] == []


def test_objects_for_one_instruction_set_share_no_functions():
    """Of a function that several objects define the linker keeps one copy, for every processor."""
    objects = sorted(BUILT_OBJECTS.glob("**/kernels.*.o"))
    assert len(objects) == len(library.build["capabilities"]), "run `make build` first"
    for path in objects:
        rows = [line.split() for line in readelf("--symbols", str(path)).splitlines()]
        shared = [row[7] for row in rows if len(row) > 7 and row[4] in ("WEAK", "UNIQUE")]
        capability = path.suffixes[0].removeprefix(".")
        assert [name for name in shared if capability not in name] == []


def test_operations_of_the_library_name_the_instruction_set_in_use():
    assert library.loaded, f"this test needs the library: {library.reason}"
    assert torch.ops.cbam_fused.cpu_capability() in library.build["capabilities"]
