"""The proof that a fused gate computes what the module's own forward computes.

Both run, forward and backward, in training and in eval mode, on replicas of the module: with its
own parameters (NCHW), and with parameters drawn afresh (channels_last), since zeros, in which many
networks start, hide differences. The module itself, its running statistics, gradients and hooks,
and the random number generators are not touched.

The bound is that of `cbam_fused.testing`, without a constant to choose: against the module's own
forward in float64, twice the error of its own forward in its own dtype, plus two units in the last
place. One number's error says little, as two sums of the same accuracy may be 1 and 5 units off: so
the largest errors over several inputs are compared, and the parameters' gradients are judged as one
vector for each of the two gates, as are the running statistics. Where that misses the bound, more
inputs are added to those, and all are judged together.

The input leaves rounding no decision to take. In each pixel at most one channel is positive, so
the maximum over the channels of x * Mc is the same whatever the gate (Mc >= 0), in any precision;
the maximum over pixels is one of x itself, which is exact. In the first sample two pixels are zero
in all channels: exact ties, in every plane without a positive value and in both pixels, so that a
gate which shares a maximum's gradient by another rule is found out. A shortcut is larger than x, so
that its sign is that of the sum, by which a ReLU decides.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cbam_fused.fuse.adapters import NotFusableError
from cbam_fused.fuse.swap import Fusion
from cbam_fused.plan import Plan, call_fused, collect
from cbam_fused.testing import check_close, scale_error

_DRAWS = (2, 4, 8, 16, 32)
_SAMPLES, _HEIGHT, _WIDTH = 2, 5, 6
_PARAMETERS = (
    ("own parameters", torch.contiguous_format),
    ("drawn parameters", torch.channels_last),
)


class Verification(NamedTuple):
    """The comparison that came closest to its bound."""

    compared: str
    error: float
    bound: float


Forward = Callable[..., Tensor]  # (module, x), or (module, x, shortcut)


class Epilogue(NamedTuple):
    """What follows a gate in its block.

    Attributes:
        tail: gate and epilogue as the block has them: ``tail(gate, x, shortcut)``.
        adds: whether the shortcut is added; if not it is None.
        activation: as in `cbam_fused.cbam`.
    """

    tail: Forward
    adds: bool
    activation: str


class _Pair(NamedTuple):
    """The two forwards to compare, of a gate with this plan, on which `parameters`."""

    own: Forward
    fused: Forward
    plan: Plan
    takes_shortcut: bool
    parameters: tuple[tuple[str, torch.memory_format], ...]


def verify(
    module: nn.Module,
    fusion: Fusion,
    epilogue: Epilogue | None = None,
    *,
    own_parameters: bool = True,
) -> Verification:
    """Compares the fused gate of `fusion` with the own forward of `module`, both with an
    `epilogue` if it is given; on drawn parameters alone without its `own_parameters`.

    Returns:
        The comparison that came closest to its bound; all passed.

    Raises:
        NotFusableError: a comparison failed, or could not be made; the message says which.
    """
    pair = _pair(fusion, epilogue, _PARAMETERS if own_parameters else _PARAMETERS[1:])
    try:
        with torch.inference_mode(False), torch.enable_grad(), _left_alone(module):
            compared = _compare(module, pair)
    except NotFusableError:
        raise
    except Exception as error:
        raise NotFusableError(f"it cannot be verified: {type(error).__name__}: {error}") from error
    return max(compared, key=lambda c: c.error / c.bound if c.error else 0.0)


def _pair(fusion: Fusion, epilogue: Epilogue | None, parameters: tuple) -> _Pair:
    def own_tail(gate: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        gate.__class__ = fusion.base  # it may be fused already
        return epilogue.tail(gate, x, shortcut)

    def fused(gate: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        options = {"residual": shortcut, "activation": epilogue.activation} if epilogue else {}
        y = call_fused(gate, fusion.plan, x, **options)
        if y is None:
            raise NotFusableError(collect(gate, fusion.plan).reason)
        return y

    adds = epilogue is not None and epilogue.adds
    own = own_tail if epilogue else fusion.forward
    return _Pair(own, fused, fusion.plan, adds, parameters)


@contextlib.contextmanager
def _left_alone(module: nn.Module) -> Iterator[None]:
    """Without autocast, and with the random number generators as they were afterwards."""
    device = next(module.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        yield


class _DiffersError(NotFusableError):
    """A result misses its bound."""


def _compare(module: nn.Module, pair: _Pair) -> list[Verification]:
    """All comparisons, over as few draws as show that rounding explains every difference."""
    *fewer, most = _DRAWS
    for draws in fewer:
        with contextlib.suppress(_DiffersError):
            return list(_compare_draws(module, pair, draws))
    return list(_compare_draws(module, pair, most))


def _compare_draws(module: nn.Module, pair: _Pair, draws: int) -> Iterator[Verification]:
    """The comparisons over `draws` inputs together; more draws begin with those of fewer."""
    for parameters, layout in pair.parameters:
        generator = torch.Generator("cpu").manual_seed(0)
        source = replica(module)
        if parameters == "drawn parameters":
            _redraw(source, generator)
        inputs = [_input(source, pair, generator, layout) for _ in range(draws)]
        for mode in ("train", "eval"):
            source.train(mode == "train")
            for name, results in _compare_mode(source, pair, inputs):
                yield _judge(f"{name}, {mode} mode, {parameters}", *results)


def _compare_mode(source: nn.Module, pair: _Pair, inputs: list[tuple[Tensor, ...]]):
    """Each result by name: of the fused gate, of its own forward, and of that in float64."""
    dtype = inputs[0][0].dtype

    def own(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        return _run("its own forward", replica(module, dtype), pair.own, inputs, dtype)

    actual = _run("the fused gate", replica(source), pair.fused, inputs, dtype)
    eager, expected = own(source, dtype), own(source, torch.float64)
    if actual.keys() != eager.keys():
        names = ", ".join(sorted(actual.keys() ^ eager.keys()))
        raise NotFusableError(f"only one of its own forward and the fused gate has: {names}")
    if dtype == torch.float64:
        single = replica(source, torch.float32)
        inputs = [tuple(values.float() for values in drawn) for drawn in inputs]
        rounded, exact = own(single, torch.float32), own(single, torch.float64)
        eager = {
            name: scale_error(rounded[name], exact[name], value)
            if value.is_floating_point()
            else value
            for name, value in expected.items()
        }
    for name, result in actual.items():
        yield name, (result, eager[name], expected[name])


def _judge(name: str, actual: Tensor, eager: Tensor, expected: Tensor) -> Verification:
    if not actual.is_floating_point():
        if not torch.equal(actual, expected):
            raise _DiffersError(f"its own forward computes something else: {name} differs")
        return Verification(name, 0.0, 0.0)
    try:
        return Verification(name, *check_close(name, actual, eager, expected))
    except AssertionError as error:
        raise _DiffersError(f"its own forward computes something else: {error}") from error


def _run(
    label: str,
    module: nn.Module,
    forward: Forward,
    inputs: list[tuple[Tensor, ...]],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Forward and backward of a replica in `dtype` for each input: outputs, gradients and buffers.

    The gradients of the parameters below one child are one vector, and so are its buffers of a
    kind.
    """
    results: dict[str, list[Tensor]] = {}
    for grad, *drawn in inputs:
        leaves = [values.to(dtype, copy=True).requires_grad_() for values in drawn]
        y = _run_once(label, module, forward, leaves, grad)
        found = [("the output", y.detach())]
        for name, leaf in zip(("x", "the shortcut"), leaves, strict=False):
            found.append((f"the gradient of {name}", leaf.grad))
        for part, layer in module.named_children():
            gradients = [p.grad for p in layer.parameters()]
            found.append((f"the gradient of {part}", _as_one(gradients)))
            for kind, real in (("statistics", True), ("counter", False)):
                buffers = [b for b in layer.buffers() if b.is_floating_point() == real]
                found.append((f"the {kind} of {part}", _as_one(buffers)))
        for name, result in found:
            if result is not None:
                results.setdefault(name, []).append(result)
        module.zero_grad(set_to_none=True)
    return {name: torch.stack(draws) for name, draws in results.items()}


