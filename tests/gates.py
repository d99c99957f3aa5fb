"""Gates and networks to fuse, and one training step of a network."""

import timm
import torch
from timm.layers.cbam import CbamModule, LightCbamModule
from torch import nn

from tests import official, pasted

GATES = {
    "timm": lambda: CbamModule(32, rd_ratio=0.25),
    "timm_bias": lambda: CbamModule(32, mlp_bias=True, spatial_kernel_size=3),
    "timm_light": lambda: LightCbamModule(32, rd_ratio=0.25),
    "official": lambda: official.CBAM(32, 4),
    "official_pools": lambda: official.CBAM(32, 4, ["lse", "lp", "max"]),
    "official_no_spatial": lambda: official.CBAM(32, 4, no_spatial=True),
    "bubbliiiing": lambda: pasted.cbam_block(32, 4),
    "bubbliiiing_k3": lambda: pasted.cbam_block(32, 4, 3),
    "mmyolo": lambda: pasted.CBAM(32, 4),
    "mmyolo_k5": lambda: pasted.CBAM(32, 4, 5),
}
_OUTPUT_LAYERS = (
    "channel.fc2",
    "ChannelGate.mlp.3",
    "channelattention.fc2",
    "ch_gate.mlp.fc2",
    "channel_attention.fc.1.conv",
    "channel_attention.fc",
)


def new_gate(name, gates=GATES):
    """The gate called `name` of `gates`, on 32 channels; always with the same values."""
    torch.manual_seed(0)
    return gates[name]()


def output_layer(gate):
    """The path of the last layer of the MLP."""
    paths = {path for path, _ in gate.named_modules()}
    return next(path for path in _OUTPUT_LAYERS if path in paths)


def small_net(gate):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), gate, nn.Conv2d(32, 4, 1), nn.Flatten()
    )


def resnet(attn_layer, name="resnet18"):
    torch.manual_seed(0)
    return timm.create_model(
        name,
        num_classes=7,
        zero_init_last=False,  # with it every gate of a fresh network sees zeros
        block_args={"attn_layer": attn_layer},
    )


def train_step(model, x):
    """Logits, gradients and buffers after one forward and backward pass, by name."""
    y = model(x)
    y.square().sum().backward()
    results = {"logits": y.detach()}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return results | {name: b for name, b in model.named_buffers() if b.is_floating_point()}
