"""What an adapter may expect of a layer; what is not met is said, with the layer and the reason."""

import inspect
import sys

from torch import nn

from cbam_fused.plan import GateSpec, batch_norm_types, full_name


class NotFusableError(Exception):
    """A module looks like a gate, and cannot be fused; the message is the reason."""


def name_of(module: object) -> str:
    """The class name of `module`; "nothing" for None."""
    return "nothing" if module is None else type(module).__name__


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` below `module`, or None."""
    found = module
    for name in path.split("."):
        found = found._modules.get(name)
        if found is None:
            return None
    return found


def has(module: nn.Module, *paths: str) -> bool:
    """Whether there is a module at each of `paths` below `module`."""
    return all(find(module, path) is not None for path in paths)


def child(module: nn.Module, path: str) -> nn.Module:
    """The module at `path` below `module`. Raises NotFusableError if there is none."""
    found = find(module, path)
    if found is None:
        raise NotFusableError(f"there is no {path}")
    return found


def loaded_class(package: str, name: str) -> type | None:
    """The class `name` of the module `package`, if that was imported: nothing is imported here."""
    return getattr(sys.modules.get(package), name, None)


def is_instance(module: nn.Module, package: str, name: str) -> bool:
    """Whether a module is of the class `name` of `package`, or of a subclass."""
    cls = loaded_class(package, name)
    return cls is not None and isinstance(module, cls)


def expect_class(module: nn.Module, path: str, *classes: type) -> nn.Module:
    """The child at `path`, which must be of exactly one of `classes`."""
    found = child(module, path)
    if type(found) not in classes:
        got, expected = full_name(type(found), classes[0]), classes[0].__name__
        raise NotFusableError(f"{path} is a {got}, not a {expected}")
    return found


def expect_loaded_class(module: nn.Module, path: str, package: str, name: str) -> None:
    """The child at `path` is of the class `name` of `package`."""
    found = child(module, path)
    if type(found) is not loaded_class(package, name):
        raise NotFusableError(f"{path} is a {name_of(found)}, not the {name} of {package}")


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


def expect_global_pool(module: nn.Module, path: str, *classes: type) -> None:
    """A pooling over all of H*W, of one of `classes`."""
    pool = expect_class(module, path, *classes)
    if pool.output_size not in (1, (1, 1)):
        raise NotFusableError(f"{path} pools to {pool.output_size}, not to 1 x 1")


def expect_layers(module: nn.Module, spec: GateSpec) -> None:
    """The layers that `spec` names exist and are plain ones that the fused gate can compute."""
    for field in ("hidden_layer", "output_layer", "conv", "norm"):
        path = getattr(spec, field)
        if path is not None and find(module, path) is None:
            raise NotFusableError(f"there is no {path}, which the adapter names as its {field}")
    for path in (spec.hidden_layer, spec.output_layer):
        if path is not None:
            _expect_fully_connected(module, path)
    if spec.conv is not None:
        _expect_spatial_conv(module, spec.conv, maps=1 if spec.maps == "light" else 2)
    if spec.norm is not None:
        _expect_batch_norm(module, spec.norm)


def _expect_fully_connected(module: nn.Module, path: str) -> None:
    """A Linear, or a plain 1x1 convolution, which is one for ``[N, C, 1, 1]``."""
    if not isinstance(child(module, path), nn.Conv2d):
        expect_class(module, path, nn.Linear)
        return
    conv = expect_class(module, path, nn.Conv2d)
    if (conv.kernel_size, conv.stride, conv.groups) != ((1, 1), (1, 1), 1) or _has_padding(conv):
        raise NotFusableError(f"{path} is not a plain 1x1 convolution: {conv}")


def _has_padding(conv: nn.Conv2d) -> bool:
    return conv.padding not in ((0, 0), "same", "valid")


def _expect_spatial_conv(module: nn.Module, path: str, maps: int) -> None:
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


def _expect_batch_norm(module: nn.Module, path: str) -> None:
    """A batch norm over one channel, with no activation or dropout behind it."""
    norm = child(module, path)
    if not batch_norm_types(norm):
        raise NotFusableError(f"{path} is a {name_of(norm)}, not a batch norm")
    for name, inner in norm._modules.items():
        if type(inner) is not nn.Identity:
            raise NotFusableError(f"{path}.{name} is a {name_of(inner)}, not an Identity")
    if norm.num_features != 1:
        raise NotFusableError(f"{path} normalises {norm.num_features} channels, not 1")


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
