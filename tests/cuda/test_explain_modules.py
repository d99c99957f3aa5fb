"""`explain` of whole modules: what it counts, and that nothing of them changes."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import nn

import cbam_fused
from cbam_fused import CBAM, GPUS, backends, explain, explanation, fuse_
from tests.cuda.explained import (
    BACKWARD,
    FORWARD,
    gate,
    needs_cuda_code,
)
from tests.gates import resnet

# ---- Modules ------------------------------------------------------------------------------------


def fused_resnet(training):
    model = resnet(CbamModule)
    fuse_(model, strict=True)
    return model.train(training)


def state(model):
    """What must be left as it is; tensors by identity and value."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(t), t.device, t._version, t.clone()) for name, t in tensors],
        [(type(module), module.training) for module in model.modules()],
        [p.grad for p in model.parameters()],
        backends.choose(torch.device("cpu")),
        backends.get("reference"),
    )


def check_equal(actual, expected):
    for (*one, value), (*other, other_value) in zip(actual[0], expected[0], strict=True):
        assert one == other
        assert torch.equal(value, other_value)
    assert actual[1:] == expected[1:]


@needs_cuda_code
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_network(training, channels_last):
    model = fused_resnet(training)
    before = state(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    calls = explain(model, (2, 3, 64, 64), memory_format=layout).calls
    check_equal(state(model), before)
    operations = [call.operation for call in calls]
    assert operations == (FORWARD * 8 + BACKWARD * 8 if training else ["cbam_inference"] * 8)
    channels = [64, 64, 128, 128, 256, 256, 512, 512]
    assert [call.shape[1] for call in calls if call.operation in FORWARD[:1]] == channels * training
    assert all(call.channels_last == channels_last for call in calls)


@needs_cuda_code
def test_training_can_be_asked_for():
    for model in (gate(64), gate(64).eval()):
        before = model.training
        for training, first in ((None, before), (True, True), (False, False)):
            call = explain(model, (2, 64, 8, 8), training=training).calls[0]
            assert call.operation == ("cbam_attend" if first else "cbam_inference")
            assert model.training == before


@needs_cuda_code
def test_norms_that_do_not_train_stay_so():
    model = nn.Sequential(gate(64)).train()
    model[0].SpatialGate.eval()
    launches = explain(model, (2, 64, 8, 8)).calls[0].launches
    assert "batch_statistics" not in {launch.kernel for launch in launches}


@needs_cuda_code
def test_gates_that_are_not_fused_are_not_counted():
    model = nn.Sequential(
        CbamModule(32), CBAM(32), CbamModule(32), nn.SyncBatchNorm.convert_sync_batchnorm(CBAM(32))
    )
    fuse_(model[2])
    model.eval()
    assert len(explain(model, (1, 32, 8, 8)).calls) == 3
    handle = model[1].ChannelGate.mlp.register_forward_hook(lambda *_: None)
    assert len(explain(model, (1, 32, 8, 8)).calls) == 2
    handle.remove()
    assert len(explain(model, (1, 32, 8, 8)).calls) == 3


@needs_cuda_code
def test_equal_calls_are_printed_once():
    model = nn.Sequential(gate(64), gate(64), gate(64)).eval()
    text = str(explain(model, (2, 64, 8, 8), gpu="A100"))
    assert text.count("cbam_inference") == 1
    assert "cbam_inference  2x64x8x8 float32 NCHW  (3 times)\n" in text
    assert re.search(r"\n  predicted  \d+\.\d us each\n", text)
    assert "\n  memory     65.5 kB moved, 131.1 kB accessed; the floor is 65.5 kB\n" in text


@needs_cuda_code
def test_the_dtype_is_that_of_the_module():
    model = nn.Sequential(nn.Conv2d(8, 64, 1), CBAM(64)).bfloat16()
    assert {call.dtype for call in explain(model, (2, 8, 8, 8)).calls} == {torch.bfloat16}
    assert explain(gate(64), (2, 64, 8, 8), dtype=torch.float16).calls[0].dtype == torch.float16
    assert explain((2, 64, 8, 8)).calls[0].dtype == torch.float32


def without_momentum(model):
    model.SpatialGate.spatial.bn.momentum = None
    return model


@needs_cuda_code
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(nn.Sequential(nn.ReLU(inplace=True), CBAM(16)), id="changes_its_input"),
        pytest.param(without_momentum(CBAM(16)), id="norm_without_momentum"),
        pytest.param(CBAM(16).requires_grad_(False), id="frozen"),
        pytest.param(torch.compile(CBAM(16)), id="compiled"),
    ],
)
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modules_and_contexts(model, context):
    with context():
        calls = explain(model, (2, 16, 8, 8), training=True).calls
    assert [call.operation for call in calls] == FORWARD + BACKWARD


