"""`warmup`: compiles the Triton kernels that a model needs before it matters, and tunes them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbam_fused import backends
from cbam_fused.backends import Backend

Timer = Callable[[Callable[[], object]], float]

# Another choice must be faster by more than two runs of the same one differ.
_NOISE = 0.02


class Choice(NamedTuple):
    """The configuration that was found for one kernel and shape of x."""

    kernel: str
    shape: str
    seconds: float  # of the operation with it, and with that of the table
    table_seconds: float
    configuration: Any

    def __str__(self) -> str:
        return (
            f"{self.kernel} {self.shape}: {self.table_seconds * 1e6:.1f} -> "
            f"{self.seconds * 1e6:.1f} us with {self.configuration}"
        )


class Warmup(NamedTuple):
    """What `warmup` did: the operations that ran, and, if it tuned, every choice.

    Attributes:
        note: why there was nothing to compile; empty where there was.
    """

    operations: tuple[str, ...]
    choices: tuple[Choice, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return self.note
        return "\n".join(["compiled: " + ", ".join(self.operations), *map(str, self.choices)])


class _Call(NamedTuple):
    """One operation with the arguments that it was given."""

    operation: str
    function: Callable
    arguments: tuple

    def __call__(self) -> object:
        return self.function(*self.arguments)

    def __str__(self) -> str:
        x = next(a for a in self.arguments if isinstance(a, Tensor) and a.dim() == 4)
        return f"{self.operation} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def warmup(
    model: nn.Module,
    example: Tensor | tuple | dict[str, Any],
    *,
    tune: bool = False,
    path: str | Path | None = None,
    timer: Timer | None = None,
) -> Warmup:
    """Compiles every kernel that the fused gates of `model` need for inputs like `example`.

    The model runs once: in training mode forward and backward, in eval mode forward without
    gradients. Its buffers and gradients and the random number generators are as before afterwards.
    Triton keeps what it compiled on disk, so later processes begin with it. A model that
    torch.compile compiled runs uncompiled here; its kernels are the same.

    Where the compiled library serves the model's device, as backend ``cuda`` or ``cpu``, there is
    nothing to compile: the model does not run, and the result says so.

    Args:
        model: fused gates (`cbam_fused.CBAM`, or after `cbam_fused.fuse_`) in whatever network, on
            the device and in the mode and dtype that it will run in.
        example: its input: a tensor, a tuple of positional or a dict of keyword arguments. Under
            autocast in that context, as the model will be.
        tune: time other tile sizes too, and use the fastest from now on, in this process. A choice
            holds for a kernel and (C, H, W, dtype, layout), whatever the batch: results stay
            bitwise repeatable and independent of the batch, but differ by rounding from those of
            another choice.
        path: a JSON file of such choices. It is read first, if it is there; with ``tune`` all
            choices are written to it. Reading it in every process keeps results bitwise equal.
        timer: ``timer(function) -> seconds`` per call; default: CUDA events, the L2 cache cleared.

    Returns:
        What was compiled, and the choices, or a note that there was nothing to compile; it can be
        printed.

    Raises:
        TypeError: model is not a module.
        ValueError: the file at `path` holds no choices.
        FileNotFoundError: there is no such file, and ``tune`` is off.
        RuntimeError: the model's device is served by the reference, with the reason, or by the
            compiled library, and ``tune`` or `path` is given; or no fused gate ran.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup: model must be a torch.nn.Module; got {type(model).__name__}")
    device = _device(model, example)
    backend, reason = backends.choose(device)
    if backend.name != "triton":
        asked = tune or path is not None
        note = (
            f"nothing to {'tune' if asked else 'compile'}: tensors on {device} are for backend "
            f"{backend.name} ({reason})"
        )
        if asked or backend.name == "reference":
            raise RuntimeError(f"warmup: {note}")
        return Warmup((), note=note)
    from cbam_fused.triton_kernels import configurations

    if path is not None and (not tune or Path(path).exists()):
        configurations.load_tuned(path)
    with _recorded(backend) as calls, _left_alone(model):
        run_once(model, example)
    if not calls:
        raise RuntimeError("warmup: no fused gate ran; see cbam_fused.fuse_ and its report")
    choices = _tune_all(calls, timer or _device_seconds) if tune else ()
    if tune and path is not None:
        configurations.save_tuned(path)
    return Warmup(tuple(map(str, calls)), choices)


def _device(model: nn.Module, example: object) -> torch.device:
    """Where the model computes: the device of its first parameter, else of the first tensor."""
    values = example.values() if isinstance(example, dict) else example
    inputs = [example] if isinstance(example, Tensor) else values
    tensors = (*model.parameters(), *(value for value in inputs if isinstance(value, Tensor)))
    return tensors[0].device if tensors else torch.device("cpu")


