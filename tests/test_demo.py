"""The parts of the demo, at sizes that take no time."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers.cbam import CbamModule
from torch import nn

from cbam_fused import CBAM
from examples import demo, demo_attention, demo_digits, demo_figures, demo_photographs


@pytest.mark.parametrize("name", demo_photographs.PHOTOGRAPHS)
def test_photographs_need_no_download(name):
    image = demo_photographs.photograph(name, size=32)
    assert image.shape == (32, 32, 3)
    assert 0 <= image.min() < image.max() <= 1


def test_batch_is_normalised():
    gray = np.tile(demo_photographs.IMAGENET_MEAN.numpy().reshape(1, 1, 3), (4, 5, 1))
    images = demo_photographs.batch([gray, gray])
    assert images.shape == (2, 3, 4, 5)
    assert images.abs().max() < 1e-6


def test_spatial_attention_of_timm():
    torch.manual_seed(0)
    gate, x = CbamModule(16).eval(), torch.randn(2, 16, 6, 5)
    u = gate.channel(x)
    pooled = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True)], 1)
    expected = torch.sigmoid(gate.spatial.conv(pooled)).squeeze(1)
    torch.testing.assert_close(demo_attention.spatial_attention(gate, x), expected)


def test_spatial_attention_of_the_official_module():
    torch.manual_seed(0)
    gate, x = CBAM(16).eval(), torch.randn(2, 16, 6, 5)
    u = gate.ChannelGate(x)
    pooled = torch.cat([u.amax(1, keepdim=True), u.mean(1, keepdim=True)], 1)
    expected = torch.sigmoid(gate.SpatialGate.spatial(pooled)).squeeze(1)
    torch.testing.assert_close(demo_attention.spatial_attention(gate, x), expected)


def test_gate_inputs_are_what_the_gates_see():
    model = nn.Sequential(nn.ReLU(), CbamModule(8), nn.Conv2d(8, 8, 1), CbamModule(8)).eval()
    images = torch.randn(2, 8, 6, 6)
    inputs = demo_attention.gate_inputs(model, images)
    assert list(inputs) == ["1", "3"]
    torch.testing.assert_close(inputs["1"], images.relu())
    torch.testing.assert_close(model[3](inputs["3"]), model(images))
    assert not model[1]._forward_pre_hooks


def test_without_gates_has_none():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(CbamModule(8)))
    bare = demo_photographs.without_gates(model)
    assert not demo_attention.gates_of(bare)
    assert len(demo_attention.gates_of(model)) == 1
    images = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(bare(images), model[0](images))


def logits(**changes) -> demo_photographs.Logits:
    exact = torch.linspace(-1, 1, 10, dtype=torch.float64)
    same = {"eager": exact.float(), "fused": exact.float(), "identity": exact.float() + 1}
    return demo_photographs.Logits(**(same | changes), expected=exact)


def test_comparison_passes_and_fails(capsys):
    assert demo.compare(logits())
    wrong = torch.linspace(-1, 1, 10) * 1.001
    assert not demo.compare(logits(fused=wrong))
    assert not demo.compare(logits(identity=logits().eager))
    output = capsys.readouterr().out
    assert "fused network is off: logits: worst at" in output
    assert "comparison shows nothing" in output


def small_digits() -> demo_digits.Digits:
    digits = demo_digits.load_digits()
    return demo_digits.Digits(*(part[:128] for part in vars(digits).values()))


def test_digits_are_split():
    digits = demo_digits.load_digits()
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.max() == 1.0
    assert digits.test_labels.bincount().min() >= 34


def test_both_trainings_start_alike_and_learn(monkeypatch):
    monkeypatch.setattr(demo_digits, "BATCH_SIZE", 16)
    digits = small_digits()
    steps = []
    runs = [
        demo_digits.train(digits, name, epochs=10, on_step=lambda: steps.append(0))
        for name in ("reference", None)
    ]
    reference, fused = (run.losses for run in runs)
    assert len(reference) == len(fused) == len(steps) / 2 == 80
    assert fused[0] == pytest.approx(reference[0])
    assert fused[-1] < 0.7 * fused[0]
    assert not demo.outside_rule(*demo_digits.logits_of_both(runs[1].model, digits))


def test_digits_attention_has_a_map_per_gate():
    model = demo_digits.DigitsNet().eval()
    maps = demo_attention.attention(model, small_digits().test_images[:3])
    assert [values.shape for values in maps.values()] == [(3, 8, 8), (3, 4, 4), (3, 4, 4)]
    assert all(((values > 0) & (values < 1)).all() for values in maps.values())


@pytest.mark.parametrize("outline", [False, True])
def test_pictures_are_written(tmp_path, outline):
    images = [np.full((8, 8), 0.5), np.random.default_rng(0).random((8, 8, 3))]
    rows = [demo_figures.AttentionRow("gate", np.linspace(0, 1, 32).reshape(2, 4, 4))]
    path = tmp_path / "new" / "maps.png"
    maps = demo_figures.attention_maps(path, images, ["a", "b"], rows, "title", "", outline=outline)
    losses = {"reference": [1.0, 0.5, 0.3], "fused": [1.0, 0.4, 0.2]}
    exact = [1.0, 0.6, 0.4]
    curves = demo_figures.loss_curves(tmp_path / "curves.png", losses, exact, 1, "title")
    for path in (maps, curves):
        with Image.open(path) as picture:
            assert picture.width > 300
            assert len(picture.convert("L").getcolors()) > 10
