"""A ResNet-50 with CBAM in every block, on photographs: eager gates against fused gates."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import skimage.data
import skimage.transform
import torch
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

import cbam_fused
from benchmarks.timing import Timing, interleave
from examples.demo_attention import gates_of

# Photographs that scikit-image ships inside the package; its others are downloads.
PHOTOGRAPHS = {
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "galaxies": skimage.data.hubble_deep_field,
}
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def photograph(name: str, size: int = 224) -> np.ndarray:
    """The central square of a photograph, ``[size, size, 3]`` in 0..1."""
    image = PHOTOGRAPHS[name]()
    side = min(image.shape[:2])
    top, left = ((extent - side) // 2 for extent in image.shape[:2])
    square = image[top : top + side, left : left + side]
    return skimage.transform.resize(square, (size, size), anti_aliasing=True)


def batch(images: list[np.ndarray]) -> Tensor:
    """Images as the network wants them: ``[N, 3, H, W]``, normalised."""
    tensors = (torch.from_numpy(image).float().permute(2, 0, 1) for image in images)
    return torch.stack([(tensor - IMAGENET_MEAN) / IMAGENET_STD for tensor in tensors])


def fused_copy(model: nn.Module) -> tuple[nn.Module, cbam_fused.FuseReport]:
    """A copy of `model` with fused gates, and the report of what was swapped."""
    fused = copy.deepcopy(model)
    return fused, cbam_fused.fuse_(fused, strict=True)


def without_gates(model: nn.Module) -> nn.Module:
    """A copy of `model` with an identity in place of every gate."""
    result = copy.deepcopy(model)
    for module in list(result.modules()):
        for name, child in module.named_children():
            if isinstance(child, CbamModule):
                setattr(module, name, nn.Identity())
    return result


@dataclass(frozen=True)
class Logits:
    """What the same network says with eager gates, with fused gates, exactly, and without gates."""

    eager: Tensor
    fused: Tensor
    expected: Tensor
    identity: Tensor


@torch.inference_mode()
def logits(eager: nn.Module, fused: nn.Module, images: Tensor) -> Logits:
    """The logits to compare; `expected` is by eager PyTorch in float64."""
    exact = copy.deepcopy(eager).double()
    return Logits(
        eager(images), fused(images), exact(images.double()), without_gates(eager)(images)
    )


@torch.inference_mode()
def network_times(
    models: dict[str, nn.Module], images: Tensor, repetitions: int
) -> dict[str, Timing]:
    """Times of whole networks."""
    calls = {name: lambda model=model: model(images) for name, model in models.items()}
    return interleave(calls, repetitions=repetitions, min_time=0.0)


@torch.inference_mode()
def gate_times(
    models: dict[str, nn.Module], inputs: dict[str, Tensor], repetitions: int
) -> dict[str, Timing]:
    """Times of all gates of each network, one after the other, on their `inputs`."""

    def call(model: nn.Module) -> Callable[[], object]:
        pairs = [(gate, inputs[name]) for name, gate in gates_of(model).items()]
        return lambda: [gate(x) for gate, x in pairs]

    calls = {name: call(model) for name, model in models.items()}
    return interleave(calls, repetitions=repetitions, min_time=0.0)


def compiled(model: nn.Module) -> nn.Module:
    """A copy of `model`, compiled as a whole."""
    result = copy.deepcopy(model)
    result.compile()
    return result


def compiled_gates(model: nn.Module) -> nn.Module:
    """A copy of `model` whose gates are compiled, each for the one shape it sees."""
    result = copy.deepcopy(model)
    for gate in gates_of(result).values():
        gate.compile(dynamic=False)
    return result