@contextlib.contextmanager
def _recorded(backend: Backend) -> Iterator[list[_Call]]:
    """Collects the calls of the backend's operations, each kind once, while they go on."""
    calls: dict[object, _Call] = {}

    def recorder(operation: str, function: Callable) -> Callable:
        def call(*arguments):
            key = (operation, *map(_described, arguments))
            if key not in calls:
                calls[key] = _Call(operation, function, _kept(operation, arguments))
            return function(*arguments)

        return call

    functions = {name: recorder(name, getattr(backend, name)) for name in Backend._fields[1:]}
    with backends.replaced(backend._replace(**functions)):
        found: list[_Call] = []
        yield found
        found += calls.values()


def _described(argument: object) -> object:
    """What of an argument decides which kernels run."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.stride(), argument.device
    return argument


def _kept(operation: str, arguments: tuple) -> tuple:
    """The arguments, with copies of running statistics, which the operation updates."""
    if operation != "cbam_attend":
        return arguments
    return tuple(
        a.clone() if isinstance(a, Tensor) and i in _RUNNING_STATISTICS else a
        for i, a in enumerate(arguments)
    )


_RUNNING_STATISTICS = (8, 9)  # their places among the arguments of cbam_attend


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers, gradients and random number generators are as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {p.device for p, _ in gradients if p.is_cuda}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def run_once(model: nn.Module, example: object) -> None:
    """The model on its input, uncompiled: in training mode forward and backward, else forward."""
    keywords = example if isinstance(example, dict) else {}
    inputs = () if keywords else example if isinstance(example, tuple) else (example,)
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(False):
        if not model.training:
            with torch.no_grad():
                model(*inputs, **keywords)
            return
        with torch.enable_grad():
            outputs = torch.utils._pytree.tree_leaves(model(*inputs, **keywords))
            sums = [o.sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad]
            if sums:
                torch.autograd.backward(sums)


def _device_seconds(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(function, return_mode="median") / 1e3


def _tune_all(calls: list[_Call], timer: Timer) -> tuple[Choice, ...]:
    """The fastest configuration for each kernel and shape in the calls, in use from now on."""
    from cbam_fused.triton_kernels import configurations

    choices: dict[object, Choice] = {}
    for call in calls:
        with torch.no_grad(), configurations.lookups() as asked:
            call()
        device = call.arguments[0].device
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with current:  # the timer's events are on it
            for kernel, shape in dict.fromkeys(asked):
                key = (kernel, shape._replace(n=0))
                if key not in choices:
                    choices[key] = _tune(call, kernel, shape, timer)
    return tuple(choices.values())


def _tune(call: _Call, kernel: str, shape: Any, timer: Timer) -> Choice:
    """The fastest configuration of one kernel for one shape, others left as they are."""
    from cbam_fused.triton_kernels import configurations

    times: dict[object, float] = {}
    table = configurations.from_table(kernel, shape)
    best = configurations.configuration(kernel, shape)
    try:
        with torch.no_grad():
            for candidate in candidates(kernel, shape):
                configurations.tune(kernel, shape, candidate)
                if (seconds := _seconds(call, timer)) is not None:
                    times[candidate] = seconds
        fastest = min(times, key=times.__getitem__)
        best = fastest if times[fastest] < times[table] * (1 - _NOISE) else table
    finally:
        configurations.tune(kernel, shape, best)
    described = f"{shape.c}x{shape.h}x{shape.w}, {shape.element_size} bytes, " + (
        "channels_last" if shape.channels_last else "NCHW"
    )
    return Choice(kernel, described, times[best], times[table], best)


def candidates(kernel: str, shape: Any) -> tuple:
    """The configurations that are tried: that of the table first, its variations in warps and
    stages, and the other rows that divide the sample alike where other kernels rely on it.
    """
    from cbam_fused.triton_kernels import configurations

    table = configurations.from_table(kernel, shape)
    warps = (w for w in (table.num_warps // 2, table.num_warps * 2) if 1 <= w <= 16)
    stages = (s for s in (table.num_stages - 1, table.num_stages + 1) if 1 <= s <= 5)
    varied = [dataclasses.replace(table, num_warps=w) for w in warps]
    varied += [dataclasses.replace(table, num_stages=s) for s in stages]
    others = [
        row.configuration
        for row in configurations.TABLES[kernel]
        if row.configuration.splits(shape) == table.splits(shape)
        and (table.tiles(shape) > 1 or row.configuration.tiles(shape) == 1)
    ]
    return tuple(dict.fromkeys([table, *varied, *others]))


def _seconds(call: _Call, timer: Timer) -> float | None:
    """The time of a call with the configuration in use; None where it does not fit the device."""
    try:
        call()
    except Exception as error:
        if not is_too_large(error):
            raise
        return None
    return timer(call)


def is_too_large(error: Exception) -> bool:
    """Whether a kernel asked for more registers or shared memory than the device has."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, OutOfResources | PTXASError)
