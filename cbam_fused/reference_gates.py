"""The parts of the reference, in pure PyTorch: pooling, channel gate, spatial gate, their backward.

:mod:`cbam_fused.reference` puts them together. Forward parts are differentiable by autograd,
backward parts are formulas. Descriptors, ties and the other small tensors are those of
:mod:`cbam_fused.schemas`; all tensors but parameters are in the compute dtype.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from cbam_fused.layout import is_channels_last


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum, gate and small tensor for an x of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer or of a 1x1 convolution as [out, in]."""
    return weight.flatten(1).to(dtype)


def per_channel(gate: Tensor) -> Tensor:
    """[N, C] -> [N, C, 1, 1]."""
    return gate[:, :, None, None]


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; a few types, meta among them, know none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(function):
    """Run ``function`` with autocast disabled on the device of its first argument."""

    @functools.wraps(function)
    def wrapper(first, *args, **kwargs):
        device = first.device.type
        if not autocasts(device):
            return function(first, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper


def in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """``result`` in channels_last if x is, else contiguous."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return result.contiguous(memory_format=layout)


# Pooling: each function is followed by its backward.


def _pool_types(pool: str) -> list[str]:
    return ["avg", "max"] if pool == "light" else pool.split("+")


def _average_pair(pair: Tensor) -> Tensor:
    """[N, 2, ...] -> [N, 1, ...]: the "light" mix, half of the one and half of the other."""
    return (0.5 * pair).sum(1, keepdim=True)


def _average_pair_backward(grad: Tensor) -> Tensor:
    return (0.5 * grad).expand(-1, 2, *grad.shape[2:])


def _maximum(values: Tensor, dim: int, ties: str) -> tuple[Tensor, Tensor]:
    """The maximum over ``dim``, and its first index ("first") or its number of places ("even")."""
    if ties == "first":
        maximum, index = values.max(dim)
        return maximum, index.to(torch.int32)
    maximum = values.amax(dim)
    return maximum, (values == maximum.unsqueeze(dim)).sum(dim, dtype=torch.int32)


def _maximum_backward(grad, values, maximum, tied, dim: int, ties: str) -> Tensor:
    grad, tied = grad.unsqueeze(dim), tied.unsqueeze(dim)
    if ties == "first":
        index = torch.arange(values.shape[dim], device=values.device, dtype=tied.dtype)
        return torch.where(index.view(-1, *[1] * (values.dim() - dim - 1)) == tied, grad, 0)
    return grad * (values == maximum.unsqueeze(dim)) / tied


def pool_pixels(values: Tensor, pool: str, ties: str) -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] -> descriptors [N, P, C], and the maximum's ties [N, C] ([0] without one)."""
    pixels = values.flatten(2)
    pixel_ties = values.new_empty([0], dtype=torch.int32)
    descriptors = []
    for kind in _pool_types(pool):
        if kind == "avg":
            descriptor = pixels.mean(2)
        elif kind == "max":
            descriptor, pixel_ties = _maximum(pixels, 2, ties)
        elif kind == "lp":
            squares = pixels.square().sum(2)
            zero = squares == 0  # the gradient there is 0, not that of the square root
            descriptor = torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())
        else:
            maximum = pixels.detach().amax(2, keepdim=True)
            descriptor = maximum.squeeze(2) + (pixels - maximum).exp().sum(2).log()
        descriptors.append(descriptor)
    return torch.stack(descriptors, 1), pixel_ties


def pool_pixels_backward(grad, values, descriptors, pixel_ties, pool: str, ties: str) -> Tensor:
    pixels = values.flatten(2)
    parts = []
    for kind, slope, descriptor in zip(
        _pool_types(pool), grad.unbind(1), descriptors.unbind(1), strict=True
    ):
        if kind == "avg":
            part = slope.unsqueeze(2) / pixels.shape[2]
        elif kind == "max":
            part = _maximum_backward(slope, pixels, descriptor, pixel_ties, 2, ties)
        elif kind == "lp":
            norm = descriptor.unsqueeze(2)
            part = slope.unsqueeze(2) * torch.where(norm == 0, 0, pixels / norm)
        else:
            part = slope.unsqueeze(2) * (pixels - descriptor.unsqueeze(2)).exp()
        parts.append(part)
    return functools.reduce(torch.add, parts).expand_as(pixels).reshape(values.shape)


def pool_channels(gated: Tensor, maps: str, ties: str) -> tuple[Tensor, Tensor]:
    """u = x * Mc [N, C, H, W] -> its pooled maps [N, 2, H, W], and the maximum's ties [N, H, W]."""
    maximum, channel_ties = _maximum(gated, 1, ties)
    mean = gated.mean(1)
    return torch.stack((mean, maximum) if maps == "mean_max" else (maximum, mean), 1), channel_ties


def pool_channels_backward(grad, gated, pooled, channel_ties, maps: str, ties: str) -> Tensor:
    maximum, mean = (1, 0) if maps == "mean_max" else (0, 1)
    spread = _maximum_backward(grad[:, maximum], gated, pooled[:, maximum], channel_ties, 1, ties)
    return spread + (grad[:, mean] / gated.shape[1]).unsqueeze(1)


# The channel gate.


