"""An installed package on its own, without a test framework: `python -I smoke.py cpu|reference`.

The argument is the backend that must be in use on a CPU. Five operations and the CBAM module run
forward and backward in both layouts and are held to the tolerance rule.
"""

import copy
import importlib.util
import sys

import torch

import cbam_fused
from cbam_fused import backends, info
from cbam_fused.testing import Gate, check_close, check_gate

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPE = (2, 64, 14, 14)
REDUCED = SHAPE[1] // 16
DRAWS = 8  # judged together: the error of one small gradient says little


def random_gate(seed: int, dtype: torch.dtype, layout: torch.memory_format) -> Gate:
    """A gate in training: batch statistics, a residual and a ReLU behind it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    channels = SHAPE[1]
    x, residual, grad = (normal(*SHAPE, dtype=dtype).to(memory_format=layout) for _ in range(3))
    return Gate(
        x=x,
        mlp_weight1=normal(REDUCED, channels) / channels**0.5,
        mlp_bias1=normal(REDUCED),
        mlp_weight2=normal(channels, REDUCED) / REDUCED**0.5,
        mlp_bias2=normal(channels),
        conv_weight=normal(1, 2, 7, 7) / 7,
        conv_bias=None,
        norm_weight=normal(1),
        norm_bias=normal(1),
        running_mean=None,
        running_var=None,
        residual=residual,
        grad=grad,
        batch_statistics=True,
        activation="relu",
    )


def module_results(module: cbam_fused.CBAM, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """y in eval mode without gradients, then y and the gradients of a training step."""
    module, x = copy.deepcopy(module), x.detach().clone().requires_grad_()
    with torch.no_grad():
        results = {"y (eval)": module.eval()(x)}
    y = module.train()(x)
    (y * y).sum().backward()
    results |= {"y (train)": y.detach(), "x.grad": x.grad}
    return results | {f"{name}.grad": p.grad for name, p in module.named_parameters()}


def check_module(layout: torch.memory_format) -> None:
    """`cbam_fused.CBAM` with the backend in use, against the reference in float32 and float64."""
    runs = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        module = cbam_fused.CBAM(SHAPE[1])
        x = torch.randn(SHAPE).to(memory_format=layout)
        actual = module_results(module, x)
        assert actual["y (train)"].is_contiguous(memory_format=layout), "the layout was not kept"
        with backends.use_backend("reference"):
            eager = module_results(module, x)
            expected = module_results(copy.deepcopy(module).double(), x.double())
        runs.append((actual, eager, expected))
    for name in runs[0][0]:
        check_close(
            f"CBAM: {name}", *(torch.stack([run[i][name] for run in runs]) for i in range(3))
        )


def main(expected_backend: str) -> None:
    assert importlib.util.find_spec("cbam_fused.triton_kernels"), "triton_kernels is missing"
    assert not importlib.util.find_spec("triton_kernels"), (
        "a top-level triton_kernels was installed"
    )
    backend, reason = backends.choose(torch.device("cpu"))
    assert backend.name == expected_backend, f"backend {backend.name}: {reason}"
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            check_gate(backend, *(random_gate(seed, dtype, layout) for seed in range(DRAWS)))
        check_module(layout)
    print(info.as_text(info.collect()))
    print(f"smoke test passed: torch {torch.__version__}, backend {backend.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