def _as_one(tensors: list[Tensor | None]) -> Tensor | None:
    """A copy of several tensors as one vector; None without any."""
    present = [tensor.flatten() for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _run_once(
    label: str, module: nn.Module, forward: Forward, leaves: list[Tensor], grad: Tensor
) -> Tensor:
    x = leaves[0]
    random, before = _random_state(x.device), [leaf.detach().clone() for leaf in leaves]
    try:
        y = forward(module, *leaves)
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
    if not all(torch.equal(leaf, values) for leaf, values in zip(leaves, before, strict=True)):
        raise NotFusableError(f"{label} changes its input")
    return y


def _random_state(device: torch.device) -> Tensor:
    """The state of the generator that an operation on `device` draws from."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.random.get_rng_state()


def replica(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `module` with tensors of its own (floating ones in `dtype`, if given) and no hooks.

    Every parameter of the copy is to be trained. A synchronised norm becomes one of this process
    alone, as the comparison is. Other attributes are shared, containers among them are copied.
    """
    copies: dict[int, nn.Module] = {}

    def copy_tensor(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(wanted, copy=True)

    def copy_module(original: nn.Module) -> nn.Module:
        if id(original) in copies:
            return copies[id(original)]
        synchronised = isinstance(original, nn.SyncBatchNorm)
        cls = nn.BatchNorm2d if synchronised else original.__class__
        made = copies[id(original)] = cls.__new__(cls)
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
    drawn = {"generator": generator, "dtype": torch.float64, "device": "cpu"}

    def away_from_zero(shape: torch.Size) -> Tensor:
        return 0.5 + torch.rand(shape, **drawn)

    for parameter in module.parameters():
        values = torch.randn(parameter.shape, **drawn)
        if parameter.dim() > 1:
            values /= (parameter.numel() / parameter.shape[0]) ** 0.5
        else:
            values = values.sign() * away_from_zero(parameter.shape)
        parameter.data.copy_(values)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(away_from_zero(buffer.shape))


def _input(module: nn.Module, pair: _Pair, generator: torch.Generator, layout) -> tuple:
    """The gradient of y, x and perhaps a shortcut ``[2, C, 5, 6]`` for a replica, in its dtype, on
    its device.
    """
    collected = collect(module, pair.plan)
    if collected.tensors is None:
        raise NotFusableError(collected.reason)
    weight = collected.tensors[2]  # that of the MLP's last layer
    shape = (_SAMPLES, weight.shape[0], _HEIGHT, _WIDTH)
    drawn = {"generator": generator, "device": "cpu"}
    magnitude = 0.25 + 1.75 * torch.rand(shape, dtype=torch.float64, **drawn)
    positive = torch.randint(shape[1], (_SAMPLES, 1, _HEIGHT, _WIDTH), **drawn)
    x = (-magnitude).scatter(1, positive, magnitude)
    x[0, :, 2, 3] = 0
    x[0, :, 4, 1] = 0
    inputs = [torch.randn(shape, dtype=torch.float64, **drawn), x]
    if pair.takes_shortcut:
        sign = 2.0 * torch.randint(2, shape, **drawn) - 1
        inputs.append(sign * (2.5 + torch.rand(shape, dtype=torch.float64, **drawn)))
    return tuple(
        values.to(weight.device, weight.dtype).contiguous(memory_format=layout) for values in inputs
    )
