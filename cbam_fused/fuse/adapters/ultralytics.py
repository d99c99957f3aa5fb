"""ultralytics' ``ultralytics.nn.modules.conv.CBAM``: one C x C layer on the average, no norm.

ultralytics is never imported here: a model that contains its modules has imported it.
"""

from torch import nn

from cbam_fused.fuse.adapters import layers
from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.plan import GateSpec

_PACKAGE = "ultralytics.nn.modules.conv"


def claims(module: nn.Module) -> bool:
    return layers.is_instance(module, _PACKAGE, "CBAM")


def describe(module: nn.Module) -> GateSpec:
    layers.expect_own_forward(module, "", layers.loaded_class(_PACKAGE, "CBAM"))
    layers.expect_children(module, "", "channel_attention", "spatial_attention")
    layers.expect_loaded_class(module, "channel_attention", _PACKAGE, "ChannelAttention")
    layers.expect_children(module, "channel_attention", "pool", "fc", "act")
    layers.expect_global_pool(module, "channel_attention.pool", nn.AdaptiveAvgPool2d)
    layers.expect_class(module, "channel_attention.act", nn.Sigmoid)
    layers.expect_loaded_class(module, "spatial_attention", _PACKAGE, "SpatialAttention")
    layers.expect_children(module, "spatial_attention", "cv1", "act")
    layers.expect_class(module, "spatial_attention.act", nn.Sigmoid)
    return GateSpec(
        hidden_layer=None,
        output_layer="channel_attention.fc",
        conv="spatial_attention.cv1",
        norm=None,
        pool="avg",
        maps="mean_max",
        ties="first",
    )


ADAPTER = Adapter("ultralytics", claims, describe)