@needs_cuda_code
def test_the_default_gpu(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        minor=0,
        multi_processor_count=108,
        L2_cache_size=40 << 20,
        shared_memory_per_multiprocessor=164 << 10,
        shared_memory_per_block_optin=163 << 10,
        memory_clock_rate=1593000,
        memory_bus_width=5120,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain((2, 16, 8, 8)).gpu == GPUS["H200"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    gpu = explain((2, 16, 8, 8)).gpu
    assert gpu[:6] == (properties.name, *GPUS["A100"][1:6])
    assert gpu.memory_rate == pytest.approx(GPUS["A100"].memory_rate, rel=0.01)
    properties.memory_clock_rate = 0
    message = (
        r"^explain: gpu must be given: NVIDIA A100-SXM4-80GB does not say how fast its memory is$"
    )
    with pytest.raises(RuntimeError, match=message):
        explain((2, 16, 8, 8))


@needs_cuda_code
def test_the_backend_may_be_forced():
    with cbam_fused.use_backend("reference"):
        assert explain((2, 16, 8, 8)).calls
        assert backends.choose(torch.device("cpu"))[0].name == "reference"


# ---- Threads and exceptions ---------------------------------------------------------------------


@needs_cuda_code
def test_other_threads_are_not_explained():
    reference, results = backends.get("reference"), []

    def elsewhere():
        with torch.no_grad():
            results.append(gate(16).eval()(torch.empty(1, 16, 4, 4, device="meta")))
            channel_gate = torch.ones(1, 16)
            norm = (None, None, None, None, 0.0)
            apply = backends.get("reference").cbam_apply
            results.append(apply(torch.ones(1, 16, 4, 4), channel_gate, None, *norm, None, "none"))

    def pre_hook(*_):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    model = gate(16).eval()
    model.register_forward_pre_hook(pre_hook)
    assert len(explain(model, (2, 16, 8, 8)).calls) == 1
    assert [result.shape for result in results] == [(1, 16, 4, 4)] * 2
    assert torch.equal(results[1], torch.ones(1, 16, 4, 4))
    assert backends.get("reference") is reference


@needs_cuda_code
def test_threads_explain_at_the_same_time():
    reference, shapes = backends.get("reference"), [(n, 16, 8, 8) for n in range(1, 13)]
    alone = [explain(shape) for shape in shapes]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(explain, shapes)) == alone
    assert backends.get("reference") is reference


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = gate(16)

    def forward(self, x):
        self.gate(x)
        raise KeyError("own")


@needs_cuda_code
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Fails(), (2, 16, 8, 8)), KeyError, "own"),
        (((1, 1, 1 << 16, 1 << 16),), RuntimeError, r"cbam_inference: x must have less than 2\^31"),
        ((gate(32), (2, 16, 8, 8)), ValueError, r"^cbam: mlp_weight1 must be \[2, 16\]"),
    ],
    ids=["module", "operation", "channels"],
)
def test_nothing_is_left_after_an_exception(arguments, error, message):
    reference = backends.get("reference")
    with pytest.raises(error, match=message):
        explain(*arguments)
    assert backends.get("reference") is reference
    with pytest.raises(RuntimeError, match="end without begin"):
        getattr(torch.ops, explanation.NAMESPACE).end()
    assert len(explain((2, 16, 8, 8)).calls) == 1
