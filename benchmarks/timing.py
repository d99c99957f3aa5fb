"""Times of several variants of one computation, interleaved: a busy machine slows all alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value per repetition; each is the mean over `calls` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def ratio(numerator: Timing, denominator: Timing) -> float:
    """The median over repetitions of the ratio of two times, taken shortly after one another."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean; None where there are no values."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


Clock = Callable[[Callable[[], object], int], float]
"""``clock(function, calls)``: seconds per call, over so many calls."""


def host_clock(function: Callable[[], object], calls: int) -> float:
    """A `Clock` for functions that have done their work when they return."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    min_time: float,
    on_repetition: Callable[[], object] = lambda: None,
    clock: Clock = host_clock,
) -> dict[str, Timing]:
    """Times every variant once per repetition, in an order that rotates between repetitions.

    A measurement begins with an untimed call, which brings the variant's own data into the caches,
    and lasts about `min_time` seconds or longer. The garbage collector is off meanwhile.

    Args:
        variants: functions without arguments, by name.
        repetitions: measurements per variant.
        min_time: shortest measurement, in seconds; decides how many calls it averages.
        on_repetition: called after each repetition.
        clock: measures a number of calls.
    """
    names = list(variants)
    calls = {}
    for name, function in variants.items():
        function()
        calls[name] = max(1, math.ceil(min_time / clock(function, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for repetition in range(repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                variants[name]()
                seconds[name].append(clock(variants[name], calls[name]))
            gc.collect()
            on_repetition()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(seconds[name]), calls[name]) for name in names}
