"""`cbam_fused.warmup` where there is nothing to warm up."""

import pytest
import torch
from torch import nn

import cbam_fused
from cbam_fused import backends
from tests.usable import USABLE

needs_the_library = pytest.mark.skipif("cpu" not in USABLE, reason="backend cpu is not under test")


def test_needs_a_module():
    with pytest.raises(TypeError, match=r"^warmup: model must be a torch.nn.Module; got function$"):
        cbam_fused.warmup(lambda x: x, torch.zeros(1))


@pytest.mark.parametrize(
    "example", [torch.zeros(1, 16, 4, 4), (torch.zeros(1, 16, 4, 4),), {"x": torch.zeros(1)}]
)
@pytest.mark.parametrize("model", [cbam_fused.CBAM(16), nn.ReLU()], ids=["gate", "no_parameters"])
def test_says_that_the_reference_computes_instead(model, example):
    message = (
        r"^warmup: nothing to compile: tensors on cpu are for backend reference "
        r"\(asked for by use_backend or CBAM_FUSED_BACKEND\)$"
    )
    with cbam_fused.use_backend("reference"), pytest.raises(RuntimeError, match=message):
        cbam_fused.warmup(model, example)


@needs_the_library
def test_the_library_is_compiled_already():
    ran = []
    model = cbam_fused.CBAM(16)
    model.register_forward_hook(lambda *_: ran.append(1))
    with cbam_fused.use_backend("cpu"):
        report = cbam_fused.warmup(model, torch.zeros(1, 16, 4, 4))
    assert (report.operations, report.choices, ran) == ((), (), [])
    assert str(report) == (
        "nothing to compile: tensors on cpu are for backend cpu "
        "(asked for by use_backend or CBAM_FUSED_BACKEND)"
    )


def test_cuda_kernels_are_compiled_already(monkeypatch):
    chosen = backends.get("reference")._replace(name="cuda")
    monkeypatch.setattr(backends, "choose", lambda device: (chosen, "the reason"))
    report = cbam_fused.warmup(cbam_fused.CBAM(16, device="meta"), torch.zeros(1, 16, 4, 4))
    assert str(report) == "nothing to compile: tensors on meta are for backend cuda (the reason)"


@needs_the_library
@pytest.mark.parametrize("asked", [{"tune": True}, {"path": "tuned.json"}], ids=["tune", "path"])
def test_the_library_is_not_tuned(asked):
    message = (
        r"^warmup: nothing to tune: tensors on cpu are for backend cpu "
        r"\(asked for by use_backend or CBAM_FUSED_BACKEND\)$"
    )
    with cbam_fused.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        cbam_fused.warmup(cbam_fused.CBAM(16), torch.zeros(1, 16, 4, 4), **asked)
