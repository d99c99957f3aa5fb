"""What the tests of `explain` share."""

import pytest
import torch
from torch import nn

import cbam_fused
from cbam_fused import CBAM, library

needs_cuda_code = pytest.mark.skipif(
    not (library.loaded and library.build.get("architectures")),
    reason="the library has no CUDA code",
)
STAGE1 = (64, 256, 56, 56)
FORWARD = ["cbam_attend", "cbam_apply"]
BACKWARD = ["cbam_backward_reduce", "cbam_backward_input"]


class SingleLayer(nn.Module):
    """A gate without hidden units, by the functional form."""

    def __init__(self, channels):
        super().__init__()
        self.mlp_weight = nn.Parameter(torch.empty(channels, channels, device="meta"))
        self.conv_weight = nn.Parameter(torch.empty(1, 2, 7, 7, device="meta"))

    def forward(self, x):
        return cbam_fused.cbam(x, None, None, self.mlp_weight, None, self.conv_weight)


class WithEpilogue(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gate = CBAM(channels, device="meta")

    def forward(self, x):
        return self.gate(x, residual=torch.empty_like(x), activation="relu")


def gate(channels=256, **options):
    return CBAM(channels, device="meta", **options)
