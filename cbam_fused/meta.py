"""Running a module on meta tensors, as it would run on a GPU."""

import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cbam_fused.layout import is_channels_last


def without_values(module: nn.Module) -> nn.Module:
    """A copy of `module` on meta tensors; the values may be too large to be there twice."""
    memo: dict[int, Tensor] = {}
    for parameter in module.parameters():
        without_values = parameter.detach().to("meta")
        memo[id(parameter)] = nn.Parameter(without_values, parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    copied = copy.deepcopy(module, memo).to("meta")
    for norm in copied.modules():
        # Without a momentum a batch norm reads how many batches it has seen.
        if getattr(norm, "num_batches_tracked", None) is not None and norm.momentum is None:
            norm.momentum = 0.0
    return copied


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the first parameter with a floating dtype; float32 where there is none."""
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


class ConvolutionLayouts(TorchDispatchMode):
    """Convolutions give the layout that cuDNN's have; those of meta tensors are always NCHW."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten.convolution.default:
            x, weight = arguments[:2]
            known = x.dim() == 4 and x.dtype != torch.float64
            if known and (is_channels_last(x) or is_channels_last(weight)):
                return result.contiguous(memory_format=torch.channels_last)
        return result
