"""CBAM as others write it: with PyTorch's layers from their descriptions, and timm's own modules.

Every gate has 12 channels; `Peer.arguments` names a module's parameters as `cbam_fused.cbam` does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers.cbam import CbamModule, LightCbamModule
from torch import nn
from torch.nn import functional


class TwoLayer(nn.Module):
    def __init__(self, channels: int, hidden: int, bias: bool):
        super().__init__()
        self.first = nn.Linear(channels, hidden, bias)
        self.second = nn.Linear(hidden, channels, bias)

    def forward(self, x):
        return self.second(functional.relu(self.first(x)))


POOLS = {
    "avg": lambda x: functional.avg_pool2d(x, x.shape[2:]),
    "max": lambda x: functional.max_pool2d(x, x.shape[2:]),
    "lp": lambda x: functional.lp_pool2d(x, 2, x.shape[2:]),
    "lse": lambda x: x.logsumexp((2, 3)),
}


class Official(nn.Module):
    """As published with the paper: any pooling types, a batch norm behind the convolution."""

    def __init__(self, pools: str, spatial: bool = True):
        super().__init__()
        self.pools = pools.split("+")
        self.mlp = TwoLayer(12, 3, bias=True)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False) if spatial else None
        self.norm = nn.BatchNorm2d(1, momentum=0.01) if spatial else None

    def forward(self, x):
        logits = sum(self.mlp(POOLS[pool](x).flatten(1)) for pool in self.pools)
        x = x * torch.sigmoid(logits)[:, :, None, None]
        if self.conv is None:
            return x
        maps = torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)
        return x * torch.sigmoid(self.norm(self.conv(maps)))

    def arguments(self):
        mlp = self.mlp
        arguments = {
            "mlp_weight1": mlp.first.weight, "mlp_bias1": mlp.first.bias,
            "mlp_weight2": mlp.second.weight, "mlp_bias2": mlp.second.bias,
            "pool": "+".join(self.pools),
        }  # fmt: skip
        if self.conv is not None:
            arguments |= dict(conv_weight=self.conv.weight, **norm_arguments(self.norm))
        return arguments


class AverageSingleLayer(nn.Module):
    """One C x C layer on the average, then (mean, max) without norm, as in ultralytics."""

    def __init__(self):
        super().__init__()
        self.layer, self.conv = nn.Conv2d(12, 12, 1), nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x):
        x = x * torch.sigmoid(self.layer(functional.adaptive_avg_pool2d(x, 1)))
        maps = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True).values), 1)
        return x * torch.sigmoid(self.conv(maps))

    def arguments(self):
        return {
            "mlp_weight1": None, "mlp_bias1": None,
            "mlp_weight2": self.layer.weight, "mlp_bias2": self.layer.bias,
            "conv_weight": self.conv.weight, "pool": "avg", "maps": "mean_max",
        }  # fmt: skip


class Convolutions(nn.Module):
    """1 x 1 convolutions on (avg, max), then (mean, max) without norm: pasted most often."""

    def __init__(self, bias: bool, residual: bool, kernel_size: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 4, 1, bias=bias), nn.Conv2d(4, 12, 1, bias=bias)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=bias)
        self.residual = residual

    def forward(self, x):
        average, maximum = (
            self.second(functional.relu(self.first(pooled)))
            for pooled in (x.mean((2, 3), keepdim=True), functional.adaptive_max_pool2d(x, 1))
        )
        y = x * torch.sigmoid(average + maximum)
        maps = torch.cat((y.mean(1, keepdim=True), y.max(1, keepdim=True).values), 1)
        y = y * torch.sigmoid(self.conv(maps))
        return functional.relu(x + y) if self.residual else y

    def arguments(self):
        return {
            "mlp_weight1": self.first.weight, "mlp_bias1": self.first.bias,
            "mlp_weight2": self.second.weight, "mlp_bias2": self.second.bias,
            "conv_weight": self.conv.weight, "conv_bias": self.conv.bias, "maps": "mean_max",
        }  # fmt: skip


def norm_arguments(norm: nn.BatchNorm2d) -> dict:
    return {
        "norm_weight": norm.weight, "norm_bias": norm.bias,
        "momentum": norm.momentum, "eps": norm.eps,
        "running_mean": norm.running_mean.clone(), "running_var": norm.running_var.clone(),
        "batch_statistics": norm.training,
    }  # fmt: skip


def timm_arguments(module: CbamModule | LightCbamModule) -> dict:
    light = isinstance(module, LightCbamModule)
    channel, spatial = module.channel, module.spatial.conv
    return dict(
        mlp_weight1=channel.fc1.weight, mlp_bias1=channel.fc1.bias,
        mlp_weight2=channel.fc2.weight, mlp_bias2=channel.fc2.bias,
        conv_weight=spatial.conv.weight, **norm_arguments(spatial.bn),
        pool="light" if light else "avg+max", maps="light" if light else "mean_max", ties="even",
    )  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A module in use elsewhere, and how its parameters are named here."""

    name: str
    build: Callable[[], nn.Module]
    arguments: Callable[[nn.Module], dict] = lambda module: module.arguments()

    def __str__(self) -> str:
        return self.name


PEERS = (
    Peer("official", lambda: Official("avg+max")),
    Peer("official_all_pools", lambda: Official("avg+max+lp+lse")),
    Peer("official_lp", lambda: Official("lp")),
    Peer("official_lse", lambda: Official("lse")),
    Peer("official_max", lambda: Official("max")),
    Peer("official_no_spatial", lambda: Official("avg+max", spatial=False)),
    Peer("timm", lambda: CbamModule(12, rd_ratio=0.25), timm_arguments),
    Peer(
        "timm_bias_k3", lambda: CbamModule(12, mlp_bias=True, spatial_kernel_size=3), timm_arguments
    ),
    Peer("timm_light", lambda: LightCbamModule(12, rd_ratio=0.25), timm_arguments),
    Peer("average_single_layer", AverageSingleLayer),
    Peer("convolutions", lambda: Convolutions(bias=False, residual=False, kernel_size=7)),
    Peer("convolutions_bias", lambda: Convolutions(bias=True, residual=False, kernel_size=5)),
    Peer("convolutions_residual", lambda: Convolutions(bias=False, residual=True, kernel_size=3)),
)


def randomise(module: nn.Module) -> nn.Module:
    """`module` in float64, every parameter and running statistic at random: no zeros, no ones."""
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.detach().normal_()
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_var.square_().add_(0.5)
    return module.double()
