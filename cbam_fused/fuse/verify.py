"""The proof that a fused gate computes what the module's own forward computes.

Both run, forward and backward, in training and in eval mode, on replicas of the module: with its
own parameters (NCHW), and with parameters drawn afresh (channels_last), since zeros, in which many
networks start, hide differences. The module itself, its running statistics, gradients and hooks,
and the random number generators are not touched.

The bound has no constant to choose. Against the module's own forward in float64, the largest error
of the fused gate may not exceed twice that of the module's own forward in its own dtype, plus two
units in the last place of the result. (In float64 itself there is nothing wider to compare with:
there the error of the own forward is that of float32, scaled by the ratio of the machine epsilons,
and the result compared with counts as one more such error.)

The input leaves rounding no decision to take. In each pixel at most one channel is positive, so
the maximum over the channels of x * Mc is the same whatever the gate (Mc >= 0), in any precision;
the maximum over pixels is one of x itself, which is exact. In the first sample two pixels are zero
in all channels: exact ties, in every plane without a positive value and in both pixels, so that a
gate which shares a maximum's gradient by another rule is found out.

One number's error says little: two sums of the same accuracy may be 1 and 5 units off. A
comparison that misses its bound is therefore repeated on other draws, and fails if it misses all
of them: what is rounding comes and goes with the draw, another meaning stays.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cbam_fused.fuse.adapters import NotFusableError
from cbam_fused.fuse.swap import Fusion
from cbam_fused.plan import call_fused, collect
from cbam_fused.testing import ulp

_DRAWS = 8
_SAMPLES, _HEIGHT, _WIDTH = 2, 5, 6


@dataclass(frozen=True)
class Verification:
    """The comparison that came closest to its bound (or missed it most)."""

    compared: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error as a share of its bound."""
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound else math.inf


Forward = Callable[[nn.Module, Tensor], Tensor]


