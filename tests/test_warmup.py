"""`cbam_fused.warmup` where there is nothing to warm up."""

import pytest
import torch
from torch import nn

import cbam_fused


def test_needs_a_module():
    with pytest.raises(TypeError, match=r"^warmup: model must be a torch.nn.Module; got function$"):
        cbam_fused.warmup(lambda x: x, torch.zeros(1))


@pytest.mark.parametrize(
    "example", [torch.zeros(1, 16, 4, 4), (torch.zeros(1, 16, 4, 4),), {"x": torch.zeros(1)}]
)
@pytest.mark.parametrize("model", [cbam_fused.CBAM(16), nn.ReLU()], ids=["gate", "no_parameters"])
def test_says_which_backend_computes_instead(model, example):
    message = (
        r"^warmup: there is nothing to compile for tensors on cpu: they are for backend reference "
        r"\(asked for by use_backend or CBAM_FUSED_BACKEND\)$"
    )
    with cbam_fused.use_backend("reference"), pytest.raises(RuntimeError, match=message):
        cbam_fused.warmup(model, example)
