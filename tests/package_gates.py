"""All gates that `fuse_` knows: those of packages that other tests do not need, too."""

from pytorchcv.models.cbamresnet import CbamBlock

from tests import yolo
from tests.gates import GATES

ALL_GATES = GATES | {
    "ultralytics": lambda: yolo.CBAM(32),
    "ultralytics_k3": lambda: yolo.CBAM(32, 3),
    "pytorchcv": lambda: CbamBlock(32, 4),
}
