"""More than 2^31 elements on a GPU."""

import pytest
import torch

from tests.gpu import require_gpu
from tests.test_large import LIMIT, test_batch, test_one_sample

__all__ = ["test_batch", "test_one_sample"]

require_gpu()

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def enough_memory():
    """x and y, 2 bytes for each of 2^31 elements, and what is computed on the way."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    needed = 4 * 2 * LIMIT
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    yield
    torch.cuda.empty_cache()
