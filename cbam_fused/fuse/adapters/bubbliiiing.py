"""bubbliiiing's ``nets/attention.py``: class cbam_block, pasted into many detectors.

It is no package: it is recognised by structure, whatever the class is called and wherever it is
defined, and what structure cannot show is left to the numerical comparison.
"""

from torch import nn

from cbam_fused.fuse.adapters import layers
from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.plan import GateSpec


def claims(module: nn.Module) -> bool:
    return layers.has(module, "channelattention.fc2", "spatialattention.conv1")


def describe(module: nn.Module) -> GateSpec:
    channel = "channelattention"
    layers.expect_children(module, "", channel, "spatialattention")
    layers.expect_children(
        module, channel, "avg_pool", "max_pool", "fc1", "relu1", "fc2", "sigmoid"
    )
    layers.expect_global_pool(module, f"{channel}.avg_pool", nn.AdaptiveAvgPool2d)
    layers.expect_global_pool(module, f"{channel}.max_pool", nn.AdaptiveMaxPool2d)
    layers.expect_class(module, f"{channel}.relu1", nn.ReLU)
    layers.expect_class(module, f"{channel}.sigmoid", nn.Sigmoid)
    layers.expect_children(module, "spatialattention", "conv1", "sigmoid")
    layers.expect_class(module, "spatialattention.sigmoid", nn.Sigmoid)
    return GateSpec(
        hidden_layer="channelattention.fc1",
        output_layer="channelattention.fc2",
        conv="spatialattention.conv1",
        norm=None,
        pool="avg+max",
        maps="mean_max",
        ties="first",
    )


ADAPTER = Adapter("bubbliiiing", claims, describe)
