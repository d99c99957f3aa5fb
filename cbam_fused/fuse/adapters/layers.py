"""What an adapter may expect of a layer; what is not met is said, with the layer and the reason."""

import inspect

from torch import nn

from cbam_fused.plan import batch_norm_types


class NotFusableError(Exception):
    """A module looks like a gate, and cannot be fused; the message is the reason."""


def name_of(module: object) -> str:
    """The class name of `module`; "nothing" for None."""
    return "nothing" if module is None else type(module).__name__


def child(module: nn.Module, path: str) -> nn.Module:
    """The module at `path` below `module`. Raises NotFusableError if there is none."""
    found = module
    for name in path.split("."):
        found = found._modules.get(name)
        if found is None:
            raise NotFusableError(f"there is no {path}")
    return found


def expect_class(module: nn.Module, path: str, *classes: type) -> nn.Module:
    """The child at `path`, which must be of exactly one of `classes`."""
    found = child(module, path)
    if type(found) not in classes:
        raise NotFusableError(f"{path} is a {name_of(found)}, not a {classes[0].__name__}")
    return found


def expect_children(module: nn.Module, path: str, *names: str) -> None:
    """The child at `path` ("" for the module) has just the children `names`, and no tensors."""
    found = child(module, path) if path else module
    label = path or "the module"
    present = [name for name, inner in found._modules.items() if inner is not None]
    if sorted(present) != sorted(names):
        expected = ", ".join(names) or "none"
        raise NotFusableError(
            f"{label} has the children {', '.join(present) or 'none'}, not {expected}"
        )
    if tensors := [*found._parameters, *found._buffers]:
        raise NotFusableError(f"{label} holds tensors of its own: {', '.join(tensors)}")


def expect_linear(module: nn.Module, path: str) -> nn.Linear:
    """A fully connected layer."""
    return expect_class(module, path, nn.Linear)


def expect_pointwise(module: nn.Module, path: str) -> nn.Conv2d:
    """A plain 1x1 convolution: a fully connected layer for ``[N, C, 1, 1]``."""
    conv = expect_class(module, path, nn.Conv2d)
    if (conv.kernel_size, conv.stride, conv.groups) != ((1, 1), (1, 1), 1) or _has_padding(conv):
        raise NotFusableError(f"{path} is not a plain 1x1 convolution: {conv}")
    return conv


def _has_padding(conv: nn.Conv2d) -> bool:
    return conv.padding not in ((0, 0), "same", "valid")


def expect_spatial_conv(module: nn.Module, path: str, maps: int) -> nn.Conv2d:
    """A convolution of `maps` pooled maps to one; odd kernel, zeros around to keep the size."""
    conv = expect_class(module, path, nn.Conv2d)
    k = conv.kernel_size[0]
    same_size = conv.padding in ((k // 2, k // 2), "same") and conv.padding_mode == "zeros"
    plain = (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
    channels = (conv.in_channels, conv.out_channels) == (maps, 1)
    if conv.kernel_size != (k, k) or k % 2 == 0 or not (same_size and plain and channels):
        raise NotFusableError(
            f"{path} is not a k x k convolution, {maps} to 1, that keeps the size: {conv}"
        )
    return conv


def expect_batch_norm(module: nn.Module, path: str) -> nn.Module:
    """A batch norm over one channel, with no activation or dropout behind it."""
    norm = child(module, path)
    if not batch_norm_types(norm):
        raise NotFusableError(f"{path} is a {name_of(norm)}, not a batch norm")
    for name, inner in norm._modules.items():
        if type(inner) is not nn.Identity:
            raise NotFusableError(f"{path}.{name} is a {name_of(inner)}, not an Identity")
    if norm.num_features != 1:
        raise NotFusableError(f"{path} normalises {norm.num_features} channels, not 1")
    return norm


def expect_own_forward(module: nn.Module, path: str, cls: type) -> None:
    """The child at `path` ("" for the module) has the forward of `cls`, it or a subclass."""
    found = child(module, path) if path else module
    if not isinstance(found, cls) or type(found).forward is not cls.forward:
        label = path or "the module"
        raise NotFusableError(
            f"{label} is a {name_of(found)} with another forward than {cls.__name__}"
        )


def expect_own_signature(module: nn.Module) -> None:
    """The forward is that of the class, and takes x alone."""
    if "forward" in module.__dict__:
        raise NotFusableError("it has a forward of its own, set on the instance")
    signature = inspect.signature(type(module).forward)
    if tuple(signature.parameters) != ("self", "x"):
        raise NotFusableError(f"its forward takes {signature}, not (self, x)")


def expect_parameters(module: nn.Module) -> None:
    """Every parameter is an ordinary one in a floating dtype, and all are on one device."""
    devices = set()
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            kind = type(parameter).__name__
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise NotFusableError(
                f"{name} is a {kind} in {dtype}, not a Parameter in a floating dtype"
            )
        devices.add(parameter.device)
    if len(devices) > 1:
        raise NotFusableError(
            f"its parameters are on several devices: {', '.join(sorted(map(str, devices)))}"
        )
