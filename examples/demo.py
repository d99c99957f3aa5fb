"""Fused CBAM gates in a real network: the same outputs, faster, and trainable.

``make demo``, or ``python -m examples.demo``. Takes under three minutes on two cores, a third of
it for torch.compile. The exit status is 1 if the outputs differ by more than rounding does.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich import box
from rich.rule import Rule
from rich.table import Table
from torch import Tensor, nn

from benchmarks import report
from benchmarks.resnet import resnet50
from benchmarks.timing import Timing, ratio
from cbam_fused.testing import check_close
from examples import demo_attention, demo_digits, demo_figures, demo_photographs
from examples.demo_figures import AttentionRow

NETWORK_REPETITIONS = 5
GATE_REPETITIONS = 11
EPOCHS = 8
PICTURED_GATES = {"layer1.2.se": "stage 1, 56 x 56", "layer2.3.se": "stage 2, 28 x 28"}

console = report.console


@contextmanager
def working(description: str) -> Iterator[None]:
    """A moving bar while the length of the work is not known."""
    with report.progress() as progress:
        progress.add_task(description, total=None)
        yield


def outside_rule(actual: Tensor, eager: Tensor, expected: Tensor) -> str:
    """Why `actual` is outside the tolerance rule; empty if it is within."""
    try:
        check_close("logits", actual, eager, expected)
    except AssertionError as error:
        return str(error)
    return ""


def largest(values: Tensor) -> str:
    return f"{values.abs().max().item():.1e}"


def compare(logits: demo_photographs.Logits) -> bool:
    """Prints how far apart the logits are; whether fused is within rounding and no gates is not."""
    eager, fused, expected, identity = vars(logits).values()
    table = Table(title=f"{len(eager)} photographs, 1000 logits each", box=box.SIMPLE_HEAD)
    table.add_column("logits")
    table.add_column("largest absolute value", justify="right")
    table.add_row("eager", largest(eager))
    table.add_row("fused - eager", largest(fused - eager))
    table.add_row("eager - float64", largest(eager - expected))
    table.add_row("fused - float64", largest(fused - expected))
    table.add_row("without any gate - eager", largest(identity - eager))
    console.print(table)

    problem = outside_rule(fused, eager, expected)
    if problem:
        console.print(f"[red]The fused network is off: {problem}")
    elif not outside_rule(identity, eager, expected):
        console.print("[red]A network without gates passes too: the comparison shows nothing.")
        return False
    else:
        console.print(
            "Fused is as close to float64 as eager is, up to a factor of 2; a network without gates"
            " is not, so the comparison can fail."
        )
    return not problem


def times_table(network: dict[str, Timing], gates: dict[str, Timing]) -> Table:
    """Times of the network and of its gates alone."""
    table = Table(title=f"inference: {report.SPREAD}", box=box.SIMPLE_HEAD)
    table.add_column("gates")
    for part in ("whole network", "its 16 gates alone"):
        table.add_column(part, justify="right")
        table.add_column("speed-up", justify="right")
    for name in network:
        cells = []
        for timings in (network, gates):
            speedup = ratio(timings["eager"], timings[name])
            cells += [report.milliseconds(timings[name]), report.times(speedup)]
        table.add_row(name, *cells)
    return table


def time_network(eager: nn.Module, fused: nn.Module, images: Tensor) -> None:
    """Times eager, compiled and fused, network and gates, and prints them."""
    models = {"eager": eager, "torch.compile": demo_photographs.compiled(eager), "fused": fused}
    with working("torch.compile of the network"), torch.inference_mode():
        models["torch.compile"](images)
    with working("timing the network"):
        network = demo_photographs.network_times(models, images, NETWORK_REPETITIONS)

    inputs = demo_attention.gate_inputs(eager, images)
    torch.compiler.reset()
    models["torch.compile"] = demo_photographs.compiled_gates(eager)
    with working("torch.compile of the gates, and timing them"):
        gates = demo_photographs.gate_times(models, inputs, GATE_REPETITIONS)
    console.print(times_table(network, gates))


def show_network(folder: Path) -> tuple[bool, Path]:
    """Photographs through a ResNet-50; whether outputs agree, and the picture."""
    torch.manual_seed(0)
    photographs = [demo_photographs.photograph(name) for name in demo_photographs.PHOTOGRAPHS]
    images = demo_photographs.batch(photographs)
    with working("building ResNet-50"):
        eager = resnet50("cbam", images)
        fused, fuse_report = demo_photographs.fused_copy(eager)
    console.print(fuse_report)
    with working("comparing the logits"):
        logits = demo_photographs.logits(eager, fused, images)
    same = compare(logits)
    time_network(eager, fused, images)
    maps = demo_attention.attention(eager, images)
    rows = [AttentionRow(label, maps[name].numpy()) for name, label in PICTURED_GATES.items()]
    picture = demo_figures.attention_maps(
        folder / "attention_photographs.png",
        photographs,
        list(demo_photographs.PHOTOGRAPHS),
        rows,
        "Spatial attention of two gates of ResNet-50 with CBAM",
        "The weights are random: the maps show what untrained gates react to, not what trained ones"
        " attend to. The bright and dark frames come from zero padding.",
    )
    return same, picture


def training_table(runs: dict[str, demo_digits.Training], epoch: int) -> Table:
    """Loss, accuracy and time of every run, and how far its loss strays from the last run's."""
    table = Table(title=f"{EPOCHS} epochs from the same seed", box=box.SIMPLE_HEAD)
    table.add_column("gates")
    columns = (
        "first loss",
        "last epoch's loss",
        "test accuracy",
        "furthest from float64",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="right")
    *_, exact = runs.values()
    for label, run in runs.items():
        last = sum(run.losses[-epoch:]) / epoch
        gap = max(abs(a - b) for a, b in zip(run.losses, exact.losses, strict=True))
        numbers = (f"{run.losses[0]:.6f}", f"{last:.4f}", f"{run.accuracy:.2%}")
        table.add_row(label, *numbers, f"{gap:.1e}" if gap else "-", f"{run.seconds:.1f}")
    return table


