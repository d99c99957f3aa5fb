"""Fused CBAM gates in a real network: the same outputs, faster, and trainable.

``make demo``, or ``python -m examples.demo``. Takes under three minutes on two cores, a third of
it for torch.compile. The exit status is 1 if the outputs differ by more than rounding does.
"""

import argparse
import copy
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
from benchmarks.timing import Timing, ratio
from cbam_fused.testing import check_close
from examples import demo_attention, demo_digits, demo_figures, demo_photographs
from examples.demo_figures import AttentionRow

NETWORK_REPETITIONS = 7
GATE_REPETITIONS = 15
EPOCHS = 12
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
    table = Table(title="logits of the 6 photographs, largest absolute value", box=box.SIMPLE_HEAD)
    table.add_column()
    table.add_column(justify="right")
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
    models = {"eager": eager, "torch.compile": copy.deepcopy(eager), "fused": fused}
    models["torch.compile"].compile()
    with working("torch.compile of the network"), torch.inference_mode():
        models["torch.compile"](images)
    with working("timing the network"):
        network = demo_photographs.network_times(models, images, NETWORK_REPETITIONS)

    inputs = demo_attention.gate_inputs(eager, images)
    torch.compiler.reset()
    models["torch.compile"] = demo_photographs.compiled_gates(eager)
    with working("timing the gates"):
        gates = demo_photographs.gate_times(models, inputs, GATE_REPETITIONS)
    console.print(times_table(network, gates))


def show_network(folder: Path) -> tuple[bool, Path]:
    """Photographs through a ResNet-50; whether outputs agree, and the picture."""
    torch.manual_seed(0)
    photographs = [demo_photographs.photograph(name) for name in demo_photographs.PHOTOGRAPHS]
    images = demo_photographs.batch(photographs)
    with working("building ResNet-50"):
        eager = demo_photographs.resnet50(images)
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
        "The weights are random: the maps show what an untrained gate reacts to, not what a trained"
        " one attends to.",
    )
    return same, picture


def show_training(folder: Path) -> tuple[bool, list[Path]]:
    """The digits, trained with reference and with fused gates; agreement, and the pictures."""
    digits = demo_digits.load_digits()
    steps = -(-len(digits.train_images) // demo_digits.BATCH_SIZE)
    runs = {}
    with report.progress() as progress:
        for label, backend in (("reference", "reference"), ("fused", None)):
            task = progress.add_task(f"training, {label} gates", total=EPOCHS * steps)
            runs[label] = demo_digits.train(
                digits, backend, epochs=EPOCHS, on_step=lambda task=task: progress.advance(task)
            )

    table = Table(title=f"{EPOCHS} epochs of training from the same seed", box=box.SIMPLE_HEAD)
    for column in ("gates", "first loss", "last epoch's loss", "test accuracy", "seconds"):
        table.add_column(column, justify="right" if column != "gates" else "left")
    for label, run in runs.items():
        last = sum(run.losses[-steps:]) / steps
        losses = (f"{loss:.6f}" for loss in (run.losses[0], last))
        table.add_row(label, *losses, f"{run.accuracy:.2%}", f"{run.seconds:.1f}")
    console.print(table)
    reference, fused = runs["reference"], runs["fused"]
    gaps = [abs(a - b) for a, b in zip(reference.losses, fused.losses, strict=True)]
    console.print(
        f"Largest difference of the loss: {max(gaps[:steps]):.1e} in the first epoch,"
        f" {max(gaps):.1e} in all."
    )
    problem = outside_rule(*demo_digits.logits_of_both(fused.model, digits))
    if problem:
        console.print(f"[red]The trained network is off: {problem}")
    curves = demo_figures.loss_curves(
        folder / "loss_curves.png",
        reference.losses,
        fused.losses,
        steps,
        f"Digits, test accuracy {reference.accuracy:.2%} with reference gates,"
        f" {fused.accuracy:.2%} with fused",
    )
    chosen = [int((digits.test_labels == digit).nonzero()[0]) for digit in range(10)]
    maps = demo_attention.attention(fused.model, digits.test_images[chosen])
    attention = demo_figures.attention_maps(
        folder / "attention_digits.png",
        [1 - image for image in digits.test_images[chosen, 0].numpy()],
        [str(digit) for digit in range(10)],
        [AttentionRow(label, values.numpy()) for label, values in maps.items()],
        "Spatial attention of the digits network, trained with fused gates",
        "Test images.",
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
