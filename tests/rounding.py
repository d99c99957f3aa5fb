"""Equality of two ways to compute the same sums in float64."""

import torch
from torch import Tensor


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], terms: int) -> None:
    """Asserts that results by name are equal but for the order of summation.

    Two orders of a sum of `terms` terms differ by at most as many roundings of the largest value in
    sight. NaN and infinities must be in the same places.
    """
    finite = [e[e.isfinite()].abs().max().item() for e in expected.values() if e.isfinite().any()]
    bound = terms * torch.finfo(torch.float64).eps * max(finite, default=0.0)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if actual[name].dtype != torch.float64 or value.dtype != torch.float64:
            raise TypeError(f"{name}: {actual[name].dtype} and {value.dtype}, not float64")
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=0,
            atol=bound,
            equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )
