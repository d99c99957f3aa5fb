"""The library's CUDA code as a backend: for which GPUs and drivers, why not for others, and what
serves instead.
"""

import pytest
import torch

import cbam_fused
from cbam_fused import backends, cuda_backend, library, triton_backend
from tests.cases import BY_NAME

GPU = torch.device("cuda", 0)
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def pretend(monkeypatch):
    """Sets what the library was built for, and the GPU and driver that are here, but are not."""
    caches = (cuda_backend._unusable_on, triton_backend._too_old)

    def forget():
        for cache in caches:
            cache.cache_clear()

    def set_all(capability=(9, 0), driver=13000, architectures=ARCHITECTURES, cuda="13.0.88"):
        forget()
        build = {"cuda": cuda, "architectures": architectures}
        monkeypatch.setattr(library, "build", build)
        monkeypatch.setattr(library, "loaded", True)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)

    yield set_all
    forget()


def test_on_a_gpu_it_is_chosen(pretend):
    pretend()
    backend, reason = backends.choose(GPU)
    assert (backend.name, reason) == ("cuda", "the compiled library has code for this GPU")
    assert backends.available(GPU)[0] == "cuda"
    assert ("cuda", True, "on a GPU") in backends.status()
    assert "cuda" not in backends.available(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((7, 5), ARCHITECTURES, True),
        ((7, 0), ARCHITECTURES, False),  # older than all
        ((8, 0), ARCHITECTURES, True),
        ((8, 9), ARCHITECTURES, True),  # by sm_86
        ((10, 3), ARCHITECTURES, True),
        ((11, 0), ARCHITECTURES, False),  # between the majors, and older than the PTX
        ((12, 1), ARCHITECTURES, True),
        ((13, 0), ARCHITECTURES, True),  # by the PTX
        ((8, 0), ["sm_90"], False),
        ((10, 0), ["sm_90"], False),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((8, 9), ["compute_90"], False),
        ((9, 0), ["sm_90a", "compute_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((10, 3), ["sm_100f"], False),
    ],
)
def test_code_serves_its_own_capability_and_later_ones(pretend, capability, architectures, served):
    pretend(capability, architectures=architectures)
    expected = (
        f"the library has CUDA code for {', '.join(architectures)}; cuda:0 has compute capability "
        f"{capability[0]}.{capability[1]}"
    )
    assert cuda_backend.unusable(GPU) == ("" if served else expected)


@pytest.mark.parametrize(
    ("names", "capability", "expected"),
    [
        (ARCHITECTURES, (8, 9), (8, 6)),
        (ARCHITECTURES, (9, 0), (9, 0)),
        (ARCHITECTURES, (13, 0), (12, 0)),
        (["sm_80", "compute_80"], (9, 0), (8, 0)),
        (["sm_80"], (9, 0), (9, 0)),  # it does not serve that one
    ],
)
def test_the_code_that_a_gpu_runs(names, capability, expected):
    assert cuda_backend.newest_code(names, capability) == expected


@pytest.mark.parametrize(
    ("driver", "capability", "cuda", "needed"),
    [
        (12080, (9, 0), "13.0.88", "13.0"),
        (13000, (9, 0), "13.2.10", ""),  # machine code needs no more than the major version
        (13000, (13, 0), "13.2.10", "13.2"),  # PTX does
        (13020, (13, 0), "13.2.10", ""),
        (14000, (13, 0), "13.2.10", ""),
    ],
)
def test_an_older_driver_is_a_reason(pretend, driver, capability, cuda, needed):
    pretend(capability, driver, cuda=cuda)
    own = f"{driver // 1000}.{driver % 1000 // 10}"
    expected = f"it needs a driver of CUDA {needed} or later; this one's is {own}"
    assert cuda_backend.unusable(GPU) == (expected if needed else "")


def test_without_it_triton_serves_and_the_reason_says_why(pretend):
    pretend((8, 0), cuda="none: no nvcc was found", architectures=[])
    backend, reason = backends.choose(GPU)
    assert backend.name == "triton"
    assert reason == (
        "Triton can be imported; "
        "cuda is not usable: the library has no CUDA code: no nvcc was found"
    )


def test_on_a_gpu_too_old_for_both_the_reference_serves(pretend):
    pretend((7, 0))
    backend, reason = backends.choose(GPU)
    assert backend.name == "reference"
    assert reason == (
        "cuda is not usable: the library has CUDA code for sm_75, sm_80, sm_86, sm_90, sm_100, "
        "sm_120, compute_120; cuda:0 has compute capability 7.0; triton is not usable: "
        "it needs a GPU of compute capability 8.0 or later; cuda:0 has 7.0"
    )


def test_without_the_library(pretend, monkeypatch):
    pretend()
    monkeypatch.setattr(library, "loaded", False)
    monkeypatch.setattr(library, "reason", "it was never built")
    assert cuda_backend.unusable(GPU) == "it was never built"


def test_gpus_of_others_are_refused(pretend, monkeypatch):
    pretend()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cuda_backend.unusable(GPU) == "it needs a GPU by NVIDIA"


def test_without_a_gpu(pretend, monkeypatch):
    """Fake tensors may be on a GPU that is not there."""
    pretend()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ("cuda", False, "there is no GPU") in backends.status()
    assert cuda_backend.unusable(GPU) == "there is no GPU"
    with pytest.raises(RuntimeError, match="backend cuda is not usable here: there is no GPU"):
        backends.get("cuda")


def test_tensors_on_a_cpu_are_refused(pretend):
    pretend()
    gate = BY_NAME["plain"].gate()
    message = "cbam_fused: backend cuda is not usable for tensors on cpu: it needs a GPU"
    with cbam_fused.use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        cbam_fused.cbam(gate.x, *gate.mlp)


def test_one_set_of_operations_serves_both_devices():
    """The dispatcher picks the kernels by the device of the tensors."""
    assert backends._BACKENDS["cuda"][1:] == backends._BACKENDS["cpu"][1:]
