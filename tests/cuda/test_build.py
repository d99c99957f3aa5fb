"""How the CUDA part of the library is built: which compiler, for which GPUs; what is refused."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import build_cuda
from build_cuda import CudaToolchain, NoCudaError
from build_library import Flags, Source, Toolchain, build_record, ninja_file

# Answers as nvcc does. TOP is beside the folder it lies in.
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  --dryrun) echo '#$ TOP={top}' >&2 ;;
  --list-gpu-code) printf 'sm_50\\nsm_75\\nsm_80\\nsm_90\\n' ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """A CUDA toolkit of a release that does not know the newest GPUs, named by CUDA_HOME."""
    for name in ("CBAM_FUSED_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    top = tmp_path / "toolkit"
    (top / "lib64").mkdir(parents=True)
    (top / "lib64" / "libcudart_static.a").touch()
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(top=top))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return top


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.delenv("CBAM_FUSED_CUDA", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_the_toolkit_is_where_nvcc_says(toolkit):
    """nvcc may be a wrapper that lies elsewhere."""
    found = CudaToolchain.find()
    assert found.version == "12.4.131"
    assert found.runtime == toolkit / "lib64" / "libcudart_static.a"


def test_nvcc_on_the_path_is_found(toolkit, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path / 'home' / 'bin'}:/bin:/usr/bin")
    assert CudaToolchain.find().nvcc == str(tmp_path / "home" / "bin" / "nvcc")


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, ("sm_75", "sm_80", "sm_90")),  # what this release knows of the default
        ("", ("sm_75", "sm_80", "sm_90")),
        ("9.0", ("sm_90",)),
        ("8.0;9.0+PTX", ("sm_80", "sm_90", "compute_90")),
        ("8.0 9.0a", ("sm_80", "sm_90a")),
        ("12.0", ("sm_120",)),  # asked for: the compiler says that it cannot
    ],
)
def test_architectures(toolkit, monkeypatch, listed, expected):
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    found = CudaToolchain.find()
    assert found.architectures == expected
    command = " ".join(found.command("g++", ("-fPIC", "-Wall")))
    assert command.count("-gencode=") == len(expected)
    for name in expected:
        assert f"-gencode=arch={name.replace('sm', 'compute')},code={name}" in command


def test_idle_cores_serve_more_architectures_at_once(toolkit, monkeypatch):
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    found = CudaToolchain.find()
    assert found.environment(16 // 5) == {"NVCC_APPEND_FLAGS": "--threads=3"}
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert found.environment(2 // 5) == {"NVCC_APPEND_FLAGS": "-lineinfo --threads=1"}


@pytest.mark.parametrize("entry", ["Hopper", "90", "9", "9.0+", "9.0,8.0"])
def test_unknown_architectures_are_an_error(toolkit, monkeypatch, entry):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{entry}")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must be .*; got '.*'"):
        CudaToolchain.find()


def test_without_nvcc(no_nvcc, monkeypatch):
    message = "no nvcc was found, neither by CUDA_HOME nor on the PATH"
    with pytest.raises(NoCudaError, match=message):
        CudaToolchain.find()
    monkeypatch.setenv("CBAM_FUSED_CUDA", "1")
    with pytest.raises(SystemExit, match=f"CBAM_FUSED_CUDA=1 is set, but {message}"):
        CudaToolchain.find()


def test_a_folder_without_nvcc(no_nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(NoCudaError, match="there was no bin/nvcc in CUDA_HOME="):
        CudaToolchain.find()


def test_a_toolkit_without_the_static_runtime(toolkit):
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    with pytest.raises(NoCudaError, match=r"the CUDA toolkit in .* has no libcudart_static\.a"):
        CudaToolchain.find()


def test_cuda_can_be_left_out(toolkit, monkeypatch):
    monkeypatch.setenv("CBAM_FUSED_CUDA", "0")
    with pytest.raises(NoCudaError, match="CBAM_FUSED_CUDA=0 was set when the package was built"):
        CudaToolchain.find()


def test_a_library_without_cuda_is_built_without_its_sources_and_says_why(tmp_path):
    sources = [Source("csrc/library.cpp"), Source("csrc/cuda/cbam_apply.cu")]
    flags = Flags(("-O3",), ("-fPIC",))
    without = Toolchain("g++", "12", Path("torch"), "2.15", cuda=None, no_cuda="no nvcc")
    cuda = CudaToolchain("nvcc", "13.0.88", Path("libcudart_static.a"), ("sm_90", "compute_90"))
    library = tmp_path / "library"
    library.touch()
    for tools, said, architectures in (
        (without, "none: no nvcc", ()),
        (replace(without, cuda=cuda, no_cuda=""), "13.0.88", ("sm_90", "compute_90")),
    ):
        text = ninja_file(sources, flags, tools)
        assert ("cbam_apply.cu" in text) == ("libcudart_static.a" in text) == bool(tools.cuda)
        record = build_record(library, flags, ("baseline",), tools)
        assert (record["cuda"], record["architectures"]) == (said, architectures)


SPILLS = """
__global__ void __launch_bounds__(1024, 2) kernel(float* p) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = p[1024 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[1024 * i + threadIdx.x + 1] = values[i];
}
"""
ARRAY_IN_MEMORY = """
__global__ void kernel(float* p, int n) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = p[i];
  for (int i = 0; i < n; ++i) values[i * 37 % 64] += p[i];
  p[n] = values[n % 64];
}
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize(
    ("source", "message"),
    [(SPILLS, "Registers are spilled"), (ARRAY_IN_MEMORY, "Local memory used")],
    ids=["spills", "array_in_memory"],
)
def test_memory_of_a_threads_own_is_warned_of(tmp_path, source, message):
    (tmp_path / "kernel.cu").write_text(source)
    command = ["nvcc", *build_cuda.FLAGS, "-arch=sm_90", "-cubin", "kernel.cu", "-o", "kernel"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0
    assert message in process.stdout + process.stderr
