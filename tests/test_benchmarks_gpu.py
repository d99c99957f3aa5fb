"""The measurements of a GPU, on a CPU: another clock, no graphs, one way to copy."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.timing import Timing, host_clock
from tests.test_benchmarks import no_compilation, scaled

ONE_GATE = ["--device", "cpu", "--shape", "16x5x6", "--batch", "2", "--dtype", "float32"]
ONE_GATE += ["--layout", "nchw", "--repetitions", "2", "--min-time", "0", "--compiled", "compile"]

__all__ = ["no_compilation"]


@pytest.fixture
def on_cpu(monkeypatch, no_compilation):
    monkeypatch.setattr(gpu, "DeviceClock", lambda device: host_clock)
    monkeypatch.setattr(gpu, "graphed", lambda call: call)
    monkeypatch.setattr(gpu, "copies", lambda x, y: {"copy_": lambda: y.copy_(x)})


def measurement(mode="eval", shape="16x8x8", launch="graph", **times):
    configuration = gpu.Configuration(mode, shape, 2, "float32", "nchw", launch)
    timings = {name: Timing((seconds, 2 * seconds), 3) for name, seconds in times.items()}
    return gpu.Measurement(configuration, timings)


def run(folder, *arguments):
    """The exit status and what was written."""
    status = gpu.main([*ONE_GATE, "--output", str(folder), *arguments])
    (path,) = folder.glob("*.json")
    return status, json.loads(path.read_text())


@pytest.mark.usefixtures("on_cpu")
class TestMain:
    def test_writes_what_it_measured(self, tmp_path, capsys):
        status, content = run(tmp_path)
        assert status == 0
        measured = [(r["mode"], r["launch"]) for r in content["results"]]
        assert measured == [(m, w) for m in ("eval", "train") for w in ("graph", "stream")]
        for result in content["results"]:
            assert set(result["times"]) == {"eager", "compile", "fused", "copy_", "copy"}
            assert set(result["fractions_of_copy"]) == {"eager", "compile", "fused", "copy"}
            passes = 2 if result["mode"] == "eval" else 8
            assert result["bytes"] == passes * 4 * 2 * 16 * 5 * 6
        pictures = sorted(path.name.rpartition("-")[2] for path in tmp_path.glob("*.png"))
        assert pictures == ["eval.png", "train.png"]
        assert "geometric means" in capsys.readouterr().out

    def test_does_not_time_a_wrong_gate(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("cbam_fused.fuse_", scaled(1.001))
        status, content = run(tmp_path, "--mode", "eval", "--launch", "graph")
        assert status == 1
        (result,) = content["results"]
        assert "fused" not in result["times"]
        assert result["failures"]["fused"].startswith("y: worst at")
        assert "wrong" in capsys.readouterr().out

    def test_goes_on_without_what_raises(self, tmp_path, monkeypatch):
        def fail(call):
            raise RuntimeError("not permitted when stream is capturing")

        monkeypatch.setattr(gpu, "graphed", fail)
        status, content = run(tmp_path, "--mode", "eval")
        assert status == 1
        assert content["results"] == []
        assert len(content["errors"]) == 1

    def test_one_that_cannot_be_captured_is_a_failure(self, monkeypatch):
        def call():
            raise RuntimeError("out of resources")

        failures = {}
        calls = {"eager": lambda: None, "compile": call}
        monkeypatch.setattr(gpu, "graphed", lambda call: call() or call)
        assert set(gpu.captured(calls, failures)) == {"eager"}
        assert failures == {"compile": "no CUDA graph: RuntimeError: out of resources"}

    def test_a_time_limit_leaves_the_rest_for_later(self, tmp_path, capsys):
        status, _ = run(tmp_path, "--mode", "eval")
        assert status == 0
        assert gpu.main([*ONE_GATE, "--output", str(tmp_path), "--time-limit", "0"]) == 2
        assert "for lack of time" in capsys.readouterr().out
        status, content = run(tmp_path, "--continue")
        assert status == 0
        modes = [r["mode"] for r in content["results"]]
        assert modes == ["eval", "eval", "train", "train"]

    def test_another_version_is_not_continued(self, tmp_path, monkeypatch):
        run(tmp_path, "--mode", "eval")
        monkeypatch.setattr("cbam_fused.info._triton_version", lambda: "1.0")
        with pytest.raises(ValueError, match=r"triton was .*, is 1\.0; not continued"):
            run(tmp_path, "--continue")


def test_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "there is no GPU" in capsys.readouterr().out


def test_a_measurement_survives_json():
    original = measurement(eager=0.004, fused=0.001, copy=0.0005)
    assert gpu.from_json(json.loads(json.dumps(gpu.as_json(original)))) == original


def test_the_fraction_of_the_copy_counts_passes():
    assert gpu.fraction_of_copy(measurement(fused=0.002, copy=0.001), "fused") == 0.5
    assert gpu.fraction_of_copy(measurement("train", fused=0.008, copy=0.001), "fused") == 0.5
    assert gpu.fraction_of_copy(measurement(copy=0.001), "fused") is None


def test_the_yardstick_is_the_fastest_copy():
    timings = measurement(**{"copy_": 3.0, "x + 0": 2.0, "copy kernel": 4.0, "fused": 1.0}).timings
    assert gpu.with_best_copy(timings)["copy"] == timings["x + 0"]


def test_summary_of_each_mode_and_launch():
    both = [measurement(launch=how, eager=4.0, fused=2.0, copy=1.0) for how in gpu.LAUNCHES]
    summaries = gpu.summarise(both)
    assert [s["mode"] for s in summaries] == ["eval, graph, batch 2", "eval, stream, batch 2"]
    means = summaries[0]["geometric_means"]["nchw float32"]
    assert means["eager / fused"] == pytest.approx(2.0)
    assert means["fraction of copy"] == pytest.approx(0.5)


def script(*arguments):
    path = Path(gpu.__file__).with_name("gpu.sh")
    return subprocess.run(["bash", path, *arguments], capture_output=True, text=True)


def test_the_script_explains_itself():
    process = script("--help")
    assert process.returncode == 0
    assert process.stdout.startswith("usage: benchmarks/gpu.sh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "soon"], "--limit must be a number of seconds; got soon"),
        (["--output"], "--output needs a value"),
        (["measure"], "unknown argument measure"),
        (["build", "test", "--", "-x"], "arguments after -- need one phase"),
    ],
    ids=["limit", "no_value", "unknown", "two_phases"],
)
def test_the_script_refuses(arguments, message):
    process = script(*arguments)
    assert process.returncode == 2
    assert message in process.stderr
