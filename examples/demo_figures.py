"""The demo's pictures: loss curves, and spatial attention maps over images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

REFERENCE, FUSED = "#E69F00", "#0072B2"


@dataclass(frozen=True)
class AttentionRow:
    """The maps of one gate, ``[N, H, W]``, and what to call them."""

    label: str
    maps: np.ndarray


def _save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def loss_curves(
    path: Path, reference: Sequence[float], fused: Sequence[float], steps_per_epoch: int, title: str
) -> Path:
    """Both loss curves on one pair of axes, and their difference below."""
    epochs = (np.arange(len(reference)) + 1) / steps_per_epoch
    figure, (losses, difference) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
    )
    losses.plot(epochs, reference, color=REFERENCE, linewidth=4, alpha=0.6, label="reference gates")
    losses.plot(epochs, fused, color=FUSED, linewidth=1.2, label="fused gates")
    losses.set(yscale="log", ylabel="training loss", title=title)
    losses.legend(frameon=False)
    gap = np.abs(np.asarray(reference) - np.asarray(fused))
    difference.plot(epochs, np.where(gap > 0, gap, np.nan), color="0.3", linewidth=1)
    difference.set(yscale="log", ylabel="|difference|", xlabel="epoch")
    for axes in (losses, difference):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return _save(figure, path)


def attention_maps(
    path: Path,
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    rows: Sequence[AttentionRow],
    title: str,
    caption: str,
) -> Path:
    """Images in the first row, and below, over each image, the map of one gate a row.

    A row has one colour scale, between the 1st and 99th percentile of its maps.

    Args:
        path: where the picture is written.
        images: N images, ``[height, width, 3]`` or ``[height, width]``, in 0..1.
        labels: N names.
        rows: the gates.
        title, caption: above and below the pictures.
    """
    width = 1.75 * len(images) + 1.2
    figure, axes = plt.subplots(
        1 + len(rows),
        len(images),
        figsize=(width, 1.85 * (1 + len(rows)) + 1.1),
        squeeze=False,
        layout="constrained",
    )
    for column, (image, label) in enumerate(zip(images, labels, strict=True)):
        axes[0, column].imshow(image, cmap="gray", vmin=0, vmax=1)
        axes[0, column].set_title(label, fontsize=10)
    for cells, row in zip(axes[1:], rows, strict=True):
        low, high = np.percentile(row.maps, (1, 99))
        for cell, image, attention in zip(cells, images, row.maps, strict=True):
            gray = image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])
            extent = (-0.5, gray.shape[1] - 0.5, gray.shape[0] - 0.5, -0.5)
            cell.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=extent)
            overlay = cell.imshow(
                attention,
                cmap="inferno",
                vmin=low,
                vmax=high,
                alpha=0.7,
                extent=extent,
                interpolation="bicubic",
            )
        cells[0].set_ylabel(row.label, fontsize=10)
        bar = figure.colorbar(overlay, ax=list(cells), fraction=0.02, pad=0.01)
        bar.set_label("Ms", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(caption, fontsize=9, color="0.35")
    return _save(figure, path)
