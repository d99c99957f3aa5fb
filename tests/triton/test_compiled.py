"""Every kernel compiled for every GPU architecture: what it takes, how wide its accesses are."""

import functools
import math
import re
import zlib
from dataclasses import dataclass, replace

import pytest
import torch

from cbam_fused import triton_kernels
from cbam_fused.triton_kernels.configurations import TABLES
from tests.cases import BY_NAME, Case
from tests.fingerprint import everything
from tests.triton.compiled import (
    CAPABILITIES,
    Record,
    access_widths,
    compile_for,
    instructions,
    on_meta,
    recorded,
    resources,
    sums,
)

# What one program may take of a multiprocessor's shared memory, by the smallest one of the
# architectures that run this code: compute capability 8.6 and 12.0 have 99 KB.
SHARED_MEMORY = 99 * 1024

LAYOUTS = {"NCHW": "nchw", "channels_last": "channels_last"}
TRAINING = Case("training", "a gate at the end of a residual block", residual="other",
                activation="relu")  # fmt: skip
INFERENCE = replace(TRAINING, name="inference", norm="frozen")


@dataclass(frozen=True)
class Run:
    """A gate of which all operations are compiled, forward and backward."""

    case: Case
    shape: tuple[int, int, int]  # C, H, W
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case}-{'x'.join(map(str, self.shape))}-{dtype}-{self.layout}"

    @functools.cached_property
    def gate(self):
        hidden = None if self.case.hidden is None else max(self.shape[0] // 16, 1)
        case = replace(self.case, shape=(2, *self.shape), hidden=hidden, data="zeros")
        return on_meta(case.gate(self.dtype, self.layout))


SHAPE = (64, 14, 14)
SAMPLE = (128, 7, 7)  # fits one program
ROWS = {f"{k}-{i}": row for k, table in TABLES.items() for i, row in enumerate(table)}

# The options that kernels are compiled for, each at one size.
OPTIONS = (
    "frozen", "no_norm", "conv_bias", "no_spatial_relu", "max", "lp", "all_pools", "single_layer",
    "light_even", "mlp_half", "residual_relu6", "relu_ties_even",
)  # fmt: skip
VARIANTS = ((torch.bfloat16, "nchw"), (torch.float32, "channels_last"))
RUNS = [
    *(Run(BY_NAME[name], SHAPE, *VARIANTS[i % 2]) for i, name in enumerate(OPTIONS)),
    *(Run(BY_NAME[name], SAMPLE, *VARIANTS[i % 2]) for i, name in enumerate(OPTIONS[-6:])),
    Run(TRAINING, SHAPE, torch.float64, "nchw"),
    Run(TRAINING, SHAPE, torch.float16, "channels_last"),
    Run(INFERENCE, SAMPLE, torch.float64, "nchw"),
]

# These always, the rest where all are asked for.
CHOSEN = (
    Run(INFERENCE, SAMPLE, torch.float32, "nchw"),
    Run(TRAINING, (256, 56, 56), torch.bfloat16, "channels_last"),
    Run(INFERENCE, (1024, 14, 14), torch.float32, "nchw"),
)


def exhaustive(values, chosen=()):
    return [v if v in chosen else pytest.param(v, marks=pytest.mark.exhaustive) for v in values]


@functools.lru_cache(maxsize=4)
def launches(run: Run) -> list[Record]:
    with recorded() as records:
        everything(triton_kernels, run.gate)
    return records


def row_launches(row) -> list[tuple[Run, Record]]:
    """The launches with a row's configuration, for the shape that it names."""
    c, h, w, dtype, layout = row.case
    runs = (
        Run(case, (c, h, w), getattr(torch, dtype), LAYOUTS[layout])
        for case in (TRAINING, INFERENCE)
    )
    pairs = ((run, record) for run in runs for record in launches(run))
    return [pair for pair in pairs if pair[1].configuration is row.configuration]


def expected_width(run: Run) -> int:
    """Bits: 128, or less where rows of x are no multiple of 16 bytes."""
    row = run.shape[0] if run.layout == "channels_last" else run.shape[1] * run.shape[2]
    return 8 * math.gcd(16, row * run.dtype.itemsize)


def check(run: Run, record: Record, capability: int) -> None:
    """No register is spilled, no array lies in memory of a thread's own, and every access to a
    tensor as large as x is as wide as the rows of x are aligned.
    """
    compiled = compile_for(capability, record)
    used = resources(compiled)
    assert (used.stack, used.local) == (0, 0), f"{used}: {record}, sm_{capability}"
    assert used.shared <= SHARED_MEMORY, f"{used}: {record}, sm_{capability}"
    large = {n for n, tensor in record.tensors().items() if tensor.shape == run.gate.x.shape}
    for (name, kind), widths in access_widths(compiled).items():
        if name in large:
            wide = min(widths) >= expected_width(run)
            assert wide, f"{kind} of {name}, {widths} bits: {record}, sm_{capability}"


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_tables_is_chosen_for_its_case(row):
    assert row_launches(ROWS[row])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("row", exhaustive(ROWS))
def test_every_row_for_every_architecture(row, capability):
    check(*row_launches(ROWS[row])[0], capability)


@pytest.mark.parametrize("run", exhaustive((*CHOSEN, *RUNS), CHOSEN), ids=str)
def test_every_kernel(run):
    """Each for one of the architectures."""
    for record in launches(run):
        check(run, record, CAPABILITIES[zlib.crc32(str(record).encode()) % len(CAPABILITIES)])


@pytest.mark.parametrize("layout", LAYOUTS.values())
@pytest.mark.parametrize("shape", [(64, 7, 7), (128, 8, 8), (512, 28, 28)], ids=str)
def test_attend_and_inference_add_in_one_order(shape, layout):
    """Their kernels are the same, with other arguments; the same sums over tensors that threads
    hold in the same way are bitwise equal.
    """
    orders = {}
    for record in launches(Run(INFERENCE, shape, torch.float32, layout)):
        name = record.kernel.__name__
        if name in ("sample_kernel", "pool_pixels_kernel", "gate_pool_channels_kernel"):
            orders.setdefault(name, []).append(sums(compile_for(90, record)))
    assert orders
    for attend, inference in orders.values():
        assert attend == inference != []


def test_the_machine_code_accesses_memory_as_its_ptx_does():
    """That widths may be read from the PTX."""
    kinds = set()
    for record in launches(CHOSEN[1]):
        compiled = compile_for(90, record)
        expected = {
            {"ld": "LDG", "st": "STG"}[kind]
            for (_, kind), widths in access_widths(compiled).items()
            if 128 in widths
        }
        wide = re.findall(r"\b(LDG|STG)(?:STS)?\.\S*\b128\b", instructions(compiled))
        assert set(wide) == expected, str(record)
        kinds |= expected
    assert kinds == {"LDG", "STG"}
