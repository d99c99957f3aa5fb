"""Networks that packages build with gates of their own: three training steps, fused and not.

In float64: in float32 rounding moves maxima and the edges of ReLUs, and with them gradients, in
both networks. The bound is the rule's, eager's error being taken from float32.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from pytorchcv.models.cbamresnet import cbam_resnet18, cbam_resnet50
from torch import Tensor, nn

from cbam_fused import fuse_, unfuse_
from cbam_fused.testing import check_close, scale_error
from examples import demo_photographs
from tests import yolo
from tests.blocks import watched
from tests.gates import resnet

STEPS = 3


def classifier(build):
    torch.manual_seed(0)
    model = build(num_classes=7)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # the package's needs 224 x 224
    return model


def noise():
    return torch.rand(STEPS, 2, 3, 64, 64)


def photographs():
    """``[3, 2, 3, 96, 96]`` in 0..1: six photographs, cropped and resized."""
    images = [demo_photographs.photograph(name, 96) for name in demo_photographs.PHOTOGRAPHS]
    pictures = torch.stack([torch.from_numpy(image) for image in images])
    return pictures.float().permute(0, 3, 1, 2).unflatten(0, (STEPS, 2))


def classify(model, images):
    """Logits and loss; in eval mode the logits alone."""
    logits = model(images)
    if not model.training:
        return logits
    return logits, nn.functional.cross_entropy(logits, torch.arange(len(images)))


def detect(model, images):
    """What the head predicts, and the loss; in eval mode the decoded boxes and scores alone."""
    predictions = model(images)
    if not model.training:
        return predictions[0]
    loss, _ = model.loss(yolo.labelled(images), predictions)
    return torch.cat([predictions["boxes"], predictions["scores"]], 1), loss.sum()


class Network(NamedTuple):
    """How to build and feed it, and what `fuse_` is to find."""

    build: Callable[[], nn.Module]
    gates: int
    epilogue: str = "add + relu"
    batches: Callable[[], Tensor] = noise
    forward: Callable = classify


NETWORKS = {
    "timm_resnet18": Network(lambda: resnet("cbam"), 8),
    "timm_resnet18_light": Network(lambda: resnet("lcbam"), 8),
    "timm_resnet50": Network(lambda: resnet("cbam", "resnet50"), 16),
    "timm_resnext50": Network(lambda: resnet("cbam", "resnext50_32x4d"), 16),
    "pytorchcv_resnet18": Network(lambda: classifier(cbam_resnet18), 8),
    "pytorchcv_resnet50": Network(lambda: classifier(cbam_resnet50), 16),
    "ultralytics": Network(yolo.detector, 2, "", photographs, detect),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def gradients(model):
    """By block of layers (a convolution and its norm), each as one vector: the error of a gradient
    that is a single number says little.
    """
    blocks = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            block = name.rsplit(".", 2)[0]
            blocks.setdefault(f"gradient of {block}", []).append(parameter.grad.flatten())
    return {block: torch.cat(parts).double() for block, parts in blocks.items()}


def train(model, forward, batches):
    """Logits and every gradient of the last of several steps, and the losses of all; the logits in
    eval mode after them, to which the running statistics matter.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    batches = batches.to(next(model.parameters()).dtype)
    for images in batches:
        optimizer.zero_grad()
        logits, loss = forward(model, images)
        loss.backward()
        losses.append(loss.detach().double())
        optimizer.step()
    results = {"logits": logits.detach().double(), "losses": torch.stack(losses)}
    with torch.no_grad():
        results["logits in eval mode"] = forward(model.eval(), batches[0]).double()
    return results | gradients(model)


def test_three_steps(network):
    model, batches = network.build(), network.batches()
    keys = list(model.state_dict())
    single, own = copy.deepcopy(model), copy.deepcopy(model).double()
    fused = copy.deepcopy(own)
    report = fuse_(fused, strict=True)
    assert len(report.fused) == len(report.gates) == network.gates
    assert {gate.epilogue for gate in report.gates} == {network.epilogue}
    assert list(fused.state_dict()) == keys

    expected = train(own, network.forward, batches)
    rounded = train(single, network.forward, batches)
    with watched() as calls:
        results = train(fused, network.forward, batches)
    call = (True, "relu") if network.epilogue else (False, "none")
    assert calls == [call] * network.gates * (STEPS + 1)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        eager = scale_error(rounded[name], expected[name], expected[name])
        check_close(name, result, eager, expected[name])
    classes = {name: type(module) for name, module in own.named_modules()}
    assert len(unfuse_(fused)) == network.gates
    assert {name: type(module) for name, module in fused.named_modules()} == classes


def test_logits_in_float32(network):
    model, images = network.build(), network.batches()[0]
    fused, own = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse_(fused, strict=True)
    models = ((fused, images), (model, images), (own, images.double()))
    logits = [network.forward(*inputs)[0] for inputs in models]
    check_close("logits", *logits)
    with torch.no_grad():
        logits = [network.forward(net.eval(), x) for net, x in models]
    check_close("logits in eval mode", *logits)


def test_gates_matter_to_the_logits(network):
    model, images = network.build(), network.batches()[0]
    logits, _ = network.forward(model, images)
    for gate in fuse_(model, verify=False, epilogue=False).fused:
        model.get_submodule(gate.paths[0]).forward = lambda x: x
    assert (network.forward(model, images)[0] - logits).abs().max() > 0.01 * logits.abs().max()


def test_ultralytics_own_fusing_of_norms_keeps_the_gates():
    """As its predictor does: Conv and norm become one, the gates stay."""
    model, images = yolo.detector().eval(), photographs()[0]
    fused, own = copy.deepcopy(model), copy.deepcopy(model).double()
    fuse_(fused, strict=True)
    for detector in (fused, model, own):
        detector.fuse(verbose=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad(), watched() as calls:
        predictions = fused(images)[0]
        check_close("predictions", predictions, model(images)[0], own(images.double())[0])
    assert len(calls) == 2
