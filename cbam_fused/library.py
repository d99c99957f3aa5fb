"""The compiled library: checked, then loaded when the package is imported.

Where it cannot be loaded the same schemas are registered from Python, and ``reason`` says why. The
file's size and SHA-256 must be those written down when it was built, because a truncated library
kills the process while it is being loaded; so must the schemas, because a library built from older
sources would fail later and less clearly. Nothing is compiled or written here.

``CBAM_FUSED_LIBRARY=0`` in the environment leaves the library unloaded.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from cbam_fused.schemas import NAMESPACE, SCHEMAS

OLDEST_TORCH = (2, 11)

path = Path(__file__).parent / "lib" / "libcbam_fused.so"


class UnusableError(Exception):
    """Why the library was not loaded."""


def _read_record() -> dict:
    record_path = path.with_name("build.json")
    try:
        return dict(json.loads(record_path.read_text()))
    except FileNotFoundError:
        raise UnusableError("it was never built: there is no lib/build.json") from None
    except (OSError, ValueError, TypeError) as error:
        raise UnusableError(f"lib/build.json cannot be read: {error}") from None


def _check(record: dict) -> None:
    """Raise UnusableError unless the file at ``path`` is the one that ``record`` describes."""
    if "reason" in record:
        raise UnusableError(record["reason"])
    if os.environ.get("CBAM_FUSED_LIBRARY") == "0":
        raise UnusableError("CBAM_FUSED_LIBRARY=0 is set")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise UnusableError(f"it needs PyTorch 2.11 or later; this is {torch.__version__}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableError(f"lib/{path.name} cannot be read: {error.strerror}") from None
    not_built = f"lib/{path.name} is not the file that was built"
    if len(content) != record.get("size"):
        raise UnusableError(f"{not_built}: {len(content)} bytes, not {record.get('size')}")
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        raise UnusableError(f"{not_built}: its SHA-256 differs")
    if schemas_digest() != record.get("schemas"):
        raise UnusableError("it was built for other schemas than this package's; build it again")


def schemas_digest() -> str:
    """SHA-256 of the schemas, as the build writes it down."""
    return hashlib.sha256(repr(SCHEMAS).encode()).hexdigest()


def _load() -> None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise UnusableError(f"the system cannot load it: {error}") from None


def _register_schemas() -> torch.library.Library:
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        definitions.define(name + schema)
    return definitions


loaded = False
"""Whether the compiled library is in use."""

reason = ""
"""Why it is not; empty when it is."""

build: dict = {}
"""How the library was built: compiler, PyTorch, flags, date; or the reason why it was not."""

# PyTorch aborts the process when a second library registers the same operations.
_registered = hasattr(getattr(torch.ops, NAMESPACE), next(iter(SCHEMAS)))
if _registered and str(path.resolve()) not in torch.ops.loaded_libraries:
    raise ImportError(
        "cbam_fused: the operations were registered before in this process, by another copy of"
        " the package or without its library; it can be imported in a new process only"
    )

try:
    build = _read_record()
    _check(build)
    _load()
    loaded = True
except UnusableError as unusable:
    reason = str(unusable)
    _definitions = _register_schemas()  # the registration lives as long as this object
