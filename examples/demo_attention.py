"""What the gates of a network see, and where they attend: Ms, read off their output."""

from collections.abc import Callable

import torch
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from cbam_fused import CBAM


def gates_of(model: nn.Module) -> dict[str, nn.Module]:
    """The gates of a network, by name: timm's, eager or fused, and `cbam_fused.CBAM`."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (CbamModule, CBAM))}


@torch.no_grad()
def gate_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every gate of `model` sees, by the gate's name."""
    inputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        return lambda _gate, arguments: inputs.__setitem__(name, arguments[0].clone())

    handles = [
        gate.register_forward_pre_hook(record(name)) for name, gate in gates_of(model).items()
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


@torch.no_grad()
def spatial_attention(gate: nn.Module, x: Tensor) -> Tensor:
    """Ms ``[N, H, W]`` of a gate for its input ``[N, C, H, W]``.

    With u = x * Mc, every channel of a pixel tells the same Ms = y / u; the u furthest from zero
    tells it best.
    """
    channel_gate = gate.channel if isinstance(gate, CbamModule) else gate.ChannelGate
    u, y = channel_gate(x), gate(x)
    strongest = u.abs().argmax(1, keepdim=True)
    return (y.gather(1, strongest) / u.gather(1, strongest)).squeeze(1)


def attention(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Ms of every gate of `model`, by the gate's name."""
    inputs = gate_inputs(model, images)
    return {name: spatial_attention(gate, inputs[name]) for name, gate in gates_of(model).items()}
