"""Two CBAMs that are no installable packages, written afresh from their published signatures.

Class names, constructor arguments and state_dict keys are those of bubbliiiing's
``nets/attention.py`` and of open-mmlab/mmyolo's ``mmyolo/models/plugins/cbam.py``.
"""

import torch
from torch import nn


def mean_and_max(x):
    return torch.cat((x.mean(dim=1, keepdim=True), x.max(dim=1, keepdim=True).values), dim=1)


class ChannelAttention(nn.Module):
    def __init__(self, in_planes, ratio=8):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc1 = nn.Conv2d(in_planes, in_planes // ratio, 1, bias=False)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Conv2d(in_planes // ratio, in_planes, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def mlp(self, pooled):
        return self.fc2(self.relu1(self.fc1(pooled)))

    def forward(self, x):
        return self.sigmoid(self.mlp(self.avg_pool(x)) + self.mlp(self.max_pool(x)))


class SpatialAttention(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.conv1(mean_and_max(x)))


class cbam_block(nn.Module):  # noqa: N801
    def __init__(self, channel, ratio=8, kernel_size=7):
        super().__init__()
        self.channelattention = ChannelAttention(channel, ratio)
        self.spatialattention = SpatialAttention(kernel_size)

    def forward(self, x):
        x = x * self.channelattention(x)
        return x * self.spatialattention(x)


class ConvModule(nn.Module):
    """mmcv's, of which a gate has a convolution and perhaps an activation."""

    def __init__(self, in_channels, out_channels, kernel_size, padding=0, activate=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding)
        self.with_activation = activate is not None
        if self.with_activation:
            self.activate = activate

    def forward(self, x):
        x = self.conv(x)
        return self.activate(x) if self.with_activation else x


class ChannelAttentionOfConvModules(nn.Module):
    def __init__(self, channels, reduce_ratio, activate):
        super().__init__()
        hidden = channels // reduce_ratio
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Sequential(
            ConvModule(channels, hidden, 1, activate=activate), ConvModule(hidden, channels, 1)
        )
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.fc(self.avg_pool(x)) + self.fc(self.max_pool(x)))


class SpatialAttentionOfConvModules(nn.Module):
    def __init__(self, kernel_size):
        super().__init__()
        self.conv = ConvModule(2, 1, kernel_size, kernel_size // 2, nn.Sigmoid())

    def forward(self, x):
        return self.conv(mean_and_max(x))


class CBAM(nn.Module):
    """mmyolo's; `activate` is the layer that its ``act_cfg`` describes."""

    def __init__(self, in_channels, reduce_ratio=16, kernel_size=7, activate=None):
        super().__init__()
        activate = activate or nn.ReLU(inplace=True)
        self.channel_attention = ChannelAttentionOfConvModules(in_channels, reduce_ratio, activate)
        self.spatial_attention = SpatialAttentionOfConvModules(kernel_size)

    def forward(self, x):
        x = self.channel_attention(x) * x
        return self.spatial_attention(x) * x
