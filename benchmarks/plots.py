"""Pictures of what `benchmarks.gpu` measured."""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gates import Measurement

COLOURS = {
    "eager": "#8d99ae",
    "compile": "#f4a259",
    "max-autotune": "#bc4b51",
    "fused": "#2a6f97",
}


def draw(
    measurements: Iterable[Measurement],
    results: Path,
    fraction: Callable[[Measurement, str], float | None],
) -> list[Path]:
    """Bar charts of the fraction of the copy's speed that each implementation reaches.

    One picture for each mode, beside the file `results`: a row of panels for each batch and launch,
    a column for each dtype and layout. None without matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    paths = []
    for mode, members in grouped(measurements, "{c.mode}").items():
        paths.append(results.with_name(f"{results.stem}-{mode}.png"))
        _draw_mode(mode, members, paths[-1], fraction)
    return paths


def grouped(measurements: Iterable[Measurement], name: str) -> dict[str, list[Measurement]]:
    """The measurements by a name with fields of the configuration ``c`` in it."""
    groups: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(name.format(c=measurement.configuration), []).append(measurement)
    return groups


def _draw_mode(mode, members, path, fraction) -> None:
    from matplotlib import pyplot as plt

    rows = grouped(members, "{c.launch}, batch {c.batch}")
    columns = grouped(members, "{c.dtype}, {c.layout}")
    names = [name for name in COLOURS if any(name in m.timings for m in members)]
    size = (1 + 3.2 * len(columns), 1 + 2.6 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, sharey="row", squeeze=False)
    for i, (row, in_row) in enumerate(rows.items()):
        for j, (column, in_column) in enumerate(columns.items()):
            panel = [m for m in in_row if m in in_column]
            _draw_panel(axes[i][j], panel, names, fraction)
            axes[i][j].set_title(f"{column}; {row}", fontsize=9)
        axes[i][0].set_ylabel("speed, copy = 1")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"One CBAM gate, {mode}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axis, panel, names, fraction) -> None:
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [row + width * (i - (len(names) - 1) / 2) for row in range(len(panel))]
        heights = [fraction(m, name) or 0.0 for m in panel]
        axis.bar(places, heights, width, label=name, color=COLOURS[name])
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(panel)), [m.configuration.shape for m in panel], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
