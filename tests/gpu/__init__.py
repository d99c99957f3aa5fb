"""What only a GPU can show, and the tests of all backends on one.

Without a GPU each file is skipped, with the reason.
"""

import pytest
import torch

from cbam_fused import triton_backend


def reason() -> str:
    """Why nothing can be tested here; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    return triton_backend.unusable(torch.device("cuda", 0))


def require_gpu() -> None:
    """Skips the file that calls this where there is no GPU."""
    if why := reason():
        pytest.skip(why, allow_module_level=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in the order of its indices."""
    return tensor.contiguous().flatten().view(torch.uint8)
