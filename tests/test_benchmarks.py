"""The measurements measure what they say, and time nothing that is wrong."""

import copy
import gc
import json

import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import nn

from benchmarks import gates, resnet, saved
from benchmarks.timing import Timing, geometric_mean, interleave, ratio
from benchmarks.verify import LEAD, Oracle, narrow_maxima, separate_maxima

ONE_GATE = ["--shape", "16x5x6", "--batch", "2", "--dtype", "float32", "--layout", "nchw"]
ONE_GATE += ["--repetitions", "2", "--min-time", "0"]


@pytest.fixture
def no_compilation():
    """`compile` runs eagerly: Inductor takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def scaled(factor: float):
    """A `fuse_` that makes a gate wrong by a factor."""

    def fuse(module, strict):
        module.register_forward_hook(lambda _module, _arguments, y: y * factor)

    return fuse


def test_interleave_rotates_and_counts():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    repetitions = []
    timings = interleave(
        variants, repetitions=3, min_time=0.0, on_repetition=lambda: repetitions.append(len(order))
    )
    calibration = 2 * 3
    # Per measurement one untimed and one timed call; every repetition begins with another variant.
    assert "".join(order[calibration:]) == "aabbcc" + "bbccaa" + "ccaabb"
    assert repetitions == [calibration + 6, calibration + 12, calibration + 18]
    assert all(len(t.seconds) == 3 and t.calls == 1 for t in timings.values())
    assert gc.isenabled()


def test_interleave_repeats_short_calls():
    assert interleave({"short": lambda: None}, repetitions=1, min_time=1e-4)["short"].calls > 1


def test_statistics():
    fast, slow = Timing((1.0, 2.0, 4.0), 1), Timing((2.0, 6.0, 8.0), 1)
    assert fast.median == 2.0
    assert fast.quartiles == (1.5, 3.0)
    assert ratio(slow, fast) == 2.0
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_separated_maxima_lead(dtype, layout):
    torch.manual_seed(0)
    channel = CbamModule(16).channel.double()
    x = torch.randn(2, 16, 8, 8).to(dtype, memory_format=layout)
    x[0, :, 0, 0] = 4.0
    with torch.no_grad():
        result = separate_maxima(x, channel)
        pixels = result.double().flatten(2).topk(2, 2).values
        channels = channel(result.double()).topk(2, 1).values.transpose(1, -1)
        for pair in (pixels, channels):
            assert (pair[..., 0] >= pair[..., 1] * (1 + LEAD)).all()
    assert (result.dtype, result.stride()) == (x.dtype, x.stride())
    assert narrow_maxima(x.double(), (1,)).any()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
class TestOracle:
    @pytest.fixture
    def oracle(self, training):
        torch.manual_seed(0)
        configuration = gates.Configuration(
            "train" if training else "eval", "16x8x8", 2, "float32", "channels_last"
        )
        module = gates.gate(configuration)
        self.module = copy.deepcopy(module)
        return Oracle(module, [gates.draw(configuration, module) for _ in range(2)])

    def test_accepts_the_module_itself(self, oracle):
        oracle.check(self.module)

    def test_rejects_a_small_error(self, oracle):
        scaled(1 + 1e-5)(self.module, strict=True)
        with pytest.raises(AssertionError, match="y: worst at"):
            oracle.check(self.module)

    def test_rejects_another_layout(self, oracle):
        self.module.register_forward_hook(lambda _module, _arguments, y: y.contiguous())
        with pytest.raises(AssertionError, match="y: strides"):
            oracle.check(self.module)


@pytest.mark.usefixtures("no_compilation")
class TestGates:
    def test_writes_what_it_measured(self, tmp_path, capsys):
        path = tmp_path / "gates.json"
        assert gates.main([*ONE_GATE, "--json", str(path)]) == 0
        content = json.loads(path.read_text())
        assert [r["mode"] for r in content["results"]] == ["eval", "train"]
        for result in content["results"]:
            assert set(result["times"]) == {"eager", "compile", "fused", "copy"}
            assert all(len(t["repetitions_ms"]) == 2 for t in result["times"].values())
        assert content["environment"]["versions"]["torch"] == torch.__version__
        assert "geometric means" in capsys.readouterr().out

    def test_does_not_time_a_wrong_gate(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("cbam_fused.fuse_", scaled(1.001))
        path = tmp_path / "gates.json"
        assert gates.main([*ONE_GATE, "--mode", "eval", "--json", str(path)]) == 1
        (result,) = json.loads(path.read_text())["results"]
        assert "fused" not in result["times"]
        assert result["failures"]["fused"].startswith("y: worst at")
        assert "wrong" in capsys.readouterr().out


def test_compile_outside_the_rule_is_timed_and_marked():
    configuration = gates.Configuration("train", "16x8x8", 2, "float32", "nchw")
    measurement = gates.Measurement(
        configuration, {"compile": Timing((0.002,), 1)}, {"compile": "off", "fused": "off"}
    )
    assert gates.cell(measurement, "compile") == "2.00 ±0%*"
    assert "wrong" in gates.cell(measurement, "fused")


def test_summary_names_what_is_slower():
    configuration = gates.Configuration("eval", "16x8x8", 2, "float32", "nchw")
    times = {"eager": 4.0, "compile": 1.0, "fused": 2.0, "copy": 1.0}
    timings = {name: Timing((seconds,), 1) for name, seconds in times.items()}
    summary = gates.summary("eval", [gates.Measurement(configuration, timings)])
    assert summary["slower"] == ["eval 2x16x8x8 float32 nchw: 2.00x the time of compile"]
    means = summary["geometric_means"]["nchw float32"]
    assert means == pytest.approx({"eager / fused": 2, "compile / fused": 0.5, "fused / copy": 2})


def test_cost_is_relative_to_the_network_without_gates():
    times = {"without": (1.0, 2.0, 2.0, 2.5, 9.0), "fused": (1.5, 2.2, 2.2, 8.0, 9.0)}
    timings = {name: Timing(seconds, 1) for name, seconds in times.items()}
    assert resnet.cost(timings, "fused") == pytest.approx(0.1)


@pytest.mark.parametrize("variant", resnet.FUSED)
def test_network_check_rejects_identity_gates(variant):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    models = resnet.networks("eval", torch.contiguous_format, images)
    resnet.check(models, images)
    for block in models[variant].layer1:
        block.se = nn.Identity()
    with pytest.raises(AssertionError, match=f"logits, {variant}: worst at"):
        resnet.check(models, images)


def test_saved_counts_storages_once():
    x = torch.randn(4, 8, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 8))
    assert saved.count_saved(lambda: x.exp(), x).x_sized == 1
    assert saved.count_saved(lambda: x * weight, x) == saved.Saved(1, 128, 128)
    assert saved.count_saved(lambda: (x * x).view(-1) * x.view(-1), x).x_sized == 2
    assert saved.count_saved(lambda: x.sum(), x) == saved.Saved(0, 0, 128)


def test_fused_gate_saves_one_tensor_as_large_as_x(monkeypatch):
    monkeypatch.setattr(saved, "SHAPE", (2, 32, 16, 16))
    alone, block = saved.measure(epilogue=False), saved.measure(epilogue=True)
    assert (alone["eager"].x_sized, alone["fused"].x_sized) == (2, 1)
    assert (block["eager"].x_sized, block["fused"].x_sized) == (3, 2)
