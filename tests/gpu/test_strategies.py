"""The strategies of the CUDA backend on a GPU: the same to the bit."""

from concurrent.futures import ThreadPoolExecutor

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


def resident_gates() -> list[tuple[CBAM, torch.Tensor]]:
    """Gates whose clusters need different amounts of shared memory, with their inputs."""
    torch.manual_seed(0)
    shapes = ((4, 1024, 14, 14), (4, 2048, 7, 7), (4, 512, 14, 14))
    return [
        (
            CBAM(shape[1], device="cuda", dtype=torch.bfloat16).eval(),
            torch.randn(shape, device="cuda", dtype=torch.bfloat16),
        )
        for shape in shapes
    ]


@pytest.fixture
def resident(monkeypatch):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("there are no clusters before compute capability 9.0")
    monkeypatch.setenv("CBAM_FUSED_CUDA_STRATEGY", "resident")


@torch.inference_mode()
def test_threads_need_different_shared_memory(resident):
    gates = resident_gates()
    expected = [module(x) for module, x in gates]

    def repeat(index: int) -> bool:
        module, x = gates[index]
        with torch.inference_mode():
            return all(torch.equal(module(x), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(len(gates)) as pool:
        assert all(pool.map(repeat, range(len(gates))))


@torch.inference_mode()
def test_one_graph_with_different_shared_memory(resident):
    gates = resident_gates()
    expected = [module(x) for module, x in gates]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [module(x) for module, x in gates]
    for result in results:
        result.zero_()
    graph.replay()
    assert all(map(torch.equal, results, expected))
