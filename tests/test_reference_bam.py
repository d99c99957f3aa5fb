"""The specification of BAM against a module written from the paper, in float64."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cbam_fused import reference
from cbam_fused.reference import Layer, Norm
from tests.peers import randomise
from tests.rounding import check_equal

DOUBLE = torch.float64
CHANNELS, HIDDEN = 8, 4
COMBINE = {"sum": lambda a, b: a + b, "mul": lambda a, b: a * b, "max": torch.maximum}


class Bam(nn.Module):
    """Two `nn.Sequential`; `norm_last` adds norms behind the last layers, as in the paper."""

    def __init__(
        self, combine="sum", depth=1, dilation=4, convolutions=2, norm=True, norm_last=False
    ):
        super().__init__()
        self.combine, self.dilation = combine, dilation
        widths = [CHANNELS, *[HIDDEN] * depth, CHANNELS]
        linear = [(nn.Linear(a, b), nn.BatchNorm1d(b)) for a, b in pairwise(widths)]
        dilated = [
            nn.Conv2d(HIDDEN, HIDDEN, 3, padding=dilation, dilation=dilation)
            for _ in range(convolutions)
        ]
        convolution = [
            nn.Conv2d(CHANNELS, HIDDEN, 1),
            *dilated,
            nn.Conv2d(HIDDEN, 1, 1, bias=False),
        ]
        convolution = [(layer, nn.BatchNorm2d(layer.out_channels)) for layer in convolution]
        self.channel, self.spatial = (
            nn.Sequential(*self.branch(layers, norm, norm_last)) for layers in (linear, convolution)
        )

    @staticmethod
    def branch(layers, norm, norm_last):
        for layer, batch_norm in layers[:-1]:
            yield from (layer, batch_norm, nn.ReLU()) if norm else (layer, nn.ReLU())
        yield from layers[-1] if norm_last else layers[-1][:1]

    def forward(self, x):
        channel = self.channel(functional.adaptive_avg_pool2d(x, 1).flatten(1))[:, :, None, None]
        attention = COMBINE[self.combine](
            channel.expand_as(x), self.spatial(x).expand_as(x)
        ).sigmoid()
        return x + x * attention

    def specification(self, x: Tensor) -> Tensor:
        return reference.bam(
            x,
            layers(self.channel),
            layers(self.spatial),
            dilation=self.dilation,
            combine=self.combine,
        )


def layers(branch: nn.Sequential) -> list[Layer]:
    """What `branch` consists of, sharing its parameters and buffers."""
    result = []
    for module in branch:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            norm = Norm(
                module.weight, module.bias, module.running_mean, module.running_var,
                module.training, module.momentum, module.eps,
            )  # fmt: skip
            result[-1] = result[-1]._replace(norm=norm)
        elif not isinstance(module, nn.ReLU):
            result.append(Layer(module.weight, module.bias))
    return result


def build(**options) -> Bam:
    return randomise(Bam(**options))


def images(n: int = 3, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(n, CHANNELS, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def elements(module: Bam) -> int:
    return sum(tensor.numel() for tensor in (images(), *module.parameters()))


def outcome(module: Bam, function, x: Tensor) -> dict[str, Tensor]:
    """y, the gradients of x and of all parameters, and the running statistics afterwards."""
    x = x.detach().requires_grad_()
    y = function(x)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    inputs = {"x": x, **dict(module.named_parameters())}
    grads = torch.autograd.grad(y, list(inputs.values()), grad)
    buffers = {n: b for n, b in module.named_buffers() if "num_batches" not in n}
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True)), **buffers}


OPTIONS = {
    "paper": {"combine": "sum"},
    "authors_code": {"combine": "mul"},
    "max": {"combine": "max"},
    "paper_norms": {"norm_last": True},
    "no_norm": {"norm": False},
    "two_hidden_layers": {"depth": 2},
    "one_layer": {"depth": 0},
    "dilation_1": {"dilation": 1, "convolutions": 3},
    "no_dilated": {"convolutions": 0},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_bam_is_the_module(options, training):
    module = build(**options).train(training)
    twin = copy.deepcopy(module)
    expected = outcome(module, module, images())
    check_equal(outcome(twin, twin.specification, images()), expected, elements(module))


@pytest.mark.parametrize("combine", COMBINE)
def test_first_and_second_derivatives_are_those_of_finite_differences(combine):
    module = build(combine=combine, dilation=1, convolutions=1).train()
    x = images(2)[..., :3, :2].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(module.specification, (x,))
    assert torch.autograd.gradgradcheck(module.specification, (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_result_in_16_bits_is_rounded_once(dtype):
    module = build().eval().to(dtype)
    x = images(dtype=dtype)
    wide = copy.deepcopy(module).float().specification(x.float())
    assert torch.equal(module.specification(x), wide.to(dtype))


def test_autocast_changes_nothing():
    module = build().float().eval()
    x = images(dtype=torch.float32)
    expected = module.specification(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.specification(x), expected)


def test_layout_of_x_is_the_layout_of_the_result():
    module = build().eval()
    x = images().contiguous(memory_format=torch.channels_last)
    assert module.specification(x).is_contiguous(memory_format=torch.channels_last)
    assert module.specification(x[..., ::2]).is_contiguous()


def test_bam_is_one_graph():
    module = build().train()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin.specification, fullgraph=True, backend="aot_eager")
    check_equal(
        outcome(twin, compiled, images()), outcome(module, module, images()), elements(module)
    )


def test_an_empty_batch_changes_no_statistics():
    module = build().train()
    before = copy.deepcopy(module.state_dict())
    y = module.specification(images(0))
    assert y.shape == (0, CHANNELS, 5, 6)
    for grad in torch.autograd.grad(y.sum(), list(module.parameters())):
        assert torch.equal(grad, torch.zeros_like(grad))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("depth", "pixels", "expected"),
    [(1, 5, "N"), (0, 1, r"N \* H \* W")],
    ids=["channel", "spatial"],
)
def test_batch_statistics_of_one_value_are_an_error(depth, pixels, expected):
    module = build(depth=depth).train()
    before = copy.deepcopy(module.state_dict())
    x = images(1)[..., :pixels, :pixels]
    got = rf"float64 \[1, {CHANNELS}, {pixels}, {pixels}\]"
    with pytest.raises(
        ValueError, match=rf"^bam: x must have {expected} > 1 for batch statistics; got {got}"
    ):
        module.specification(x)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
