"""Bitwise the same: from run to run, for any number of threads, any batch, any memory address, with
AVX2 and AVX-512.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cbam_fused
from tests.calls import call, require_grad
from tests.cases import BY_NAME, run_id
from tests.fingerprint import RUNS, everything, fingerprint

BATCHED = ("frozen", "odd", "prime", "all_pools", "light_even", "residual_relu6", "relu_ties_even",
           "n3", "hw1_even",
           "no_spatial_relu", "single_layer", "single_layer_wide", "nan_one_sample")  # fmt: skip

PER_SAMPLE = ("y", "x grad", "residual grad", "inference", "channel_gate", "descriptors", "hidden",
              "pixel_ties",
              "pooled", "channel_ties", "logits")  # fmt: skip


def assert_same(actual, expected):
    different = [name for name in expected if actual[name] != expected[name]]
    assert not different, f"not bitwise equal: {', '.join(different)}"


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_any_number_of_threads_and_any_repeat(fused, threads, run):
    case, dtype, layout = run
    gate = case.gate(dtype, layout)
    threads(1)
    expected = fingerprint(everything(fused, gate))
    for count in (1, 2, 3, 4):
        threads(count)
        assert_same(fingerprint(everything(fused, gate)), expected)


def test_a_training_step_repeats_bitwise(backend):
    def step():
        gate = require_grad(BY_NAME["residual_relu"].gate())
        call(cbam_fused.cbam, gate).backward(gate.grad)
        return [gate.x.grad, gate.mlp_weight1.grad, gate.conv_weight.grad, gate.norm_weight.grad]

    with cbam_fused.use_backend(backend.name):
        assert all(map(torch.equal, step(), step()))


def frozen(case, dtype, layout):
    """The gate of `case` with a constant norm, so that samples do not meet."""
    return replace(case, norm="none" if case.norm == "none" else "frozen").gate(dtype, layout)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "nchw"), (torch.bfloat16, "channels_last")]
)
@pytest.mark.parametrize("name", BATCHED)
def test_a_sample_alone_is_the_sample_in_a_batch(fused, name, dtype, layout):
    gate = frozen(BY_NAME[name], dtype, layout)
    together = everything(fused, gate)
    for i in range(gate.x.shape[0]):
        tensors = {"x": gate.x, "grad": gate.grad, "residual": gate.residual}
        own = {k: None if v is None else v[i : i + 1] for k, v in tensors.items()}
        alone = everything(fused, replace(gate, **own))
        names = [name for name in PER_SAMPLE if name in alone and alone[name].numel()]
        assert_same(
            fingerprint({name: alone[name] for name in names}),
            fingerprint({name: together[name][i : i + 1] for name in names}),
        )


@pytest.mark.parametrize("run", [r for r in RUNS if r[0].name in BATCHED], ids=run_id)
def test_inference_is_attend_and_apply(fused, run):
    results = everything(fused, frozen(*run))
    assert fingerprint({"y": results["inference"]}) == fingerprint({"y": results["y"]})


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_any_memory_address(fused, run):
    """One element past a vector's alignment changes loads, never the order of a sum."""
    case, dtype, layout = run
    gate = case.gate(dtype, layout)

    def moved(tensor):
        if tensor is None:
            return None
        storage = tensor.new_empty(tensor.numel() + 1)
        view = storage[1:].as_strided(tensor.shape, tensor.stride())
        assert view.data_ptr() % 16
        return view.copy_(tensor)

    shifted = replace(gate, x=moved(gate.x), grad=moved(gate.grad), residual=moved(gate.residual))
    assert_same(fingerprint(everything(fused, shifted)), fingerprint(everything(fused, gate)))


def test_avx2_and_avx512_give_the_same_bits():
    """The widest vectors, in this process, give what narrower ones give in another."""
    if "cpu" not in cbam_fused.backends.available():
        pytest.skip("there is no compiled library")
    printed = in_process("avx2", "-m", "tests.fingerprint", "cpu")
    backend = cbam_fused.backends.get("cpu")
    for run, hashes in zip(RUNS, json.loads(printed).values(), strict=True):
        own = fingerprint(everything(backend, run[0].gate(*run[1:])))
        different = [name for name in own if own[name] != hashes[name]]
        assert not different, f"{run_id(run)}: not bitwise equal: {', '.join(different)}"


def test_the_baseline_is_within_rounding():
    """Processors without a fused multiply-add round more often; the rule holds there too."""
    if "cpu" not in cbam_fused.backends.available():
        pytest.skip("there is no compiled library")
    chosen = "cpu- and (plain or odd or nan or all_pools or residual_relu6 or relu_ties_even)"
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py", "-k", chosen)
    assert " passed" in in_process("baseline", *command)


def in_process(capability: str, *command: str) -> str:
    """What Python prints with that instruction set; raises if it fails."""
    environment = os.environ | {"CBAM_FUSED_CPU_CAPABILITY": capability}
    process = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