@without_autocast
def channel_gate(descriptors: Tensor, mlp: tuple, pool: str) -> tuple[Tensor, Tensor]:
    """Descriptors [N, P, C] -> Mc [N, C] and the hidden units [N, B, R] of the B branches.

    The second layer is linear: one product serves the sum of the branches, W2 sum h + B b2.
    """
    weight1, bias1, weight2, bias2 = mlp
    dtype = descriptors.dtype
    branches = _average_pair(descriptors) if pool == "light" else descriptors
    if weight1 is None:
        hidden = branches.new_empty(*branches.shape[:2], 0)
        total = branches.sum(1)
    else:
        hidden = functional.linear(branches, matrix(weight1, dtype), cast(bias1, dtype)).relu()
        total = hidden.sum(1)
    logits = functional.linear(total, matrix(weight2, dtype))
    if bias2 is not None:
        logits = logits + branches.shape[1] * bias2.to(dtype)
    return logits.sigmoid(), hidden


@without_autocast
def channel_gate_backward(grad, gate, descriptors, hidden, mlp: tuple, pool: str):
    """The gradients of the descriptors and of weight1, bias1, weight2, bias2."""
    weight1, weight2 = mlp
    dtype = grad.dtype
    branches = _average_pair(descriptors) if pool == "light" else descriptors
    logits_grad = grad * sigmoid_slope(gate)
    total_grad = (logits_grad @ matrix(weight2, dtype)).unsqueeze(1)
    if weight1 is None:
        weight2_grad = logits_grad.t() @ branches.sum(1)
        branches_grad = total_grad.expand_as(branches)
        grads1 = (weight2.new_empty([0]), weight2.new_empty([0]))
    else:
        weight2_grad = logits_grad.t() @ hidden.sum(1)
        hidden_grad = torch.where(hidden <= 0, 0, total_grad)
        weight1_grad = hidden_grad.flatten(0, 1).t() @ branches.flatten(0, 1)
        grads1 = (weight1_grad.reshape(weight1.shape), hidden_grad.sum((0, 1)))
        branches_grad = hidden_grad @ matrix(weight1, dtype)
    grads2 = (weight2_grad.reshape(weight2.shape), branches.shape[1] * logits_grad.sum(0))
    descriptors_grad = _average_pair_backward(branches_grad) if pool == "light" else branches_grad
    return descriptors_grad, *(gradient.to(weight2.dtype) for gradient in (*grads1, *grads2))


# The spatial gate.


@without_autocast
def spatial_logits(pooled: Tensor, weight: Tensor, bias: Tensor | None, maps: str) -> Tensor:
    """Pooled maps [N, 2, H, W] -> z [N, H, W], by a convolution that keeps H and W."""
    inputs = _average_pair(pooled) if maps == "light" else pooled
    weight, bias = cast(weight, pooled.dtype), cast(bias, pooled.dtype)
    return functional.conv2d(inputs, weight, bias, padding=weight.shape[-1] // 2).squeeze(1)


@without_autocast
def spatial_logits_backward(grad, pooled, weight, maps: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the pooled maps and of the convolution's weight and bias."""
    inputs = _average_pair(pooled) if maps == "light" else pooled
    grad, padding = grad.unsqueeze(1), weight.shape[-1] // 2
    inputs_grad = functional.conv_transpose2d(grad, weight.to(grad.dtype), padding=padding)
    weight_grad = torch.nn.grad.conv2d_weight(inputs, weight.shape, grad, padding=padding)
    pooled_grad = _average_pair_backward(inputs_grad) if maps == "light" else inputs_grad
    return pooled_grad, weight_grad, grad.sum((0, 2, 3))


def spatial_gate(logits: Tensor, norm: tuple) -> Tensor:
    """z [N, H, W] -> Ms [N, 1, H, W] = sigmoid(norm(z))."""
    return normalise(logits.unsqueeze(1), norm).sigmoid()


# Norms: (weight, bias, mean, var, eps); without a mean there is none.


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C, ...] -> mean [C] and biased variance [C]; zeros for an empty batch."""
    values = values.transpose(0, 1).flatten(1)
    count = max(values.shape[1], 1)
    mean = values.sum(1) / count
    return mean, (values - mean.unsqueeze(1)).square().sum(1) / count


@torch.no_grad()
def update_running_statistics(running_mean, running_var, mean, var, count, momentum) -> None:
    """Mix the mean and biased variance of ``count`` values into running ones, as BatchNorm2d does.

    The running tensors may be None; an empty batch changes nothing.
    """
    if count == 0:
        return
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))


def inverse_std(var: Tensor, eps: float) -> Tensor:
    return 1 / torch.sqrt(var + eps)


def normalise(values: Tensor, norm: tuple) -> Tensor:
    """[N, C, ...] -> scale values + shift: the norm is folded into these two."""
    weight, bias, mean, var = (cast(part, values.dtype) for part in norm[:4])
    if mean is None:
        return values
    scale = inverse_std(var, norm[4])
    scale = scale if weight is None else weight * scale
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (values.dim() - 2))
    return values * scale.view(shape) + shift.view(shape)


def norm_backward(grad: Tensor, grad_means: Tensor | None, logits: Tensor, norm: tuple) -> Tensor:
    """The gradient of z from that of norm(z), through the batch statistics given its means."""
    weight, _, mean, var = (cast(part, grad.dtype) for part in norm[:4])
    if mean is None:
        return grad
    scale = inverse_std(var, norm[4])
    if grad_means is not None:
        grad = grad - grad_means[0] - (logits - mean) * scale * grad_means[1]
    return grad * (scale if weight is None else weight * scale)


# Pointwise.


def sigmoid_slope(gate: Tensor) -> Tensor:
    return gate * (1 - gate)


_ACTIVATIONS = {"none": lambda values: values, "relu": torch.relu, "relu6": functional.relu6}


def activate(values: Tensor, activation: str) -> Tensor:
    return _ACTIVATIONS[activation](values)
