"""The Python in the documents runs, each block on its own."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cbam_fused.fuse.adapters import registry
from tests import official, pasted, yolo

ROOT = Path(__file__).parent.parent
# What readers have pasted or installed, and what stands for it here.
PASTED = {
    "models.cbam": {"CBAM": official.CBAM},
    "nets.attention": {"cbam_block": pasted.cbam_block},
    "mmyolo.models.plugins": {"CBAM": pasted.CBAM},
}


def blocks() -> list:
    """The Python blocks of every document."""
    parameters = []
    for document in ("README.md", "docs/swap.md"):
        found = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)
        assert found, document
        parameters += [pytest.param(text, id=f"{document}-{i}") for i, text in enumerate(found)]
    return parameters


@pytest.mark.parametrize("block", blocks())
def test_block_runs(block, monkeypatch):
    for path, contents in PASTED.items():
        for depth in range(1, path.count(".") + 2):
            package = ".".join(path.split(".")[:depth])
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        vars(sys.modules[path]).update(contents)
    monkeypatch.setattr(registry, "_registered", [])
    monkeypatch.setattr(yolo.tasks, "CBAM", None, raising=False)
    exec(compile(block, "the block", "exec"), {})
