"""Modules that no adapter knows and whose layers are nevertheless those of a CBAM.

`fuse_` reports them and leaves them alone: their layers do not say what is computed with them.
"""

import itertools
from collections.abc import Iterator

from torch import nn

_MOST_LAYERS = 4  # two of the MLP, the convolution, a norm


def layers_of_a_gate(module: nn.Module) -> str | None:
    """What of `module` looks like a CBAM, or None.

    That is one k x k convolution of one or two maps to one, k odd; an MLP over C channels: C -> R
    -> C with R below C, or C -> C, of Linears or 1x1 convolutions; perhaps a norm of one channel;
    and no other parameter.
    """
    layers = list(itertools.islice(_with_parameters(module), _MOST_LAYERS + 1))
    convs = [layer for layer in layers if _is_spatial_conv(layer[1])]
    mlp = [layer for layer in layers if layer not in convs and _is_fully_connected(layer[1])]
    norms = [layer for layer in layers if _is_norm_of_one(layer[1])]
    if len(convs) != 1 or len(norms) > 1 or len(layers) != 1 + len(mlp) + len(norms):
        return None
    widths = [_widths(layer) for _, layer in mlp]
    if len(mlp) == 1:
        is_gate = widths[0][0] == widths[0][1]
    else:
        is_gate = len(mlp) == 2 and widths[0] == widths[1][::-1] and widths[0][1] < widths[0][0]
    if not is_gate:
        return None
    (conv_path, conv), path = convs[0], ", ".join(path for path, _ in mlp)
    sizes = " -> ".join(map(str, (*(width for width, _ in widths), widths[-1][1])))
    k = conv.kernel_size[0]
    return f"an MLP {sizes} ({path}) and a {k} x {k} convolution to one map ({conv_path})"


def _with_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The inner modules that hold parameters themselves, with their paths."""
    for path, inner in module.named_modules():
        if any(parameter is not None for parameter in inner._parameters.values()):
            yield path, inner


def _is_spatial_conv(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.in_channels in (1, 2)
        and layer.out_channels == 1
        and layer.kernel_size[0] == layer.kernel_size[1]
        and layer.kernel_size[0] % 2 == 1
    )


def _is_fully_connected(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    )


def _is_norm_of_one(layer: nn.Module) -> bool:
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return layer.num_features == 1
    return isinstance(layer, nn.GroupNorm) and layer.num_channels == 1


def _widths(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels
