"""The Triton kernels as a backend where they cannot run: why not, and what serves instead."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton

import cbam_fused
from cbam_fused import backends, cuda_backend, triton_backend
from cbam_fused.schemas import SCHEMAS
from tests.arguments import arguments
from tests.cases import BY_NAME

GPU = torch.device("cuda", 0)


@pytest.fixture
def forget_kernels():
    """What is known of Triton and of GPUs is found out again, in the test and after it."""
    caches = (triton_backend._kernels, triton_backend._too_old)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def pretended_gpu(monkeypatch, forget_kernels):
    """Sets the compute capability of a GPU that is not there; the library has no code for it."""
    monkeypatch.setattr(cuda_backend, "unusable", lambda device=None: "it is left out")

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


def run(code: str) -> None:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_importing_the_package_does_not_import_triton():
    run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import cbam_fused\n"
        "assert 'triton' not in set(sys.modules) - before"
    )


def test_without_triton():
    run(
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "import cbam_fused\n"
        "from cbam_fused import backends\n"
        "x, w1, w2 = torch.randn(2, 8, 5, 5), torch.randn(2, 8), torch.randn(8, 2)\n"
        "cbam_fused.cbam(x, w1, None, w2, None)\n"
        "(usable, reason), = (row[1:] for row in backends.status() if row[0] == 'triton')\n"
        "assert not usable and reason.startswith('triton cannot be imported: '), reason\n"
        "backend, reason = backends.choose(torch.device('cuda', 0))\n"
        "assert backend.name == 'reference' and 'triton cannot be imported' in reason, reason"
    )


@pytest.mark.parametrize("version", ["3.5.1", "2.9", "3.5.0+git1234"])
def test_an_older_triton_is_a_reason(monkeypatch, pretended_gpu, version):
    pretended_gpu(9, 0)
    monkeypatch.setattr(triton, "__version__", version)
    message = (
        rf"backend triton is not usable here: it needs Triton 3\.6 or later; this is {version}"
    )
    with pytest.raises(RuntimeError, match=message.replace("+", r"\+")):
        backends.get("triton")


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "there is no GPU, and TRITON_INTERPRET=1 is not set"
    assert ("triton", False, message) in backends.status()
    assert "triton" not in backends.available()
    with pytest.raises(RuntimeError, match=message), cbam_fused.use_backend("triton"):
        pass


def test_without_a_gpu_its_tensors_are_for_the_reference(monkeypatch, forget_kernels):
    """Fake tensors may be on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend, reason = backends.choose(GPU)
    assert backend.name == "reference"
    assert reason.endswith("; triton is not usable: there is no GPU")


def test_on_a_gpu_triton_is_chosen(pretended_gpu):
    pretended_gpu(8, 0)
    backend, reason = backends.choose(GPU)
    assert backend.name == "triton"
    assert reason == "Triton can be imported; cuda is not usable: it is left out"
    assert backends.available(GPU) == ("triton", "reference")
    assert ("triton", True, "on a GPU") in backends.status()
    assert "triton" not in backends.available(torch.device("cpu"))


def test_on_an_older_gpu_the_reference_is_chosen(pretended_gpu):
    pretended_gpu(7, 5)
    backend, reason = backends.choose(GPU)
    assert backend.name == "reference"
    expected = "it needs a GPU of compute capability 8.0 or later; cuda:0 has 7.5"
    assert reason.endswith(f"; triton is not usable: {expected}")


def test_tensors_on_a_cpu_are_refused(pretended_gpu):
    pretended_gpu(9, 0)
    message = (
        "cbam_fused: backend triton is not usable for tensors on cpu: it needs a GPU, and "
        "TRITON_INTERPRET=1 is not set"
    )
    gate = BY_NAME["plain"].gate()
    with cbam_fused.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        cbam_fused.cbam(gate.x, *gate.mlp)
    for operation, values in arguments(gate).items():
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.cbam_fused_triton, operation)(*values)


@pytest.mark.parametrize("operation", SCHEMAS)
def test_the_schemas_are_those_of_the_library(operation):
    own, other = (
        getattr(getattr(torch.ops, namespace), operation).default._schema
        for namespace in (triton_backend.NAMESPACE, "cbam_fused")
    )
    assert str(own) == str(other).replace("cbam_fused::", "cbam_fused_triton::")


def test_eager_calls_do_not_go_through_the_dispatcher(monkeypatch):
    """The kernels are called from Python: stand-ins for them get what the caller gave."""
    calls = {}
    standin = SimpleNamespace(
        **{name: lambda *given, n=name: calls.update({n: given}) for name in SCHEMAS}
    )
    monkeypatch.setattr(triton_backend, "_kernels", lambda: triton_backend._Kernels(standin))
    values = arguments(BY_NAME["plain"].gate())
    for name in SCHEMAS:
        triton_backend.operation(name)(*values[name])
    for name in SCHEMAS:
        assert all(a is b for a, b in zip(calls[name], values[name], strict=True))
