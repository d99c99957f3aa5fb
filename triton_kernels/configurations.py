"""The choice of tile sizes, warps and stages: `tables` has a table per kernel, first match wins.

A choice depends on channels, pixels, size of an element and layout alone, never on the batch or the
device: it decides the order of sums.

`load_tuned` adds choices that were measured, for single shapes; they come before the tables.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import triton

from cbam_fused.triton_kernels.geometry import Geometry
from cbam_fused.triton_kernels.tables import TABLES, Configuration

_SAMPLE_WORDS = 4096  # of 4 bytes; with 8192 a C x C layer spills registers
_SAMPLE_WEIGHTS = 8192  # 32 KB, which each program loads


def whole_sample(shape: Geometry, weights: int) -> Configuration | None:
    """For a kernel that keeps a sample in the registers of one program, 32 words in each thread.

    None if the sample is too large, or a layer of the MLP has too many ``weights``.
    """
    block_c, block_p = triton.next_power_of_2(shape.c), triton.next_power_of_2(shape.pixels)
    words = block_c * block_p * max(shape.element_size // 4, 1)
    if words > _SAMPLE_WORDS or weights > _SAMPLE_WEIGHTS:
        return None
    return Configuration(max(words // 1024, 1), block_c, block_p)


_Key = tuple[str, int, int, int, int, bool]
_tuned: dict[_Key, Configuration] = {}
_lookups: list[tuple[str, Geometry]] | None = None


def _key(kernel: str, shape: Geometry) -> _Key:
    return kernel, shape.c, shape.h, shape.w, shape.element_size, shape.channels_last


def configuration(kernel: str, shape: Geometry) -> Configuration:
    """The configuration of ``kernel`` for ``shape``: a tuned one, else that of the first row."""
    if _lookups is not None:
        _lookups.append((kernel, shape))
    tuned = _tuned.get(_key(kernel, shape))
    return from_table(kernel, shape) if tuned is None else tuned


def from_table(kernel: str, shape: Geometry) -> Configuration:
    """The configuration of the first row for ``shape``."""
    return next(row.configuration for row in TABLES[kernel] if row.condition(shape))


@contextlib.contextmanager
def lookups() -> Iterator[list[tuple[str, Geometry]]]:
    """Collects the kernels and shapes that configurations are asked for within the context."""
    global _lookups
    previous, _lookups = _lookups, []
    try:
        yield _lookups
    finally:
        _lookups = previous


def tune(kernel: str, shape: Geometry, choice: Configuration | None) -> None:
    """Uses ``choice`` for ``kernel`` on this shape from now on, whatever the batch; None: the
    table's.
    """
    if choice is None:
        _tuned.pop(_key(kernel, shape), None)
    else:
        _tuned[_key(kernel, shape)] = choice


_KEY = ("kernel", "channels", "height", "width", "element_size", "channels_last")


def save_tuned(path: str | Path) -> None:
    """Writes all tuned choices as JSON."""
    rows = [dict(zip(_KEY, key, strict=True)) | asdict(c) for key, c in _tuned.items()]
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def load_tuned(path: str | Path) -> None:
    """Adds the choices that `save_tuned` wrote. Raises ValueError if the file is no such."""
    try:
        rows = json.loads(Path(path).read_text())
        loaded = {tuple(row.pop(k) for k in _KEY): Configuration(**row) for row in rows}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no tuned configurations: {error!r}") from error
    if unknown := {key[0] for key in loaded} - TABLES.keys():
        raise ValueError(f"{path} has configurations for unknown kernels: {sorted(unknown)}")
    _tuned.update(loaded)
