"""The demo's pictures: loss curves, and spatial attention maps over images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

ORANGE, BLUE = "#E69F00", "#0072B2"


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
    path: Path,
    losses: dict[str, Sequence[float]],
    exact: Sequence[float],
    steps_per_epoch: int,
    title: str,
) -> Path:
    """Two loss curves on one pair of axes, and below how far each strays from `exact`."""
    epochs = (np.arange(len(exact)) + 1) / steps_per_epoch
    figure, (curves, differences) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
    )
    styles = ({"color": ORANGE, "linewidth": 4, "alpha": 0.6}, {"color": BLUE, "linewidth": 1.2})
    for (label, values), style in zip(losses.items(), styles, strict=True):
        curves.plot(epochs, values, label=label, **style)
        gap = np.abs(np.asarray(values) - np.asarray(exact))
        differences.plot(epochs, np.where(gap > 0, gap, np.nan), **style)
    curves.set(yscale="log", ylabel="training loss", title=title)
    curves.legend(frameon=False)
    differences.set(
        yscale="log", ylabel="|loss - loss in float64|", xlabel="epoch", xlim=(0, epochs[-1])
    )
    for axes in (curves, differences):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return _save(figure, path)


def _outline(cell: plt.Axes, image: np.ndarray) -> None:
    """Draws where `image` crosses half brightness, closed at its border."""
    framed = np.pad(image, 1, constant_values=image.max())
    y, x = (np.arange(-1, extent + 1) for extent in image.shape)
    limits = {"xlim": cell.get_xlim(), "ylim": cell.get_ylim()}
    cell.contour(x, y, framed, levels=[0.5], colors="white", linewidths=1.2)
    cell.set(**limits)


def attention_maps(
    path: Path,
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    rows: Sequence[AttentionRow],
    title: str,
    caption: str,
    *,
    outline: bool = False,
) -> Path:
    """Images in the first row, and below the map of one gate a row.

    A row has one colour scale, between the 1st and 99th percentile of its maps.

    Args:
        path: where the picture is written.
        images: N images, ``[height, width, 3]`` or ``[height, width]``, in 0..1.
        labels: N names.
        rows: the gates.
        title, caption: above and below the pictures.
        outline: draw the image's outline over the map; otherwise the map is laid over the image.
    """
    side = min(1.9, 12 / len(images))
    size = (side * len(images) + 1, (side + 0.1) * (1 + len(rows)) + 0.9)
    figure, axes = plt.subplots(
        1 + len(rows), len(images), figsize=size, squeeze=False, layout="constrained"
    )
    for cell, image, label in zip(axes[0], images, labels, strict=True):
        cell.imshow(image, cmap="gray", vmin=0, vmax=1)
        cell.set_title(label, fontsize=10)
    for cells, row in zip(axes[1:], rows, strict=True):
        low, high = np.percentile(row.maps, (1, 99))
        for cell, image, attention in zip(cells, images, row.maps, strict=True):
            gray = image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])
            place = {"extent": (-0.5, gray.shape[1] - 0.5, gray.shape[0] - 0.5, -0.5)}
            colours = {"cmap": "inferno", "vmin": low, "vmax": high, "interpolation": "bicubic"}
            if not outline:
                cell.imshow(gray, cmap="gray", vmin=0, vmax=1, **place)
            cell.imshow(attention, alpha=1 if outline else 0.7, **colours, **place)
            if outline:
                _outline(cell, gray)
        cells[0].set_ylabel(row.label, fontsize=10)
        scale = plt.cm.ScalarMappable(plt.Normalize(low, high), cmap="inferno")
        bar = figure.colorbar(scale, ax=list(cells), fraction=0.02, pad=0.01)
        bar.set_label("Ms", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(caption, fontsize=9, color="0.35")
    return _save(figure, path)
