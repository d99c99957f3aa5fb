"""pytorchcv's ``pytorchcv.models.cbamresnet.CbamBlock``.

pytorchcv is never imported here: a model that contains its modules has imported it.
"""

from torch import nn

from cbam_fused.fuse.adapters import layers
from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.plan import GateSpec

_PACKAGE = "pytorchcv.models.cbamresnet"


def claims(module: nn.Module) -> bool:
    return layers.is_instance(module, _PACKAGE, "CbamBlock")


def describe(module: nn.Module) -> GateSpec:
    layers.expect_own_forward(module, "", layers.loaded_class(_PACKAGE, "CbamBlock"))
    layers.expect_children(module, "", "ch_gate", "sp_gate")
    layers.expect_loaded_class(module, "ch_gate", _PACKAGE, "ChannelGate")
    layers.expect_children(module, "ch_gate", "avg_pool", "max_pool", "mlp", "sigmoid")
    layers.expect_global_pool(module, "ch_gate.avg_pool", nn.AdaptiveAvgPool2d)
    layers.expect_global_pool(module, "ch_gate.max_pool", nn.AdaptiveMaxPool2d)
    layers.expect_loaded_class(module, "ch_gate.mlp", _PACKAGE, "MLP")
    layers.expect_children(module, "ch_gate.mlp", "fc1", "activ", "fc2")
    layers.expect_class(module, "ch_gate.mlp.activ", nn.ReLU)
    layers.expect_class(module, "ch_gate.sigmoid", nn.Sigmoid)
    layers.expect_loaded_class(module, "sp_gate", _PACKAGE, "SpatialGate")
    layers.expect_children(module, "sp_gate", "conv", "sigmoid")
    layers.expect_loaded_class(module, "sp_gate.conv", "pytorchcv.models.common.conv", "ConvBlock")
    layers.expect_children(module, "sp_gate.conv", "conv", "bn")
    layers.expect_class(module, "sp_gate.sigmoid", nn.Sigmoid)
    return GateSpec(
        hidden_layer="ch_gate.mlp.fc1",
        output_layer="ch_gate.mlp.fc2",
        conv="sp_gate.conv.conv",
        norm="sp_gate.conv.bn",
        pool="avg+max",
        maps="max_mean",
        ties="first",
    )


ADAPTER = Adapter("pytorchcv", claims, describe)
