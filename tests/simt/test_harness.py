"""The harness itself: every error planted in a kernel is found, and sound kernels pass."""

import itertools
import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from cbam_fused.schemas import SCHEMAS
from tests.simt import build, harness

pytestmark = pytest.mark.skipif(bool(harness.unavailable()), reason=harness.unavailable())

SOUND = (
    "row_sums_float",
    "row_sums_bfloat16",
    "cluster_sums_of_2",
    "cluster_sums_of_8",
    "rotate",
    "reverse",
    "async_copy",
    "chain",
    "visit",
    "collectives",
    "refused",
    "dynamic_shared",
    "coalesced_copy",
    "strided_copy",
    "launch_errors",
    "repeated",
    "copied_twice",
    "shared_with_next",
    "memory_of_another",
    "interleaved",
)


class Planted(NamedTuple):
    """An error in a kernel: what is said of it in every mode, or in those that find it."""

    message: str = ""
    access: str = ""
    address: str = ""
    thread: str = ""


RACE = "race in shared memory: "
THREAD_RACE = "ThreadSanitizer: data race"
NAN = "wrong result: .* is -?nan"
NO_WARP = (
    "deadlock: 48 threads of block 0 wait for __syncthreads .*16 threads of block 0 wait for the"
)

PLANTED = {
    "no_barrier": Planted(NAN, access=RACE + "load of byte 0 of parts", thread=THREAD_RACE),
    "no_trailing_barrier": Planted(access=RACE + "store of byte 0 of parts", thread=THREAD_RACE),
    "no_cluster_barrier": Planted(NAN, access=RACE, thread=THREAD_RACE),
    "rotate_by_shuffle": Planted(access=RACE + "load of byte 4 of values", thread=THREAD_RACE),
    "rotate_by_half_warps": Planted(access=RACE, thread=THREAD_RACE),
    "shared_out_of_bounds": Planted(
        NAN,
        access="store of 4 bytes outside of what is declared in shared memory",
        address="AddressSanitizer: use-after-poison",
    ),
    "dynamic_out_of_bounds": Planted(
        access="store of 4 bytes outside of what is declared in shared memory",
        address="AddressSanitizer: use-after-poison",
    ),
    "shared_misaligned": Planted(address="runtime error: store to misaligned address"),
    "static_shared_too_large": Planted("65536 bytes of static shared memory; the device has 49152"),
    "divergent_barrier": Planted("divergent __syncthreads: thread 0 waits at row_sums.cu:"),
    "divergent_warp": Planted(NO_WARP),
    "exited_lane": Planted("lane 8 exits while lane 0 waits for it at row_sums.cu:"),
    "peer_exits_early": Planted("exits while another may use its shared memory"),
    "global_out_of_bounds": Planted("store of 4 bytes out of bounds: 0 bytes behind sums"),
    "global_misaligned": Planted("store of 4 bytes at a misaligned address: byte 2 of sums"),
    "unannounced": Planted("load of 4 bytes out of bounds: "),
    "uncounted": Planted(access="load of 4 bytes of global memory that was not noted"),
    "too_wide": Planted("load of 32 bytes at once"),
    "uninitialised": Planted(NAN),
    "async_copy_not_awaited": Planted(NAN),
    "index_overflow": Planted(r"32-bit overflow: 16 \* 268435456"),
    "race_of_blocks": Planted(thread=THREAD_RACE),
    "wait_for_smaller_block_index": Planted("deadlock: 1 threads of block 11 wait for a flag at"),
    "wait_for_larger_ticket": Planted("deadlock: 1 threads of block 0 wait for a flag at flags.cu"),
    "never_signalled": Planted("deadlock: 1 threads of block 1 wait for a flag at flags.cu"),
    "signal_before_store": Planted(NAN, thread=THREAD_RACE),
    "relies_on_cleared_memory": Planted("another result where it is launched twice"),
    "relies_on_being_alone": Planted(
        "deadlock: 1 threads of block 0 of launch 1 wait for a flag at streams.cu:.*"
        "; 1 threads of block 0 of launch 2 wait for a flag"
    ),
    "share_scratch": Planted(thread=THREAD_RACE),
    "one_stream": Planted("two launches on one stream"),
}


