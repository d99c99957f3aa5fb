"""Any shape, layout, options and placement of NaN and ties, drawn by hypothesis, under the same
rule as the cases.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cbam_fused
from cbam_fused import backends
from cbam_fused.schemas import ACTIVATIONS, MAPS, POOL_TYPES, SCHEMAS, TIES
from cbam_fused.testing import attend
from tests.arguments import arguments, check_operation
from tests.calls import call
from tests.cases import DATA, LAYOUTS, Case
from tests.ties import maxima
from tests.usable import FUSED

POOLS = ["light"] + [
    "+".join(t for i, t in enumerate(POOL_TYPES) if mask >> i & 1)
    for mask in range(1, 2 ** len(POOL_TYPES))
]


@st.composite
def cases(
    draw, data=("random", "relu_ties", "negative"), norms=("batch", "frozen", "none")
) -> Case:
    shape = (
        draw(st.integers(1, 4)),
        draw(st.integers(2, 40)),
        draw(st.integers(3, 14)),
        draw(st.integers(3, 14)),
    )
    return Case(
        name=f"drawn-{draw(st.integers(0, 1000))}",
        reason="drawn by hypothesis",
        shape=shape,
        data=draw(st.sampled_from(data)),
        hidden=draw(st.sampled_from([1, 2, 5, 8, None])),
        mlp_bias=draw(st.booleans()),
        mlp_in_x_dtype=draw(st.booleans()),
        spatial_in_x_dtype=draw(st.booleans()),
        mlp_4d=draw(st.booleans()),
        kernel_size=draw(st.sampled_from([None, 1, 3, 5, 7, 7, 7])),
        conv_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(norms)),
        norm_affine=draw(st.booleans()),
        residual=draw(st.sampled_from(["none", "other", "x"])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        pool=draw(st.sampled_from(POOLS)),
        maps=draw(st.sampled_from(MAPS)),
        ties=draw(st.sampled_from(TIES)),
    )


dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
layouts = st.sampled_from(list(LAYOUTS))
names = pytest.mark.parametrize("name", FUSED)


@names
@pytest.mark.parametrize("operation", SCHEMAS)
@given(case=cases(), dtype=dtypes, layout=layouts)
def test_results_are_within_rounding(name, operation, case, dtype, layout):
    def draws(precision):
        return [arguments(gate) for gate in case.gates(precision, layout)]

    check_operation(backends.get(name), operation, dtype, draws)


@names
@given(case=cases(data=tuple(DATA)), dtype=dtypes, layout=layouts)
def test_ties_are_exact(name, case, dtype, layout):
    gate = case.gate(dtype, layout)
    attended = attend(backends.get(name), gate)
    if attended.pixel_ties.numel():
        assert torch.equal(attended.pixel_ties, maxima(gate.x.flatten(2), 2, gate.ties))
    if gate.conv_weight is not None:
        product = gate.x.to(attended.channel_gate.dtype) * attended.channel_gate[:, :, None, None]
        assert torch.equal(attended.channel_ties, maxima(product, 1, gate.ties))


@names
@given(case=cases(norms=("frozen", "none")), dtype=dtypes, layout=layouts, data=st.data())
def test_nan_is_where_pytorch_has_it(name, case, dtype, layout, data):
    """Forward: a NaN anywhere in a sample reaches all of that sample (through its gates), and no
    other.
    """
    gate = case.gate(dtype, layout)
    places = [data.draw(st.integers(0, size - 1)) for size in case.shape]
    x = gate.x.clone(memory_format=torch.preserve_format)
    x[tuple(places)] = float("nan")
    gate = replace(gate, x=x, residual=None)
    results = {}
    for backend in (name, "reference"):
        with cbam_fused.use_backend(backend):
            results[backend] = call(cbam_fused.cbam, gate).isnan()
    assert torch.equal(results[name], results["reference"])
    others = [n for n in range(case.shape[0]) if n != places[0]]
    assert not results[name][others].any()
    assert results[name][tuple(places)]


@names
@given(case=cases(data=tuple(DATA), norms=("frozen", "none")), dtype=dtypes, layout=layouts)
def test_samples_do_not_meet(name, case, dtype, layout):
    gate = case.gate(dtype, layout)
    with cbam_fused.use_backend(name):
        together = call(cbam_fused.cbam, gate)
        for i in range(case.shape[0]):
            residual = None if gate.residual is None else gate.residual[i : i + 1]
            alone = call(cbam_fused.cbam, replace(gate, x=gate.x[i : i + 1], residual=residual))
            torch.testing.assert_close(alone[0], together[i], rtol=0, atol=0, equal_nan=True)
