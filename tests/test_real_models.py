"""Networks that packages build with gates of their own: three training steps, fused and not.

In float64: in float32 rounding moves maxima and the edges of ReLUs, and with them gradients, in
both networks. The bound is the rule's, eager's error being taken from float32.
"""

import copy

import pytest
import torch
from pytorchcv.models.cbamresnet import cbam_resnet18, cbam_resnet50
from torch import nn

from cbam_fused import fuse_, unfuse_
from cbam_fused.testing import check_close, scale_error
from tests import yolo

STEPS = 3


def classifier(build):
    torch.manual_seed(0)
    model = build(num_classes=7)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # the package's needs 224 x 224
    return model


def classify(model, images):
    logits = model(images)
    return logits, nn.functional.cross_entropy(logits, torch.arange(len(images)))


def detect(model, images):
    predictions = model(images)
    loss, _ = model.loss(yolo.labelled(images), predictions)
    return torch.cat([predictions["boxes"], predictions["scores"]], 1), loss.sum()


NETWORKS = {
    "pytorchcv_resnet18": (lambda: classifier(cbam_resnet18), classify, 8, "add + relu"),
    "pytorchcv_resnet50": (lambda: classifier(cbam_resnet50), classify, 16, "add + relu"),
    "ultralytics": (yolo.detector, detect, 2, ""),
}


def train(model, forward, batches):
    """Logits and every gradient of the last of several steps, and the losses of all.

    The gradients of a block of layers (a convolution and its norm) are one vector: the error of a
    gradient that is a single number says little.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    dtype = next(model.parameters()).dtype
    for images in batches:
        optimizer.zero_grad()
        logits, loss = forward(model, images.to(dtype))
        loss.backward()
        losses.append(loss.detach().double())
        optimizer.step()
    blocks = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            block = name.rsplit(".", 2)[0]
            blocks.setdefault(f"gradient of {block}", []).append(parameter.grad.flatten())
    gradients = {block: torch.cat(parts).double() for block, parts in blocks.items()}
    return {"logits": logits.detach().double(), "losses": torch.stack(losses)} | gradients


@pytest.mark.parametrize("name", NETWORKS)
def test_three_steps(name):
    build, forward, gates, epilogue = NETWORKS[name]
    model = build()
    batches = torch.rand(STEPS, 2, 3, 64, 64)
    keys = list(model.state_dict())
    single, own = copy.deepcopy(model), copy.deepcopy(model).double()
    fused = copy.deepcopy(own)
    report = fuse_(fused, strict=True)
    assert len(report.fused) == len(report.gates) == gates
    assert {gate.epilogue for gate in report.gates} == {epilogue}
    assert list(fused.state_dict()) == keys

    expected, rounded = train(own, forward, batches), train(single, forward, batches)
    results = train(fused, forward, batches)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        eager = scale_error(rounded[name], expected[name], expected[name])
        check_close(name, result, eager, expected[name])
    classes = {name: type(module) for name, module in own.named_modules()}
    assert len(unfuse_(fused)) == gates
    assert {name: type(module) for name, module in fused.named_modules()} == classes


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_in_float32(name):
    build, forward, *_ = NETWORKS[name]
    model = build()
    images = torch.rand(2, 3, 64, 64)
    fused, own = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse_(fused, strict=True)
    (logits, _), (eager, _), (expected, _) = (
        forward(fused, images),
        forward(model, images),
        forward(own, images.double()),
    )
    check_close("logits", logits, eager, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_matter_to_the_logits(name):
    build, forward, *_ = NETWORKS[name]
    model = build()
    images = torch.rand(2, 3, 64, 64)
    logits, _ = forward(model, images)
    for gate in fuse_(model, verify=False).fused:
        model.get_submodule(gate.paths[0]).forward = lambda x: x
    assert (forward(model, images)[0] - logits).abs().max() > 0.01 * logits.abs().max()
