"""`cbam_fused.warmup` on a GPU, and every configuration that it may choose."""

import importlib

import pytest
import torch
from torch import nn

import cbam_fused
from cbam_fused.testing import check_gate
from tests.cases import BY_NAME
from tests.gpu import require_gpu

require_gpu("triton")

import triton  # noqa: E402

from cbam_fused.triton_kernels import configurations  # noqa: E402
from cbam_fused.triton_kernels.geometry import geometry  # noqa: E402

tuning = importlib.import_module("cbam_fused.warmup")  # the package's attribute is the function


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(configurations, "_tuned", {})
    with cbam_fused.use_backend("triton"):
        yield


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_compiled_afterwards(training, monkeypatch):
    model = nn.Sequential(cbam_fused.CBAM(48), nn.Conv2d(48, 8, 1)).train(training)
    x = torch.randn(3, 48, 20, 20)
    assert cbam_fused.warmup(model, x).operations

    compiled = []
    hook = lambda *_, **options: compiled.append(options["repr"])  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    with torch.set_grad_enabled(training):
        y = model(x)
    if training:
        y.sum().backward()
    assert y.isfinite().all()
    assert not compiled


@pytest.mark.alone
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_tuning(tmp_path, monkeypatch, training):
    """With the choices loaded, results are bitwise those of the process that made them."""
    model = cbam_fused.CBAM(256).train(training)
    x = torch.randn(16, 256, 14, 14, dtype=torch.bfloat16)
    path = tmp_path / "tuned.json"
    report = cbam_fused.warmup(model, x, tune=True, path=path)
    print(report)
    assert report.choices
    assert all(choice.seconds > 0 for choice in report.choices)
    with torch.no_grad():
        y = model(x)
    monkeypatch.setattr(configurations, "_tuned", {})
    cbam_fused.warmup(model, x, path=path)
    with torch.no_grad():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(("name", "layout"), [("odd", "nchw"), ("prime", "channels_last")])
@pytest.mark.parametrize("kernel", configurations.TABLES)
def test_every_candidate_is_within_rounding(fused, kernel, name, layout):
    gates = [BY_NAME[name].gate(torch.bfloat16, layout, draw) for draw in range(4)]
    shape = geometry(gates[0].x)
    for candidate in tuning.candidates(kernel, shape):
        configurations.tune(kernel, shape, candidate)
        try:
            check_gate(fused, *gates)
        except Exception as error:
            if not tuning.is_too_large(error):
                raise
