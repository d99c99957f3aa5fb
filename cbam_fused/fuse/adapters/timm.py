"""timm's ``timm.layers.cbam``: CbamModule and LightCbamModule.

timm is never imported here: a model that contains its modules has imported it.
"""

from torch import nn

from cbam_fused.fuse.adapters import layers
from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.plan import GateSpec

_PACKAGE = "timm.layers.cbam"


def _class_of(module: nn.Module) -> type | None:
    for name in ("CbamModule", "LightCbamModule"):
        if layers.is_instance(module, _PACKAGE, name):
            return layers.loaded_class(_PACKAGE, name)
    return None


def claims(module: nn.Module) -> bool:
    return _class_of(module) is not None


def describe(module: nn.Module) -> GateSpec:
    cls = _class_of(module)
    light = cls.__name__ == "LightCbamModule"
    prefix = "Light" if light else ""
    layers.expect_own_forward(module, "", cls)
    layers.expect_children(module, "", "channel", "spatial")

    layers.expect_loaded_class(module, "channel", _PACKAGE, f"{prefix}ChannelAttn")
    layers.expect_children(module, "channel", "fc1", "act", "fc2", "gate")
    layers.expect_class(module, "channel.act", nn.ReLU)
    if not light:  # the light one holds a gate and never calls it: it is always a sigmoid
        _expect_sigmoid(module, "channel.gate")

    layers.expect_loaded_class(module, "spatial", _PACKAGE, f"{prefix}SpatialAttn")
    layers.expect_children(module, "spatial", "conv", "gate")
    layers.expect_children(module, "spatial.conv", "conv", "bn")
    layers.expect_loaded_class(module, "spatial.conv", "timm.layers.conv_bn_act", "ConvNormAct")
    _expect_sigmoid(module, "spatial.gate")
    return GateSpec(
        hidden_layer="channel.fc1",
        output_layer="channel.fc2",
        conv="spatial.conv.conv",
        norm="spatial.conv.bn",
        pool="light" if light else "avg+max",
        maps="light" if light else "mean_max",
        ties="even",
    )


def _expect_sigmoid(module: nn.Module, path: str) -> None:
    classes = (nn.Sigmoid, layers.loaded_class("timm.layers.activations", "Sigmoid"))
    layers.expect_class(module, path, *(cls for cls in classes if cls is not None))


ADAPTER = Adapter("timm", claims, describe)
