"""open-mmlab/mmyolo's plugin CBAM, ``mmyolo/models/plugins/cbam.py``, of mmcv's ConvModules.

Recognised by structure, so that neither package nor their versions matter: a ConvModule is a module
whose children are a convolution, `conv`, and perhaps an activation, `activate`. What structure
cannot show is left to the numerical comparison.
"""

from torch import nn

from cbam_fused.fuse.adapters import layers
from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.plan import GateSpec


def claims(module: nn.Module) -> bool:
    return layers.has(module, "channel_attention.fc.1.conv", "spatial_attention.conv.conv")


def describe(module: nn.Module) -> GateSpec:
    layers.expect_children(module, "", "channel_attention", "spatial_attention")
    layers.expect_children(module, "channel_attention", "avg_pool", "max_pool", "fc", "sigmoid")
    layers.expect_global_pool(module, "channel_attention.avg_pool", nn.AdaptiveAvgPool2d)
    layers.expect_global_pool(module, "channel_attention.max_pool", nn.AdaptiveMaxPool2d)
    layers.expect_class(module, "channel_attention.fc", nn.Sequential)
    layers.expect_children(module, "channel_attention.fc", "0", "1")
    layers.expect_children(module, "channel_attention.fc.0", "conv", "activate")
    layers.expect_class(module, "channel_attention.fc.0.activate", nn.ReLU)
    layers.expect_children(module, "channel_attention.fc.1", "conv")
    layers.expect_class(module, "channel_attention.sigmoid", nn.Sigmoid)
    layers.expect_children(module, "spatial_attention", "conv")
    layers.expect_children(module, "spatial_attention.conv", "conv", "activate")
    layers.expect_class(module, "spatial_attention.conv.activate", nn.Sigmoid)
    return GateSpec(
        hidden_layer="channel_attention.fc.0.conv",
        output_layer="channel_attention.fc.1.conv",
        conv="spatial_attention.conv.conv",
        norm=None,
        pool="avg+max",
        maps="mean_max",
        ties="first",
    )


ADAPTER = Adapter("mmyolo", claims, describe)
