"""ultralytics, kept from the network and from the home folder, and a small YOLO that has a CBAM."""

import os
import tempfile
from unittest import mock

import torch

_settings = tempfile.TemporaryDirectory()
os.environ.update(YOLO_OFFLINE="true", YOLO_CONFIG_DIR=_settings.name, YOLO_VERBOSE="false")

from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.nn.modules.conv import CBAM  # noqa: E402

__all__ = ["CBAM", "detector", "labelled"]

_DETECTOR = {
    "nc": 2,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "CBAM", [32, 7]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "CBAM", [64, 3]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 3], 1, "Concat", [1]],
        [-1, 1, "C2f", [32]],
        [[-1, 5], 1, "Detect", ["nc"]],
    ],
}


def detector():
    """A detector of two classes, with two gates."""
    torch.manual_seed(0)
    with mock.patch.object(tasks, "CBAM", CBAM, create=True):
        model = tasks.DetectionModel(_DETECTOR, verbose=False)
    model.args = get_cfg()
    return model


def labelled(images):
    """What the loss takes: two boxes in the first of `images`, one in the second."""
    return {
        "img": images,
        "batch_idx": torch.tensor([0, 0, 1]),
        "cls": torch.tensor([[0.0], [1.0], [1.0]]),
        "bboxes": torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.7, 0.6, 0.3, 0.4], [0.5, 0.5, 0.8, 0.6]]),
    }
