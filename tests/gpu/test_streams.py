"""Several streams, threads and devices at once."""

import threading
from dataclasses import replace

import pytest
import torch

from cbam_fused import backends
from tests.cases import BY_NAME
from tests.fingerprint import everything
from tests.gpu import FUSED, bits, require_gpu

require_gpu()

NAMES = ("residual_relu", "plain", "relu_ties_even", "frozen")
ROUNDS = 20


def gates():
    return [
        replace(BY_NAME[name], shape=(6, 96, 28, 28)).gate(torch.bfloat16, layout)
        for name in NAMES
        for layout in ("nchw", "channels_last")
    ]


def same(actual: dict, expected: dict) -> torch.Tensor:
    """Whether two results are bitwise equal, on the device."""
    return torch.stack([(bits(actual[n]) == bits(expected[n])).all() for n in expected]).all()


def test_several_streams(fused):
    """Every gate on a stream of its own, all in flight together."""
    work = gates()
    expected = [everything(fused, gate) for gate in work]
    streams = [torch.cuda.Stream() for _ in work]
    torch.cuda.synchronize()
    equal = []
    for _ in range(ROUNDS):
        for gate, stream, results in zip(work, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                equal.append(same(everything(fused, gate), results))
    torch.cuda.synchronize()
    assert all(equal)


def test_several_threads(fused):
    """Every gate on a thread and a stream of its own."""
    work = gates()
    expected = [everything(fused, gate) for gate in work]
    torch.cuda.synchronize()
    equal, errors = [], []

    def run(gate, results):
        try:
            with torch.device("cuda"), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(ROUNDS):
                    equal.append(bool(same(everything(fused, gate), results)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(work, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert len(equal) == ROUNDS * len(work)
    assert all(equal)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_device_of_x_need_not_be_the_current_one(fused, layout):
    expected = everything(fused, BY_NAME["residual_relu"].gate(torch.float32, layout))
    with torch.device("cuda:1"):
        gate = BY_NAME["residual_relu"].gate(torch.float32, layout)
    assert torch.cuda.current_device() == 0
    results = everything(fused, gate)
    assert torch.cuda.current_device() == 0
    for name, value in results.items():
        assert value.device == torch.device("cuda:1"), name
        assert torch.equal(bits(value).cpu(), bits(expected[name]).cpu()), name


def test_the_best_is_the_choice():
    backend, reason = backends.choose(torch.device("cuda"))
    assert backend.name == FUSED[0], reason
