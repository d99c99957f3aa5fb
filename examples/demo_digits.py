"""A small residual network with CBAM in every block, trained on scikit-learn's 8x8 digits."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import cbam_fused

BATCH_SIZE = 64


class Block(nn.Module):
    """Two convolutions, then ``relu(gate(x) + shortcut)`` in one call."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.gate = cbam_fused.CBAM(outputs, reduction_ratio=4)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.body(x), residual=self.shortcut(x), activation="relu")


class DigitsNet(nn.Module):
    """``[N, 1, 8, 8]`` -> ``[N, 10]``."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32, stride=2), Block(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` in 0..1 and labels ``[N]``, for training and for the test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """scikit-learn's digits, a fifth of them for the test."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(a) for a in split)
    train_images, test_images = (
        (image.float() / 16).view(-1, 1, 8, 8) for image in (train_images, test_images)
    )
    return Digits(train_images, train_labels, test_images, test_labels)


@dataclass
class Training:
    """A trained network and its history."""

    model: DigitsNet
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = 0.0


def train(
    digits: Digits,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    *,
    epochs: int,
    on_step: Callable[[], object],
) -> Training:
    """Trains a network from a fixed seed: the same first weights and batches, whatever varies.

    Args:
        digits: the data.
        backend: of the gates; None: the automatic choice.
        dtype: of everything.
        epochs: passes over the training images; the learning rate falls to 0 over them.
        on_step: called after each batch.
    """
    torch.manual_seed(0)
    model = DigitsNet().to(dtype)
    result = Training(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    steps = epochs * steps_per_epoch(digits)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, labels = digits.train_images.to(dtype), digits.train_labels
    start = time.perf_counter()
    with cbam_fused.use_backend(backend):
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(BATCH_SIZE):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                result.losses.append(loss.item())
                on_step()
        result.seconds = time.perf_counter() - start
        model.eval()
        with torch.inference_mode():
            hits = model(digits.test_images.to(dtype)).argmax(1) == digits.test_labels
    result.accuracy = hits.double().mean().item()
    return result


def steps_per_epoch(digits: Digits) -> int:
    """Batches in one pass over the training images."""
    return -(-len(digits.train_images) // BATCH_SIZE)


@torch.inference_mode()
def logits_of_both(model: DigitsNet, digits: Digits) -> tuple[Tensor, Tensor, Tensor]:
    """The test digits' logits by fused gates, by reference gates, and by these in float64."""
    fused = model(digits.test_images)
    with cbam_fused.use_backend("reference"):
        reference = model(digits.test_images)
        exact = copy.deepcopy(model).double()(digits.test_images.double())
    return fused, reference, exact
