"""More than 2^31 elements: over the batch, and in one sample."""

from pathlib import Path

import pytest
import torch

import cbam_fused

LIMIT = 2**31


@pytest.fixture(autouse=True)
def enough_memory():
    """x is zeros that take no memory until written; y is written in full, 2 bytes for each of 2^31
    elements.
    """
    information = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(information["MemAvailable"].split()[0]) * 1024
    needed = 3 * 2 * LIMIT
    if available < needed:
        pytest.skip(
            f"needs {needed / 2**30:.0f} GiB of memory; {available / 2**30:.0f} GiB are free"
        )


def parameters(channels):
    """A channel gate of 0.5 everywhere, and a spatial gate that sees the maximum only."""
    torch.manual_seed(0)
    conv = torch.randn(1, 2, 3, 3)
    conv[:, 1] = 0
    return torch.zeros(1, channels), None, torch.zeros(channels, 1), None, conv


@pytest.mark.large
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch(layout):
    """The last sample of a batch whose offsets need 64 bits is what it is alone."""
    shape = (LIMIT // (2048 * 49) + 2, 2048, 7, 7)
    x = torch.zeros(shape, dtype=torch.bfloat16).as_strided(
        shape, torch.empty(1, *shape[1:], memory_format=layout).stride()
    )
    assert x.numel() - x[0].numel() > LIMIT
    x[-1] = torch.randn(shape[1:])
    y = cbam_fused.cbam(x, *parameters(2048))
    assert torch.equal(
        y[-1:],
        cbam_fused.cbam(x[-1:].clone(memory_format=torch.preserve_format), *parameters(2048)),
    )
    assert y[-1].any()
    assert not y[-2].any()


@pytest.mark.large
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_sample(layout):
    """The last channel of a sample larger than 2^31, where all others are zero, gives what two
    channels give.
    """
    channels, height, width = 65_600, 181, 182
    x = torch.empty(
        1, channels, height, width, dtype=torch.bfloat16, device="meta", memory_format=layout
    )
    x = torch.zeros(x.numel(), dtype=x.dtype).as_strided(x.shape, x.stride())
    assert height * width * (channels - 1) > LIMIT
    x[:, -1] = torch.randn(1, height, width)
    two = x[:, -2:].contiguous(memory_format=layout)
    y = cbam_fused.cbam(x, *parameters(channels))
    assert torch.equal(y[:, -2:], cbam_fused.cbam(two, *parameters(2)))
    assert y[:, -1].any()
