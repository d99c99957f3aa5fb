"""What CBAM costs a network: timm's ResNet-50 without it, with eager gates, and with fused ones.

``gates``: only the gates are fused; ``fused``: and each block's addition and ReLU with them.

Run as ``python -m benchmarks.resnet``. The cost is the time with CBAM over the time without, minus
one, by the lower quartiles: what else the machine does only ever adds to a time, and to one of half
a second it may add more than a gate takes. ``eval``: the forward in inference mode. ``train``:
forward, cross entropy and backward, from gradients set to None. Before timing, the logits of the
fused networks are held to the tolerance rule against float64; where they fail, nothing is timed and
the exit status is 1.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import cbam_fused
from benchmarks import report
from benchmarks.gates import LAYOUTS, MODES
from benchmarks.timing import Timing, interleave
from cbam_fused.testing import check_close

VARIANTS = ("without", "eager", "gates", "fused")
FUSED = ("gates", "fused")


def resnet50(attention: str | None, images: Tensor) -> nn.Module:
    """timm's ResNet-50 with random weights, in eval mode.

    By default timm sets the last norm of each block to zero: every gate of a fresh network would
    see zeros, and any two gates would agree. The running statistics are set to those of `images`:
    a fresh network's would let activations grow from block to block until gates saturate.
    """
    block_args = {"attn_layer": attention} if attention else {}
    model = timm.create_model("resnet50", block_args=block_args, zero_init_last=False)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def networks(mode: str, layout: torch.memory_format, images: Tensor) -> dict[str, nn.Module]:
    """The networks by variant; those with CBAM have the same weights."""
    torch.manual_seed(0)
    eager = resnet50("cbam", images)
    models = {"without": resnet50(None, images), "eager": eager}
    for name in FUSED:
        models[name] = copy.deepcopy(eager)
        cbam_fused.fuse_(models[name], strict=True, epilogue=name == "fused")
    return {
        name: model.train(mode == "train").to(memory_format=layout)
        for name, model in models.items()
    }


def check(models: dict[str, nn.Module], images: Tensor) -> None:
    """Raises AssertionError if the logits of a fused network are outside the tolerance rule.

    The networks' running statistics are left as they were.
    """
    with torch.no_grad():
        expected = copy.deepcopy(models["eager"]).double()(images.double())
        eager, *others = (copy.deepcopy(models[name])(images) for name in ("eager", *FUSED))
        for name, logits in zip(FUSED, others, strict=True):
            check_close(f"logits, {name}", logits, eager, expected)


def timed(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """The call that is timed: a forward, or in training mode a step without an optimizer."""
    if not model.training:
        return lambda: model(images)
    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        nn.functional.cross_entropy(model(images), labels).backward()

    return step


def cost(timings: dict[str, Timing], variant: str) -> float:
    """The time of `variant` over the time without CBAM, minus one, by the lower quartiles."""
    return timings[variant].quartiles[0] / timings["without"].quartiles[0] - 1


def measure(
    mode: str, layout: str, images: Tensor, repetitions: int, on_repetition: Callable[[], object]
) -> dict[str, Timing]:
    """Checks and times one mode and layout."""
    models = networks(mode, LAYOUTS[layout], images)
    images = images.to(memory_format=LAYOUTS[layout])
    check(models, images)
    labels = torch.arange(len(images))
    calls = {name: timed(model, images, labels) for name, model in models.items()}
    with torch.inference_mode(mode == "eval"):
        return interleave(calls, repetitions=repetitions, min_time=0.0, on_repetition=on_repetition)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.resnet", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=tuple(LAYOUTS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="batch 2, 3 repetitions")
    report.add_json_option(parser, "resnet")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.repetitions = 2, 3
    if options.threads:
        torch.set_num_threads(options.threads)
    environment = report.environment()
    report.console.print(report.heading(environment))

    title = f"ResNet-50, {options.batch}x3x{options.image_size}x{options.image_size}, float32"
    table = Table(title=f"{title}: {report.SPREAD}", box=box.SIMPLE_HEAD)
    for column in ("mode", "layout"):
        table.add_column(column)
    headings = ("without CBAM", "eager", "fused gates", "and blocks")
    for column in (*headings, *(f"cost, {heading}" for heading in headings[1:])):
        table.add_column(column, justify="right")

    torch.manual_seed(1)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size)
    cases = list(itertools.product(options.mode, options.layout))
    results: list[dict[str, Any]] = []
    failures = []
    with report.progress() as progress:
        task = progress.add_task("", total=len(cases) * options.repetitions)
        for mode, layout in cases:
            progress.update(task, description=f"{mode} {layout}")
            try:
                timings = measure(
                    mode, layout, images, options.repetitions, lambda: progress.advance(task)
                )
            except AssertionError as error:
                failures.append(f"{mode} {layout}: {error}")
                progress.advance(task, options.repetitions)
                continue
            costs = {variant: cost(timings, variant) for variant in VARIANTS[1:]}
            cells = [report.milliseconds(timings[variant]) for variant in VARIANTS]
            table.add_row(mode, layout, *cells, *(f"{value:+.1%}" for value in costs.values()))
            results.append(
                {
                    "mode": mode,
                    "layout": layout,
                    "times": {name: report.timing_record(t) for name, t in timings.items()},
                    "costs": {name: round(value, 5) for name, value in costs.items()},
                }
            )
    report.console.print(table)
    if failures:
        report.console.print("[red]Outside the tolerance rule, not timed:", *failures, sep="\n  ")
    if options.json:
        settings = {k: getattr(options, k) for k in ("batch", "image_size", "repetitions")}
        content = {"environment": environment, "settings": settings, "results": results}
        report.write_json(options.json, content)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
