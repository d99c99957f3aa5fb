"""What only a GPU can show, and the tests of all backends on one.

Without a GPU each file is skipped, with the reason.
"""

import pytest
import torch

from cbam_fused import backends


def _fused() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    usable = backends.available(torch.device("cuda", 0))
    return tuple(name for name in usable if name != "reference")


FUSED = _fused()
"""The backends under test."""


def require_gpu(*names: str) -> None:
    """Skips the file that calls this where there is no GPU, or where it has not these backends."""
    if not FUSED:
        pytest.skip("there is no GPU that PyTorch can use", allow_module_level=True)
    if missing := sorted(set(names) - set(FUSED)):
        pytest.skip(f"not usable here: {', '.join(missing)}", allow_module_level=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in the order of its indices."""
    return tensor.contiguous().flatten().view(torch.uint8)
