"""The strategies of the CUDA backend: the same to the bit; what each takes from device memory."""

import itertools
import re

import pytest
import torch

from cbam_fused.schemas import SCHEMAS
from tests.arguments import arguments
from tests.cases import Case
from tests.fingerprint import fingerprint
from tests.simt import harness
from tests.simt.running import run

# Planes and channels of whole blocks; the last group of samples is smaller than the others.
CASES = (
    Case("wide", "many columns, few rows", (7, 64, 32, 32), kernel_size=3, norm="frozen"),
    Case("deep", "weights are much beside x: a block serves several tiles", (12, 512, 4, 32),
         kernel_size=3, hidden=32, residual="other", activation="relu"),
    Case("in_x_dtype", "MLP and convolution in the dtype of x", (7, 256, 16, 16), kernel_size=3,
         hidden=5, mlp_in_x_dtype=True, spatial_in_x_dtype=True, norm="none", conv_bias=True),
    Case("light", "one branch", (6, 256, 16, 16), kernel_size=3, pool="light", maps="light"),
    Case("avg", "no maximum over pixels", (6, 256, 16, 16), kernel_size=5, pool="avg",
         mlp_bias=False),
    Case("nan", "NaN stays in its sample", (6, 256, 16, 16), kernel_size=3, data="nan",
         norm="frozen"),
    Case("ties", "equal maxima in many blocks", (6, 256, 16, 16), kernel_size=3,
         data="relu_ties"),
)  # fmt: skip
RUNS = [
    (case, dtype, layout)
    for case, (dtype, layout) in itertools.product(
        CASES,
        ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"), (torch.float16, "nchw"),
         (torch.float32, "channels_last")),
    )
]  # fmt: skip
OPERATIONS = ("cbam_inference", "cbam_attend")


def small_cache(gate, samples: float) -> int:
    """Bytes of an L2 cache of which 0.4 are as large as so many samples of x and the weights."""
    weights = sum(w.numel() * w.element_size() for w in (gate.mlp_weight1, gate.mlp_weight2))
    return int((gate.x[0].numel() * gate.x.element_size() * samples + weights) / 0.4)


def hashed(operation: str, gate, device: dict, strategy: str = "", **settings):
    """Hashes of the operation's results, its kernels, what they moved, and from how far apart."""
    results, launches, traffic, reuse = run(operation, gate, device, strategy, **settings)
    # A CPU's NaN has the sign and the payload of either operand; a GPU has one NaN.
    one_nan = {
        name: result.where(~result.isnan(), torch.nan) if result.is_floating_point() else result
        for name, result in results.items()
    }
    return fingerprint(one_nan), [launch.kernel for launch in launches], traffic, reuse


STREAMING = {"l2_bytes": 1 << 30}


def skewed(gate, samples: float) -> dict:
    """A device on which groups have about a third as many samples, or a fourth."""
    return {"multiprocessors": 1, "l2_bytes": small_cache(gate, samples)}


def _name(kernel: str) -> str:
    return re.match(r"cbam_fused::(\w+)_kernel", kernel)[1]


def chosen(kernels: list[str]) -> str:
    names = list(map(_name, kernels))
    return next((name for name in ("skewed", "resident") if name in names), "streaming")