def run(mode: str, *cases: str) -> subprocess.CompletedProcess:
    runner = build.runner_path(mode)
    build.build(runner)
    return subprocess.run(
        [runner, *cases],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("mode", build.MODES)
def test_sound_kernels_pass(mode):
    done = run(mode, *SOUND)
    assert done.returncode == 0, done.stdout


FOUND = [
    pytest.param(mode, case, message, id=f"{mode}-{case}")
    for mode, (case, planted) in itertools.product(build.MODES, PLANTED.items())
    if (message := getattr(planted, mode, "") or planted.message)
]


@pytest.mark.parametrize(("mode", "case", "message"), FOUND)
def test_planted_errors_are_found(mode, case, message):
    done = run(mode, case)
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout


def test_every_case_is_tested():
    cases = run("plain").stdout.split()
    assert sorted(cases) == sorted([*SOUND, *PLANTED])


@pytest.fixture
def x():
    return torch.arange(5 * 77, dtype=torch.float32).reshape(5, 77)


def row_sums(x, claimed):
    harness.load("sample")
    return torch.ops.simt_sample.row_sums(x, claimed)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_operations_run_on_tensors(x, order, resident):
    with harness.settings("sample", order=order, seed=1, resident=resident):
        assert torch.equal(row_sums(x, 77), x.sum(1))


def test_traffic_and_launches_are_counted(x):
    with harness.settings("sample", count_sectors=True) as kernels:
        row_sums(x, 77)
        traffic, (launch,) = kernels.traffic(), kernels.launches()
    assert (traffic["x"].loaded, traffic["x"].stored) == (x.nbytes, 0)
    assert (traffic["sums"].loaded, traffic["sums"].stored) == (0, 5 * 4)
    # A row of 308 bytes begins within a sector, and so do the 128 bytes of each request.
    first = x.data_ptr()
    requests = [(row * 308 + at, min(128, 308 - at)) for row in range(5) for at in (0, 128, 256)]
    sectors = [(first + at + size - 1) // 32 - (first + at) // 32 + 1 for at, size in requests]
    assert traffic["x"].loaded_sectors == sum(sectors)
    assert traffic["sums"].stored_sectors == 5
    assert (launch.kernel, launch.blocks, launch.threads) == ("simt_sample::row_sums_kernel", 5, 32)


def test_distances_of_reuse_are_counted(x):
    """Sectors that rows share are used by two blocks, and all of x by two launches.

    Between the two uses of its last sector that lie farthest apart there are its other 48 and the
    one of either result; between two blocks' uses of that one, a row's sectors: 11 at most.
    """
    with harness.settings("sample", count_reuse=True) as kernels:
        results = [row_sums(x, 77) for _ in range(2)]
        reuse = kernels.reuse()
        kernels.reset()
        assert kernels.reuse() == {}
    assert results[0].data_ptr() // 32 != results[1].data_ptr() // 32
    assert x.data_ptr() % 32 == 0
    assert reuse == {"x": 32 * 50, "sums": 32 * 11}


def test_launches_are_repeated(x):
    with harness.settings("sample", repeat=3) as kernels:
        assert torch.equal(row_sums(x, 77), x.sum(1))
        assert kernels.traffic()["x"].loaded == 3 * x.nbytes
        assert len(kernels.launches()) == 1


def test_counts_begin_anew(x):
    for _ in range(2):
        with harness.settings("sample") as kernels:
            row_sums(x, 77)
            assert kernels.traffic()["x"].loaded == x.nbytes
            assert len(kernels.launches()) == 1


def test_a_kernels_error_is_an_exception(x):
    message = (
        r"load of 4 bytes out of bounds: 0 bytes behind x \[simt_sample::row_sums_kernel, block 4"
    )
    with pytest.raises(RuntimeError, match=message):
        row_sums(x, 78)
    assert torch.equal(row_sums(x, 77), x.sum(1))


def test_a_refused_launch_is_an_exception(x):
    with pytest.raises(RuntimeError, match="cudaErrorInvalidConfiguration"):
        row_sums(x[:0], 77)


def test_fresh_memory_is_filled(x):
    """With nothing to add up, and no thread that stores: the value is what memory held."""
    with harness.settings("sample", fill=0):
        assert torch.equal(row_sums(x, -1), torch.zeros(5))
    assert row_sums(x, -1).isnan().all()


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order must be ascending, descending or random; got odd"):
        harness.settings("sample", order="odd").__enter__()


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_backend_has_every_operation(name):
    operation = getattr(harness.backend(), name)
    assert str(operation._schema) == f"cbam_fused_simt::{name}" + SCHEMAS[name].replace('"', "")


def run_python(mode: str, code: str) -> subprocess.CompletedProcess:
    """The code in a Python process with this mode, after `load`."""
    load = "import torch; from tests.simt import harness; harness.load('sample')\n"
    return subprocess.run(
        [sys.executable, "-c", load + code],
        cwd=build.ROOT,
        env=harness.environment(mode),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("mode", build.MODES)
def test_every_mode_runs_in_python(mode):
    done = run_python(
        mode,
        "x = torch.ones(3, 40)\n"
        "assert torch.equal(torch.ops.simt_sample.row_sums(x, 40), x.sum(1))\n",
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("access", "out_of_bounds", "outside of what is declared in shared memory"),
        ("address", "out_of_bounds", "AddressSanitizer: use-after-poison"),
        ("thread", "race", "ThreadSanitizer: data race"),
    ],
)
def test_what_only_a_mode_finds_is_found_in_python(mode, error, message):
    code = (
        "with harness.settings('sample', resident=0):\n"
        f"    torch.ops.simt_sample.broken(torch.zeros(1), '{error}')\n"
    )
    assert run_python("plain", code).returncode == 0
    done = run_python(mode, code)
    assert done.returncode != 0
    assert message in done.stdout, done.stdout
