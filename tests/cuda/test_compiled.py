"""Every kernel of the library, for every architecture that it was built for: what it takes, how
wide its accesses are.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from cbam_fused import library
from tests.cuda.compiled import ALWAYS_ALIGNED, TABLED, Code, Kernel, accesses, code, table

BUILT = [name for name in library.build.get("architectures", ()) if name.startswith("sm_")]
# Of the convolution or the norm, which may be in the type of x.
WITH_PARAMETERS = (
    *("apply_kernel", "input_gradient_kernel"),
    *("maps_backward_kernel", "reduce_products_kernel"),
)
TABLE = Path(__file__).with_name("resources.txt")

pytestmark = pytest.mark.skipif(not BUILT, reason="the library has no CUDA code")


class Compiled(NamedTuple):
    code: Code
    accesses: Counter[tuple[str, int]]


def check_memory_of_its_own(kernel: Kernel, compiled: dict[Kernel, Compiled]) -> None:
    """No registers are spilled, and no arrays lie in memory."""
    own = compiled[kernel]
    assert (own.code.resources.stack, own.code.resources.local) == (0, 0), kernel
    assert not {"LDL", "STL"} & {kind for kind, _ in own.accesses}, kernel


def check_kinds_of_memory(kernel: Kernel, compiled: dict[Kernel, Compiled]) -> None:
    """The compiler knows of every access whether it is to device memory or to shared memory; that
    of other blocks may only be read.
    """
    kinds = {kind for kind, _ in compiled[kernel].accesses}
    assert "ST" not in kinds, kernel
    assert "LD" not in kinds or kernel.name == "resident_kernel", kernel


def check_widths(kernel: Kernel, compiled: dict[Kernel, Compiled]) -> None:
    """Where rows of x are whole vectors it is accessed by nothing less: of 16-bit elements none is
    accessed singly, but for parameters. (Wider ones share their width with other tensors.)
    """
    own, other = compiled[kernel].accesses, compiled[kernel.unaligned()].accesses
    assert ("LDG", 128) in own, kernel
    assert not {("LDG", 128), ("STG", 128)} & set(other), kernel
    if kernel.element in ("__half", "__nv_bfloat16"):
        assert (("STG", 128) in own) == (("STG", 16) in other), kernel
        assert own["STG", 16] == 0, kernel
        allowed = other["LDG", 16] - 1 if kernel.name in WITH_PARAMETERS else 0
        assert own["LDG", 16] <= allowed, kernel


def check_wide_accesses(kernel: Kernel, compiled: dict[Kernel, Compiled]) -> None:
    """x comes, and y goes, by 16 bytes at a time; no element of y goes by itself."""
    own = compiled[kernel].accesses
    loads = "LDGSTS" if kernel.name == "resident_kernel" else "LDG"
    assert (loads, 128) in own, kernel
    applies = kernel.name == "resident_kernel" or kernel.others[-1] == "true"
    assert (("STG", 128) in own) == applies, kernel
    assert own["STG", 16] == 0, kernel


@pytest.mark.parametrize("architecture", BUILT)
def test_every_kernel(architecture):
    found = accesses(architecture)
    compiled = {
        kernel: Compiled(own, found[own.symbol]) for kernel, own in code(architecture).items()
    }
    assert any(kernel.is_aligned for kernel in compiled)
    for kernel in compiled:
        check_memory_of_its_own(kernel, compiled)
        check_kinds_of_memory(kernel, compiled)
        if kernel.is_aligned:
            check_widths(kernel, compiled)
        has_clusters = int(architecture[3:]) >= 90
        if kernel.name in ALWAYS_ALIGNED and (has_clusters or kernel.name != "resident_kernel"):
            check_wide_accesses(kernel, compiled)


def test_the_table_is_that_of_the_library():
    """After a change: ``python -m tests.cuda.compiled > tests/cuda/resources.txt``."""
    if missing := [name for name in TABLED if name not in BUILT]:
        pytest.skip(f"the library was not built for {', '.join(missing)}")
    kept = TABLE.read_text()
    if not kept.startswith(f"nvcc {library.build['cuda']}:"):
        pytest.skip(f"the table is of another compiler than {library.build['cuda']}")
    assert table() == kept
