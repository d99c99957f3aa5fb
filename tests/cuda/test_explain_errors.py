"""`explain`: errors, and the command line."""

import copy

import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import nn

from cbam_fused import GPUS, explain, explanation, library
from cbam_fused.__main__ import main
from tests.cuda.explained import (
    BACKWARD,
    FORWARD,
    STAGE1,
    gate,
    needs_cuda_code,
)

# ---- Errors -------------------------------------------------------------------------------------

SHAPE = "(N, C, H, W), C, H and W of at least 1"
GPU_NAMES = ", ".join(GPUS)
DTYPE_NAMES = "torch.float32, torch.float16, torch.bfloat16, torch.float64"
FORMAT_NAMES = "torch.contiguous_format, torch.channels_last"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            [(64, 256, 56)], {}, ValueError,
            f"module_or_shape must be a torch.nn.Module or a shape {SHAPE}; got (64, 256, 56)",
        ),
        (
            ["64x256x56x56"], {}, ValueError,
            f"module_or_shape must be a torch.nn.Module or a shape {SHAPE}; got '64x256x56x56'",
        ),
        (
            [gate(16), (1, 16, 0, 4)], {}, ValueError,
            f"shape must be a shape {SHAPE}; got (1, 16, 0, 4)",
        ),
        (
            [gate(16), [1, 16, 4, 4.0]], {}, ValueError,
            f"shape must be a shape {SHAPE}; got [1, 16, 4, 4.0]",
        ),
        ([gate(16)], {}, TypeError, "shape must be given with a module: that of its input"),
        (
            [(1, 16, 4, 4), (1, 16, 4, 4)], {}, TypeError,
            "module_or_shape must be a torch.nn.Module where shape is given; got (1, 16, 4, 4)",
        ),
        (
            [(1, 16, 4, 4)], {"gpu": "H300"}, ValueError,
            f"gpu must be a cbam_fused.Gpu or one of {GPU_NAMES}; got 'H300'",
        ),
        (
            [(1, 16, 4, 4)], {"gpu": ["H200"]}, ValueError,
            f"gpu must be a cbam_fused.Gpu or one of {GPU_NAMES}; got ['H200']",
        ),
        (
            [(1, 16, 4, 4)], {"dtype": "float32"}, TypeError,
            f"dtype must be one of {DTYPE_NAMES}; got 'float32'",
        ),
        (
            [gate(16), (1, 16, 4, 4)], {"dtype": torch.int64}, TypeError,
            f"dtype must be one of {DTYPE_NAMES}; got torch.int64",
        ),
        (
            [(1, 16, 4, 4)], {"memory_format": torch.preserve_format}, TypeError,
            f"memory_format must be one of {FORMAT_NAMES}; got torch.preserve_format",
        ),
        (
            [(1, 16, 4, 4)], {"training": "yes"}, TypeError,
            "training must be one of True, False; got 'yes'",
        ),
    ],
)  # fmt: skip
def test_arguments(arguments, options, error, message):
    with pytest.raises(error) as caught:
        explain(*arguments, **options)
    assert str(caught.value) == f"explain: {message}"


@needs_cuda_code
@pytest.mark.parametrize("model", [nn.Conv2d(16, 4, 1), CbamModule(16)], ids=["none", "unfused"])
def test_no_fused_gate_ran(model):
    message = r"^explain: no fused gate ran; see cbam_fused\.fuse_ and its report$"
    with pytest.raises(RuntimeError, match=message):
        explain(copy.deepcopy(model), (1, 16, 4, 4))


@pytest.mark.parametrize(
    ("loaded", "reason", "build", "why"),
    [
        (True, "", {"cuda": "none: there is no nvcc"}, "there is no nvcc"),
        (True, "", {}, "build it again"),
        (False, "it was never built", {"architectures": ["sm_90"]}, "it was never built"),
    ],
    ids=["without", "old", "unloaded"],
)
def test_no_cuda_code(monkeypatch, capsys, loaded, reason, build, why):
    monkeypatch.setattr(library, "loaded", loaded)
    monkeypatch.setattr(library, "reason", reason)
    monkeypatch.setattr(library, "build", build)
    message = f"explain: the library has no CUDA code: {why}"
    for function in (lambda: explain((1, 16, 4, 4)), explanation.plan_rows):
        with pytest.raises(RuntimeError) as caught:
            function()
        assert str(caught.value) == message
    assert main(["explain"]) == 1
    assert capsys.readouterr() == ("", message + "\n")


# ---- Command line -------------------------------------------------------------------------------


@needs_cuda_code
def test_command_line(capsys):
    assert main(["explain", "64x256x56x56", "--dtype", "bfloat16", "--gpu", "H200"]) == 0
    expected = str(explain(STAGE1, dtype=torch.bfloat16, gpu="H200"))
    out, err = capsys.readouterr()
    assert (out, err) == (expected + "\n", "")
    assert out.startswith(
        "H200: sm_90, 132 multiprocessors, 60 MiB of L2 cache, 4.80 TB/s of memory\n"
    )
    assert "cbam_inference  64x256x56x56 bfloat16 NCHW\n" in out
    assert "memory     205.5 MB moved, 411.0 MB accessed; the floor is 205.5 MB\n" in out
    assert out.rstrip().endswith("in a graph, with a cold cache; a model, not a measurement")


@needs_cuda_code
def test_command_line_options(capsys):
    options = ["--training", "--channels-last", "--gpu", "RTX 4090"]
    assert main(["explain", "8x64x32x32", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("RTX 4090: sm_89, 128 multiprocessors")
    for operation in FORWARD + BACKWARD:
        assert f"\n{operation}  8x64x32x32 float32 channels_last\n" in out


@needs_cuda_code
def test_command_line_without_a_shape(capsys):
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = explanation.plan_rows()
    assert lines == [f"{row.name}: {row.strategy}: {row.reason}" for row in rows]


@pytest.mark.parametrize("shape", ["64x256x56", "64x256x56xW", "64,256,56,56", "-1x16x4x4", ""])
def test_command_line_with_a_bad_shape(capsys, shape):
    assert main(["explain", "--gpu=H200", "--", shape]) == 1
    message = f"explain: shape must be NxCxHxW, as 64x256x56x56; got {shape!r}\n"
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("option", ["--gpu=H300", "--dtype=int8"])
def test_command_line_with_an_unknown_choice(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        main(["explain", "1x16x4x4", option])
    assert f"invalid choice: '{option.partition('=')[2]}'" in capsys.readouterr().err
