"""Maxima by their definition, against which an implementation's ties are exact."""

import torch
from torch import Tensor


def maxima(values: Tensor, dim: int, ties: str) -> Tensor:
    """int32: the index of the first maximum along `dim` (a NaN is one), or how many there are (none
    if it is NaN).
    """
    peak = values.amax(dim, keepdim=True)
    if ties == "even":
        return (values == peak).sum(dim).int()
    is_peak = (values == peak) | (values.isnan() & peak.isnan())
    shape = [-1 if d == dim else 1 for d in range(values.dim())]
    index = torch.arange(values.shape[dim]).reshape(shape)
    return torch.where(is_peak, index, values.shape[dim]).amin(dim).int()
