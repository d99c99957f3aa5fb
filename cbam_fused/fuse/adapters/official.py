"""The authors' code, Jongchan/attention-module, ``MODELS/cbam.py``: class CBAM.

It is no package: people paste it into their own code, often changed. So it is recognised by
structure, whatever the class is called and wherever it is defined, and what structure cannot show
is left to the numerical comparison.
"""

from torch import nn

from cbam_fused.fuse.adapters import layers
from cbam_fused.fuse.adapters.base import Adapter
from cbam_fused.fuse.adapters.layers import NotFusableError
from cbam_fused.plan import GateSpec, pool_of
from cbam_fused.schemas import POOL_TYPES


def claims(module: nn.Module) -> bool:
    channel_gate = module._modules.get("ChannelGate")
    return channel_gate is not None and "mlp" in channel_gate._modules


def describe(module: nn.Module) -> GateSpec:
    no_spatial = "SpatialGate" not in module._modules
    layers.expect_children(module, "", "ChannelGate", *(() if no_spatial else ("SpatialGate",)))
    layers.expect_children(module, "ChannelGate", "mlp")
    layers.expect_class(module, "ChannelGate.mlp", nn.Sequential)
    layers.expect_children(module, "ChannelGate.mlp", "0", "1", "2", "3")
    layers.expect_children(module, "ChannelGate.mlp.0")
    layers.expect_class(module, "ChannelGate.mlp.2", nn.ReLU)
    pool = _pool(layers.child(module, "ChannelGate"))
    if no_spatial:
        return GateSpec(
            "ChannelGate.mlp.1", "ChannelGate.mlp.3", None, None, pool, "max_mean", "first"
        )

    layers.expect_children(module, "SpatialGate", "compress", "spatial")
    layers.expect_children(module, "SpatialGate.compress")
    has_norm = "bn" in layers.child(module, "SpatialGate.spatial")._modules
    layers.expect_children(module, "SpatialGate.spatial", "conv", *(("bn",) if has_norm else ()))
    return GateSpec(
        hidden_layer="ChannelGate.mlp.1",
        output_layer="ChannelGate.mlp.3",
        conv="SpatialGate.spatial.conv",
        norm="SpatialGate.spatial.bn" if has_norm else None,
        pool=pool,
        maps="max_mean",
        ties="first",
    )


def _pool(channel_gate: nn.Module) -> str:
    types = vars(channel_gate).get("pool_types")
    pool = pool_of(types)
    if pool is None:
        expected = f"a list of different ones of {', '.join(POOL_TYPES)}"
        raise NotFusableError(f"ChannelGate.pool_types must be {expected}; it is {types!r}")
    return pool


ADAPTER = Adapter("official", claims, describe)
