"""`cbam_fused.warmup` in Triton's interpreter, with a timer that knows what it wants."""

import importlib
import json

import pytest
import torch
from torch import nn

import cbam_fused
from cbam_fused import CBAM
from cbam_fused.triton_kernels import configurations
from cbam_fused.triton_kernels.geometry import geometry

candidates = importlib.import_module(
    "cbam_fused.warmup"
).candidates  # the package's is the function

X = torch.randn(1, 8, 3, 3, generator=torch.Generator().manual_seed(0))
SHAPE = geometry(X)
INFERENCE_KERNELS = ("pool_pixels_kernel", "gate_pool_channels_kernel", "convolve_apply_kernel")


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """Choices are forgotten; samples do not fit one program, whose size is not a choice."""
    monkeypatch.setattr(configurations, "_tuned", {})
    monkeypatch.setattr(configurations, "_SAMPLE_WORDS", 0)
    with cbam_fused.use_backend("triton"):
        yield


def prefer(warps: int):
    """A timer under which a kernel is the faster the nearer it is to a number of warps."""

    def timer(_call):
        chosen = [configurations.configuration(kernel, SHAPE) for kernel in configurations.TABLES]
        return sum(1 + abs(c.num_warps - warps) for c in chosen)

    return timer


def gate(training: bool) -> nn.Module:
    torch.manual_seed(0)
    return CBAM(8, 4, kernel_size=1).train(training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_what_runs_and_changes_nothing(training):
    model = nn.Sequential(gate(training), nn.Dropout(0.5)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grad = torch.ones_like(model[0].ChannelGate.mlp[1].weight)
    model[0].ChannelGate.mlp[1].weight.grad = grad
    random = torch.random.get_rng_state()
    report = cbam_fused.warmup(model, X)
    operations = [text.split()[0] for text in report.operations]
    expected = ["cbam_attend", "cbam_apply", "cbam_backward_reduce", "cbam_backward_input"]
    assert operations == (expected if training else ["cbam_inference"])
    assert report.operations[0].endswith("float32 [1, 8, 3, 3]")
    assert report.choices == ()
    assert model[0].ChannelGate.mlp[1].weight.grad is grad
    assert all(p.grad is None for p in model.parameters() if p.grad is not grad)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("example", [(X,), {"x": X}], ids=["tuple", "dict"])
def test_examples(example):
    assert cbam_fused.warmup(gate(False), example).operations


def test_no_gate():
    message = r"^warmup: no fused gate ran; see cbam_fused\.fuse_ and its report$"
    with pytest.raises(RuntimeError, match=message):
        cbam_fused.warmup(nn.Conv2d(8, 4, 1), X)


@pytest.mark.parametrize("warps", [1, 16])
def test_tunes_every_kernel(warps):
    report = cbam_fused.warmup(gate(False), X, tune=True, timer=prefer(warps))
    assert {choice.kernel for choice in report.choices} >= set(INFERENCE_KERNELS)
    for choice in report.choices:
        possible = candidates(choice.kernel, SHAPE)
        nearest = min(abs(c.num_warps - warps) for c in possible)
        assert abs(choice.configuration.num_warps - warps) == nearest
        assert choice.kernel in str(report)
        for n in (SHAPE.n, 64):
            batch = SHAPE._replace(n=n)
            assert configurations.configuration(choice.kernel, batch) == choice.configuration
        other = SHAPE._replace(h=6)
        table = configurations.from_table(choice.kernel, other)
        assert configurations.configuration(choice.kernel, other) == table


def slightly_faster_than_the_table(_call):
    tables = configurations.TABLES
    chosen = [configurations.configuration(kernel, SHAPE) for kernel in tables]
    return 1.0 if chosen == [configurations.from_table(k, SHAPE) for k in tables] else 0.99


def test_noise_is_no_reason_to_leave_the_table():
    cbam_fused.warmup(gate(False), X, tune=True, timer=slightly_faster_than_the_table)
    assert not configurations._tuned or all(
        choice == configurations.from_table(kernel, SHAPE)
        for (kernel, *_), choice in configurations._tuned.items()
    )


def test_a_failing_timer_leaves_the_table():
    def timer(call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cbam_fused.warmup(gate(False), X, tune=True, timer=timer)
    for kernel in INFERENCE_KERNELS:
        assert configurations.configuration(kernel, SHAPE) == configurations.from_table(
            kernel, SHAPE
        )


def test_choices_are_kept_in_a_file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    model = gate(False)
    report = cbam_fused.warmup(model, X, tune=True, path=path, timer=prefer(16))
    y = model(X)
    monkeypatch.setattr(configurations, "_tuned", {})
    cbam_fused.warmup(model, X, path=path)
    for choice in report.choices:
        assert configurations.configuration(choice.kernel, SHAPE) == choice.configuration
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"kernel": "pool_pixels_kernel"}]', '{"a": 1}'])
def test_a_file_that_holds_something_else(tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json holds no tuned configurations"):
        cbam_fused.warmup(gate(False), X, path=path)


def test_a_file_of_unknown_kernels(tmp_path):
    path = tmp_path / "tuned.json"
    kernel = INFERENCE_KERNELS[0]
    configurations.tune(kernel, SHAPE, configurations.from_table(kernel, SHAPE))
    configurations.save_tuned(path)
    rows = json.loads(path.read_text())
    rows[0]["kernel"] = "other_kernel"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"unknown kernels: \['other_kernel'\]"):
        cbam_fused.warmup(gate(False), X, path=path)


def test_no_file():
    with pytest.raises(FileNotFoundError):
        cbam_fused.warmup(gate(False), X, path="does/not/exist.json")