@pytest.mark.parametrize("run_", RUNS, ids=lambda r: f"{r[0]}-{str(r[1])[6:]}-{r[2]}")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_skewed_is_streaming_to_the_bit(operation, run_):
    case, dtype, layout = run_
    gate = case.gate(dtype, layout)
    expected, kernels, streamed, _ = hashed(operation, gate, STREAMING)
    assert chosen(kernels) == "streaming"
    for samples in (4.5, 9.9 if gate.residual is not None else 5.9):  # groups of one, and of more
        actual, kernels, traffic, _ = hashed(operation, gate, skewed(gate, samples), "skewed")
        assert chosen(kernels) == "skewed"
        assert actual == expected
        for name in ("x", "residual", "y"):
            if name in streamed:
                moved, before = traffic[name], streamed[name]
                assert (moved.loaded, moved.stored) == (before.loaded, before.stored)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["wide", "deep"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_skewed_order_finds_x_in_the_cache(operation, name, dtype, layout):
    """Of the L2 cache, 0.4 are touched from one use of x to the next; streaming touches more."""
    gate = next(case for case in CASES if case.name == name).gate(dtype, layout)
    device = skewed(gate, 9.9 if gate.residual is not None else 5.9)
    _, kernels, _, reuse = hashed(operation, gate, device, "skewed", count_reuse=True)
    assert chosen(kernels) == "skewed"
    assert 0 < reuse["x"] <= 0.4 * device["l2_bytes"]
    _, kernels, _, reuse = hashed(operation, gate, STREAMING, count_reuse=True)
    assert chosen(kernels) == "streaming"
    assert reuse["x"] > 0.4 * device["l2_bytes"]


RESIDENT = (
    Case("aligned", "two leaves a block", (3, 512, 4, 16), kernel_size=3, hidden=32, norm="frozen"),
    Case("odd", "planes of 7 x 7: rows that are no whole vectors", (2, 512, 7, 7), kernel_size=3,
         hidden=32, residual="other", activation="relu"),
    Case("odd_channels", "rows of 44 channels", (2, 44, 10, 10), kernel_size=7, hidden=3,
         residual="x"),
    Case("one_block", "a cluster of one", (2, 24, 5, 6), kernel_size=3, norm="none",
         conv_bias=True),
    Case("short", "the last block has one row", (2, 97, 8, 8), kernel_size=3, pool="avg",
         mlp_bias=False, activation="relu6"),
    Case("few_units", "fewer hidden units than blocks", (2, 256, 14, 14), kernel_size=3, hidden=5,
         mlp_in_x_dtype=True, spatial_in_x_dtype=True),
    Case("light", "one branch, one map", (2, 256, 6, 8), kernel_size=3, pool="light",
         maps="light"),
    Case("max", "the maximum alone", (2, 40, 8, 24), pool="max", maps="mean_max", kernel_size=5),
    Case("nan", "NaN stays in its sample", (2, 256, 6, 8), kernel_size=3, data="nan",
         norm="frozen"),
    Case("inf", "infinity too", (2, 48, 6, 8), kernel_size=3, data="inf", norm="frozen"),
    Case("n0", "an empty batch", (0, 64, 8, 8), kernel_size=3, norm="frozen"),
)  # fmt: skip
RESIDENT_RUNS = [
    (case, dtype, layout)
    for case in RESIDENT
    for dtype, layout in (
        (torch.float32, "nchw"), (torch.bfloat16, "channels_last"), (torch.bfloat16, "nchw"),
        (torch.float16, "channels_last"), (torch.float32, "channels_last"),
    )
]  # fmt: skip
SCHEDULES = (
    {},
    {"order": "descending", "resident": 2},
    {"order": "random", "seed": 1, "resident": 3},
    {"order": "random", "seed": 2, "resident": 0},
)


@pytest.mark.parametrize("run_", RESIDENT_RUNS, ids=lambda r: f"{r[0]}-{str(r[1])[6:]}-{r[2]}")
def test_resident_is_streaming_to_the_bit(run_):
    """And reads x once, in one launch, by whole sectors."""
    case, dtype, layout = run_
    gate = case.gate(dtype, layout)
    expected, kernels, _, _ = hashed("cbam_inference", gate, STREAMING)
    assert chosen(kernels) == "streaming"
    for schedule in SCHEDULES:
        actual, kernels, traffic, _ = hashed(
            "cbam_inference", gate, {"capability": 90}, count_sectors=True, **schedule
        )
        assert actual == expected, schedule
        if not gate.x.numel():
            continue
        assert [chosen([kernel]) for kernel in kernels] == ["resident"]
        size = gate.x.numel() * gate.x.element_size()
        assert traffic["x"].loaded == size * (2 if gate.residual is gate.x else 1)
        assert traffic["y"].stored == size
        assert 32 * traffic["y"].stored_sectors <= 1.05 * size + 32 * 8 * case.shape[0]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_schedule_changes_a_bit_of_the_skewed_order(operation, layout):
    gate = next(case for case in CASES if case.name == "ties").gate(torch.float32, layout)
    expected, _, _, _ = hashed(operation, gate, STREAMING)
    for schedule in (*SCHEDULES, {"repeat": 2}):
        actual, kernels, _, _ = hashed(operation, gate, skewed(gate, 4.5), "skewed", **schedule)
        assert chosen(kernels) == "skewed"
        assert actual == expected, schedule


DEVICES = {
    "streaming": {"capability": 80, "l2_bytes": 1 << 30},
    "skewed": {"capability": 80, "l2_bytes": 6 << 20},
    "resident": {"capability": 90, "l2_bytes": 60 << 20},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", SCHEMAS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_explain_says_what_is_launched(layout, operation, device):
    """The names, grids and shared memory of all launches, from meta tensors."""
    properties = {"multiprocessors": 1, "shared_bytes": 228 << 10, "block_shared_bytes": 227 << 10}
    properties |= DEVICES[device]
    for name in ("deep", "in_x_dtype", "wide"):
        case = next(case for case in CASES if case.name == name)
        values = arguments(case.gate(torch.bfloat16, layout))[operation]
        with harness.device(**properties), harness.settings() as kernels:
            getattr(harness.backend(), operation)(*values)
            launches = kernels.launches()
        ran = [(_name(x.kernel), x.blocks, x.threads, x.dynamic_bytes, x.cluster) for x in launches]
        operations = getattr(torch.ops, f"{harness.NAMESPACE}_explain")
        order = ("capability", "multiprocessors", "l2_bytes", "shared_bytes", "block_shared_bytes")
        operations.begin(*(properties[key] for key in order))
        getattr(operations, operation)(
            *(value.to("meta") if isinstance(value, torch.Tensor) else value for value in values)
        )
        lines = [line.split() for line in operations.end().splitlines()]
        explained = [(line[1], *map(int, line[2:])) for line in lines if line[0] == "launch"]
        assert explained == ran


@pytest.mark.parametrize("strategy", ["streaming", "skewed", "resident"])
def test_a_strategy_can_be_asked_for(strategy, monkeypatch):
    """By the environment, where it is possible."""
    monkeypatch.setenv("CBAM_FUSED_CUDA_STRATEGY", strategy)
    gate = next(case for case in CASES if case.name == "light").gate()
    for capability in (80, 90):
        _, kernels, _, _ = hashed("cbam_inference", gate, {"capability": capability})
        possible = strategy != "resident" or capability == 90
        assert chosen(kernels) == (strategy if possible else "streaming")


@pytest.mark.parametrize("device", [{"capability": 80}, {"clusters": 0}], ids=str)
def test_without_room_for_a_cluster_x_is_streamed(device):
    gate = Case("not_elsewhere", "asked for once only", (2, 256, 5, 6), kernel_size=3).gate()
    _, kernels, _, _ = hashed("cbam_inference", gate, {"capability": 90} | device)
    assert chosen(kernels) == "streaming"


def test_an_unknown_strategy_is_an_error(monkeypatch):
    monkeypatch.setenv("CBAM_FUSED_CUDA_STRATEGY", "fastest")
    message = (
        "cbam_inference: CBAM_FUSED_CUDA_STRATEGY must be streaming, skewed or resident; "
        "got fastest"
    )
    with pytest.raises(RuntimeError, match=message):
        hashed("cbam_inference", CASES[0].gate(), {})