def show_training(folder: Path) -> tuple[bool, list[Path]]:
    """The digits, trained with reference and with fused gates; agreement, and the pictures."""
    digits = demo_digits.load_digits()
    epoch = demo_digits.steps_per_epoch(digits)
    runs = {}
    with report.progress() as progress:
        for label, backend, dtype in (
            ("reference", "reference", torch.float32),
            ("fused", None, torch.float32),
            ("reference, float64", "reference", torch.float64),
        ):
            task = progress.add_task(f"training, {label}", total=EPOCHS * epoch)
            runs[label] = demo_digits.train(
                digits,
                backend,
                dtype,
                epochs=EPOCHS,
                on_step=lambda task=task: progress.advance(task),
            )
    console.print(training_table(runs, epoch))
    reference, fused, exact = runs.values()
    problem = outside_rule(*demo_digits.logits_of_both(fused.model, digits))
    if problem:
        console.print(f"[red]The trained network is off: {problem}")
    else:
        console.print(
            "Training magnifies rounding: see how far either run strays from float64. The logits of"
            " the trained network, on the test images,\nare as close to float64 with fused gates as"
            " with reference gates, up to a factor of 2."
        )
    curves = demo_figures.loss_curves(
        folder / "loss_curves.png",
        {"reference gates": reference.losses, "fused gates": fused.losses},
        exact.losses,
        epoch,
        f"Digits, test accuracy {reference.accuracy:.2%} with reference gates,"
        f" {fused.accuracy:.2%} with fused",
    )
    chosen = [int((digits.test_labels == digit).nonzero()[0]) for digit in range(10)]
    maps = demo_attention.attention(fused.model, digits.test_images[chosen]).values()
    attention = demo_figures.attention_maps(
        folder / "attention_digits.png",
        list(1 - digits.test_images[chosen, 0].numpy()),
        [str(digit) for digit in range(10)],
        [AttentionRow(f"block {i}", values.numpy()) for i, values in enumerate(maps, start=1)],
        "Spatial attention of the digits network, trained with fused gates",
        "Test images. Ms multiplies a block's features: 1 keeps a pixel, 0 removes it."
        " White: the outline of the digit.",
        outline=True,
    )
    return not problem, [curves, attention]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("examples.demo", description=__doc__.splitlines()[0])
    folder = Path("build/demo")
    parser.add_argument("--out", type=Path, default=folder, help=f"for pictures ({folder})")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    console.print(report.heading(report.environment()))
    console.print(Rule("ResNet-50 with CBAM, on photographs"))
    network_agrees, photographs = show_network(options.out)
    console.print(Rule("Training with fused gates, on digits"))
    training_agrees, pictures = show_training(options.out)
    console.print(Rule("Pictures"))
    for picture in (photographs, *pictures):
        console.print(f"  {picture}")
    console.print(f"{time.perf_counter() - start:.0f} seconds in all")
    return 0 if network_agrees and training_agrees else 1


if __name__ == "__main__":
    sys.exit(main())
