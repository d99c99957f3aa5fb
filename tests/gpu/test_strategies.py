"""The strategies of the CUDA backend on a GPU: the same to the bit."""

import pytest
import torch

import cbam_fused
from cbam_fused import CBAM
from tests.gpu import require_gpu

require_gpu("cuda")

STRATEGIES = ("streaming", "skewed", "resident")
SHAPES = ((3, 256, 56, 56), (5, 512, 28, 28), (9, 1024, 14, 14), (9, 2048, 7, 7))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_strategies_agree_to_the_bit(shape, dtype, layout, training, monkeypatch):
    torch.manual_seed(0)
    module = CBAM(shape[1], device="cuda", dtype=dtype).train(training)
    x = torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout)
    results = []
    for strategy in STRATEGIES:
        monkeypatch.setenv("CBAM_FUSED_CUDA_STRATEGY", strategy)
        with cbam_fused.use_backend("cuda"), torch.set_grad_enabled(training):
            results += [module(x).detach() for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)