@torch.inference_mode(False)
@torch.enable_grad()
def verify(module: nn.Module, fusion: Fusion) -> Verification:
    """Compares the fused gate of `fusion` with the own forward of `module`.

    Returns:
        The comparison that came closest to its bound; all passed.

    Raises:
        NotFusableError: a comparison failed, or could not be made; the message says which.
    """
    device = next(module.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        passed: dict[str, Verification] = {}
        failed: dict[str, Verification] = {}
        for draw in range(_DRAWS):
            results = {r.compared: r for r in _compare(module, fusion, draw, set(failed))}
            judged = [results[name] for name in failed or results]
            passed |= {r.compared: r for r in judged if r.passed}
            failed = {r.compared: r for r in judged if not r.passed}
            if not failed:
                return max(passed.values(), key=lambda result: result.share)
    worst = max(failed.values(), key=lambda result: result.share)
    raise NotFusableError(
        f"its own forward computes something else: {worst.compared} differs by {worst.error:.3g}, "
        f"where rounding explains {worst.bound:.3g}"
    )


def _compare(
    module: nn.Module, fusion: Fusion, draw: int, wanted: set[str]
) -> Iterator[Verification]:
    """The comparisons of one draw; only of the runs that hold one of `wanted`, if there are any."""
    generator = torch.Generator().manual_seed(draw)
    for parameters, layout in (
        ("own parameters", torch.contiguous_format),
        ("drawn parameters", torch.channels_last),
    ):
        source = replica(module)
        if parameters == "drawn parameters":
            _redraw(source, generator)
        x, grad = _input(source, fusion, generator, layout)
        for mode in ("train", "eval"):
            run = f"{mode} mode, {parameters}"
            if not wanted or any(name.endswith(run) for name in wanted):
                yield from _compare_run(source, fusion, x, grad, mode == "train", run)


def _compare_run(source, fusion: Fusion, x: Tensor, grad: Tensor, training: bool, run: str):
    def own(dtype: torch.dtype) -> dict[str, Tensor]:
        return _run("its own forward", source, fusion.base.forward, x, grad, training, dtype)

    eager, expected = own(x.dtype), own(torch.float64)
    errors_of_own, factor = eager, 2.0
    if x.dtype == torch.float64:
        errors_of_own = own(torch.float32)
        factor = 3 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    fused = _run("the fused gate", source, _fused_forward(fusion), x, grad, training, x.dtype)
    if fused.keys() != eager.keys():
        names = sorted(fused.keys() ^ eager.keys())
        raise NotFusableError(
            f"only one of its own forward and the fused gate has: {', '.join(names)}"
        )
    for name, actual in fused.items():
        bound = 0.0
        if actual.is_floating_point():
            bound = factor * _largest_error(errors_of_own[name], expected[name])
            bound += 2 * ulp(actual.dtype, _largest(expected[name]))
        yield Verification(f"{name}, {run}", _largest_error(actual, expected[name]), bound)


def _largest(values: Tensor) -> float:
    """The largest finite magnitude."""
    magnitudes = values.abs()
    largest = magnitudes.max().item() if values.numel() else 0.0
    return largest if math.isfinite(largest) else magnitudes.nan_to_num(0.0, 0.0).max().item()


def _largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference: infinite where only one is finite, 0 between equal infinities."""
    actual, expected = actual.double(), expected.double()
    difference = (actual - expected).abs()
    largest = difference.max().item() if difference.numel() else 0.0
    if math.isfinite(largest):
        return largest
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return difference.masked_fill(same, 0.0).nan_to_num(math.inf, math.inf).max().item()


def _fused_forward(fusion: Fusion) -> Forward:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y = call_fused(module, fusion.plan, x)
        if y is None:
            raise NotFusableError(collect(module, fusion.plan).reason)
        return y

    return forward


def _run(
    label: str,
    source: nn.Module,
    forward: Forward,
    x: Tensor,
    grad: Tensor,
    training: bool,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Forward and backward of a replica in `dtype`: output, gradients, and buffers afterwards."""
    module = replica(source, None if dtype == x.dtype else dtype).train(training)
    leaf = x.to(dtype, copy=True).requires_grad_()
    random = _random_state(x.device)
    try:
        y = forward(module, leaf)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise NotFusableError(f"{label} returns {got} for an input of {list(x.shape)}")
        y.backward(grad.to(y.dtype))
    except NotFusableError:
        raise
    except Exception as error:
        raise NotFusableError(f"{label} failed: {type(error).__name__}: {error}") from error
    if not torch.equal(random, _random_state(x.device)):
        raise NotFusableError(f"{label} draws random numbers")
    results = {"the output": y.detach(), "the gradient of x": leaf.grad}
    for name, parameter in module.named_parameters():
        results[f"the gradient of {name}"] = parameter.grad
    for name, buffer in module.named_buffers():
        results[f"the buffer {name}"] = buffer
    return {name: result for name, result in results.items() if result is not None}


def _random_state(device: torch.device) -> Tensor:
    """The state of the generator that an operation on `device` draws from."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.random.get_rng_state()


def replica(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `module` with tensors of its own (floating ones in `dtype`, if given) and no hooks.

    Every parameter of the copy is to be trained. Other attributes are shared, containers among
    them are copied.
    """
    copies: dict[int, nn.Module] = {}

    def copy_tensor(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(wanted, copy=True)

    def copy_module(original: nn.Module) -> nn.Module:
        if id(original) in copies:
            return copies[id(original)]
        made = copies[id(original)] = original.__class__.__new__(original.__class__)
        made.__dict__ = {
            name: value.copy() if isinstance(value, (list, dict, set)) else value
            for name, value in original.__dict__.items()
        }
        for name in made.__dict__:
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                made.__dict__[name] = type(made.__dict__[name])()
        for name, parameter in original._parameters.items():
            if parameter is not None:
                made._parameters[name] = nn.Parameter(copy_tensor(parameter))
        for name, buffer in original._buffers.items():
            if buffer is not None:
                made._buffers[name] = copy_tensor(buffer)
        for name, inner in original._modules.items():
            if inner is not None:
                made._modules[name] = copy_module(inner)
        return made

    return copy_module(module)


def _redraw(module: nn.Module, generator: torch.Generator) -> None:
    """Fills the parameters of a replica with numbers that leave no part of a gate idle."""

    def away_from_zero(shape: torch.Size) -> Tensor:
        return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)

    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            values /= (parameter.numel() / parameter.shape[0]) ** 0.5
        else:
            values = values.sign() * away_from_zero(parameter.shape)
        parameter.data.copy_(values)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(away_from_zero(buffer.shape))


def _input(module: nn.Module, fusion: Fusion, generator: torch.Generator, layout):
    """x and the gradient of y ``[2, C, 5, 6]`` for a replica, in its dtype, on its device."""
    arguments, _, reason = collect(module, fusion.plan)
    if arguments is None:
        raise NotFusableError(reason)
    weight = arguments["mlp_weight2"]
    shape = (_SAMPLES, weight.shape[0], _HEIGHT, _WIDTH)
    magnitude = 0.25 + 1.75 * torch.rand(shape, generator=generator, dtype=torch.float64)
    positive = torch.randint(shape[1], (_SAMPLES, 1, _HEIGHT, _WIDTH), generator=generator)
    x = (-magnitude).scatter(1, positive, magnitude)
    x[0, :, 2, 3] = 0
    x[0, :, 4, 1] = 0
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tuple(
        values.to(weight.device, weight.dtype).contiguous(memory_format=layout)
        for values in (x, grad)
    )
