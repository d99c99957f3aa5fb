"""The authors' CBAM, written afresh from its published signature, to compare with.

Class names, constructor arguments and state_dict keys are those of Jongchan/attention-module,
``MODELS/cbam.py``; the computation is eager PyTorch, operation by operation.
"""

import torch
from torch import nn
from torch.nn import functional


class Flatten(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


class BasicConv(nn.Module):
    def __init__(
        self,
        in_planes,
        out_planes,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        relu=True,
        bn=True,
        bias=False,
    ):
        super().__init__()
        self.out_channels = out_planes
        self.conv = nn.Conv2d(
            in_planes, out_planes, kernel_size, stride, padding, dilation, groups, bias
        )
        self.bn = nn.BatchNorm2d(out_planes, eps=1e-5, momentum=0.01) if bn else None
        self.relu = nn.ReLU() if relu else None

    def forward(self, x):
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return x if self.relu is None else self.relu(x)


def logsumexp_2d(x):
    values = x.flatten(2)
    largest = values.max(dim=2, keepdim=True).values
    return largest + (values - largest).exp().sum(dim=2, keepdim=True).log()


class ChannelGate(nn.Module):
    def __init__(self, gate_channels, reduction_ratio=16, pool_types=("avg", "max")):
        super().__init__()
        self.gate_channels = gate_channels
        self.mlp = nn.Sequential(
            Flatten(),
            nn.Linear(gate_channels, gate_channels // reduction_ratio),
            nn.ReLU(),
            nn.Linear(gate_channels // reduction_ratio, gate_channels),
        )
        self.pool_types = pool_types

    def pool(self, x, kind):
        plane = x.shape[2:]
        if kind == "avg":
            return functional.avg_pool2d(x, plane, stride=plane)
        if kind == "max":
            return functional.max_pool2d(x, plane, stride=plane)
        if kind == "lp":
            return functional.lp_pool2d(x, 2, plane, stride=plane)
        return logsumexp_2d(x)

    def forward(self, x):
        logits = sum(self.mlp(self.pool(x, kind)) for kind in self.pool_types)
        return x * torch.sigmoid(logits)[:, :, None, None].expand_as(x)


class ChannelPool(nn.Module):
    def forward(self, x):
        return torch.cat((x.max(dim=1, keepdim=True).values, x.mean(dim=1, keepdim=True)), dim=1)


class SpatialGate(nn.Module):
    def __init__(self):
        super().__init__()
        kernel_size = 7
        self.compress = ChannelPool()
        self.spatial = BasicConv(
            2, 1, kernel_size, stride=1, padding=(kernel_size - 1) // 2, relu=False
        )

    def forward(self, x):
        return x * torch.sigmoid(self.spatial(self.compress(x)))


class CBAM(nn.Module):
    def __init__(
        self, gate_channels, reduction_ratio=16, pool_types=("avg", "max"), no_spatial=False
    ):
        super().__init__()
        self.ChannelGate = ChannelGate(gate_channels, reduction_ratio, pool_types)
        self.no_spatial = no_spatial
        if not no_spatial:
            self.SpatialGate = SpatialGate()

    def forward(self, x):
        x = self.ChannelGate(x)
        return x if self.no_spatial else self.SpatialGate(x)
