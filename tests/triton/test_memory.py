"""That watching memory finds what it is for."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.triton.memory import passes, watch


@triton.jit
def shift_kernel(source, target, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets + SHIFT, mask=offsets < n)
    tl.store(target + offsets, values, mask=offsets < n)


@triton.jit
def last_program_kernel(values, counter, total, ATOMIC: tl.constexpr):  # noqa: N803
    """The last program to come adds up what all have written."""
    index = tl.program_id(0)
    tl.store(values + index, index)
    ticket = tl.atomic_add(counter, 1) if ATOMIC else index
    if ticket == tl.num_programs(0) - 1:
        tl.store(total, tl.sum(tl.load(values + tl.arange(0, 4))))


def test_accesses_are_counted():
    source, target = torch.arange(10.0), torch.empty(10)
    with watch() as launches:
        shift_kernel[(3,)](source, target, 10, BLOCK=4, SHIFT=0)
    assert torch.equal(source, target)
    (launch,) = launches
    assert (launch.kernel, launch.programs) == ("shift_kernel", 3)
    assert launch.loaded == {"source": 40}
    assert launch.stored == {"target": 40}
    assert passes(launches, source) == (1, 1)


@pytest.mark.parametrize(("shift", "element"), [(-1, -1), (1, 10), (10_000, 10_000)])
def test_an_access_out_of_bounds(shift, element):
    """Even where it hits another tensor: these two lie in one block of memory."""
    source, target = torch.zeros(20).split(10)
    message = (
        rf"shift_kernel, program \d: load of source \[10\] out of bounds, at element {element}"
    )
    with watch(), pytest.raises(InterpreterError, match=message):
        shift_kernel[(3,)](source, target, 10, BLOCK=4, SHIFT=shift)


def test_a_masked_access_may_be_anywhere():
    with watch() as launches:
        shift_kernel[(3,)](torch.empty(0), torch.empty(0), 0, BLOCK=4, SHIFT=5)
    assert not launches[0].loaded


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shift", [1, -1])
def test_programs_that_meet(reverse, shift):
    values = torch.zeros(20)
    source, target = values[2:14], values[2 + shift : 14 + shift]
    message = "(load of source|store of target).* touches what another program"
    with watch(reverse), pytest.raises(InterpreterError, match=message):
        shift_kernel[(3,)](source, target, 12, BLOCK=4, SHIFT=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_programs_may_meet_after_an_atomic_operation(reverse):
    values, total = torch.empty(4, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    with watch(reverse):
        last_program_kernel[(4,)](values, torch.zeros(1, dtype=torch.int32), total, ATOMIC=True)
    assert total == 6
    with watch(reverse), pytest.raises(InterpreterError, match=r"of values .* touches"):
        last_program_kernel[(4,)](values, torch.zeros(1), total, ATOMIC=False)
