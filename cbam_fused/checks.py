"""The checks of every argument, written once, before anything is launched or changed."""

import itertools
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from cbam_fused.reference_gates import compute_dtype
from cbam_fused.schemas import ACTIVATIONS, MAPS, POOL_TYPES, TIES
from cbam_fused.synchronised import Group, is_group

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CANONICAL_POOLS = {"light": "light"} | {
    "+".join(chosen): "+".join(sorted(chosen, key=POOL_TYPES.index))
    for count in range(1, len(POOL_TYPES) + 1)
    for chosen in itertools.permutations(POOL_TYPES, count)
}
_FLOATS_TEXT = "float32, float16, bfloat16 or float64"


def describe(value: object) -> str:
    """A tensor as `float32 [2, 64, 7, 7] on cpu`, anything else as its repr."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def _fail(error: type[Exception], argument: str, expected: str, got: object) -> None:
    raise error(f"cbam: {argument} must be {expected}; got {describe(got)}")


def choice(argument: str, value: object, choices: tuple[str, ...], op: str = "cbam") -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {argument} must be one of {', '.join(choices)}; got {value!r}")


def canonical_pool(pool: str, op: str = "cbam") -> str:
    """`pool` with its types in the order of the contract: "max+avg" becomes "avg+max".

    Raises ValueError, with a message that begins with `op`, for anything else.
    """
    canonical = _CANONICAL_POOLS.get(pool) if isinstance(pool, str) else None
    if canonical is None:
        raise ValueError(
            f"{op}: pool must be light or a subset of {', '.join(POOL_TYPES)} joined by +; "
            f"got {pool!r}"
        )
    return canonical


def _parameter(
    argument: str, value: Tensor | None, shapes: tuple[tuple[int, ...], ...], x: Tensor
) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        _fail(TypeError, argument, f"a tensor in {_FLOATS_TEXT}", value)
    if value.shape not in shapes:
        _fail(ValueError, argument, " or ".join(str(list(shape)) for shape in shapes), value)
    if value.device != x.device:
        _fail(ValueError, argument, f"on the device of x, {x.device}", value)


def residual(x: Tensor, value: Tensor | None) -> None:
    """Raises unless `value` is None or a tensor that can be added to x."""
    if value is not None and (
        not isinstance(value, Tensor)
        or value.shape != x.shape
        or value.dtype != x.dtype
        or value.device != x.device
    ):
        _fail(ValueError, "residual", f"as x, {describe(x)}", value)


def number(argument: str, value: float) -> None:
    """Raises TypeError unless `value` is a number."""
    if not isinstance(value, int | float | torch.SymFloat):
        _fail(TypeError, argument, "a number", value)


def tensor(x: Tensor) -> None:
    """Raises unless x is [N, C, H, W] in a supported dtype.

    There must be something to pool in each sample.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in _FLOATS:
        _fail(TypeError, "x", f"[N, C, H, W] in {_FLOATS_TEXT}", x)
    if 0 in x.shape[1:]:
        _fail(ValueError, "x", "[N, C, H, W] with C, H and W at least 1", x)


class Checked(NamedTuple):
    """What is known of arguments that have passed.

    Attributes:
        pool: its canonical form.
        as_is: whether the operations take every parameter in the dtype it has.
        autocast_device: the type of x's device, if it knows autocast; else None.
    """

    pool: str
    as_is: bool
    autocast_device: str | None


_facts = attrgetter("__class__", "shape", "dtype", "device")
_passed: dict[tuple, Checked] = {}
_MOST_PASSED = 1024


def remembered(
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    batch_statistics: bool,
    momentum: float,
    eps: float,
    *choices: str,
) -> Checked:
    """`cbam`, but at once for arguments that look like some that have passed it.

    Args:
        parameters: from mlp_weight1 to running_var.
        choices: pool, maps, ties and activation.
    """
    arguments = (batch_statistics, momentum, eps, *choices)
    if torch.compiler.is_compiling():
        return cbam(x, *parameters, *arguments)
    try:
        looks = [None if p is None else _facts(p) for p in parameters]
        key = (_facts(x), *looks, batch_statistics, type(momentum), type(eps), *choices)
        found = _passed.get(key)
    except (AttributeError, TypeError):  # something is no tensor, or has a symbolic size, or is bad
        return cbam(x, *parameters, *arguments)
    if found is None:
        found = cbam(x, *parameters, *arguments)
        if len(_passed) == _MOST_PASSED:
            _passed.clear()
        _passed[key] = found
    return found


def batch(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, group: Group | None
) -> None:
    """Checks what batch statistics need besides, where there is a convolution."""
    if group is not None and not is_group(group):
        _fail(TypeError, "process_group", "a torch.distributed.ProcessGroup or None", group)
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        for argument, value in (("running_mean", running_mean), ("running_var", running_var)):
            if value is not None and value.is_inference():
                _fail(ValueError, argument, "no inference tensor, as it is updated", value)
    if group is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        _fail(ValueError, "x", "more than one pixel in the batch for batch_statistics", x)


def dtypes_of(x: Tensor) -> set[torch.dtype]:
    """Those of parameters that the operations take as they are: compute, or that of x."""
    return {compute_dtype(x.dtype), x.dtype}


def mlp_as_is(x: Tensor, mlp: tuple[Tensor | None, ...]) -> bool:
    """Whether the operations take the MLP's tensors as they are, which share one dtype."""
    dtypes = {p.dtype for p in mlp if p is not None}
    return len(dtypes) == 1 and dtypes <= dtypes_of(x)


def cbam(
    x: Tensor,
    mlp_weight1: Tensor | None,
    mlp_bias1: Tensor | None,
    mlp_weight2: Tensor,
    mlp_bias2: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    pool: str,
    maps: str,
    ties: str,
    activation: str,
) -> Checked:
    """Checks all arguments of `cbam_fused.cbam` but the residual.

    What it reads of them is what `remembered` goes by: class, shape, dtype and device of tensors,
    types of numbers.
    """
    tensor(x)
    c = x.shape[1]
    pool = canonical_pool(pool)
    number("momentum", momentum)
    number("eps", eps)
    choice("maps", maps, MAPS)
    choice("ties", ties, TIES)
    choice("activation", activation, ACTIVATIONS)

    reduced = c
    if mlp_weight1 is None:
        if mlp_bias1 is not None:
            _fail(ValueError, "mlp_bias1", "None where mlp_weight1 is None", mlp_bias1)
    else:
        if not isinstance(mlp_weight1, Tensor) or mlp_weight1.dim() not in (2, 4):
            _fail(TypeError, "mlp_weight1", f"[R, {c}] or [R, {c}, 1, 1]", mlp_weight1)
        reduced = mlp_weight1.shape[0]
        shapes = ((reduced, c), (reduced, c, 1, 1))
        if reduced == 0:
            _fail(ValueError, "mlp_weight1", f"[R, {c}] with R at least 1", mlp_weight1)
        _parameter("mlp_weight1", mlp_weight1, shapes, x)
        _parameter("mlp_bias1", mlp_bias1, ((reduced,),), x)
    if mlp_weight2 is None:
        _fail(TypeError, "mlp_weight2", f"[{c}, {reduced}] or [{c}, {reduced}, 1, 1]", mlp_weight2)
    _parameter("mlp_weight2", mlp_weight2, ((c, reduced), (c, reduced, 1, 1)), x)
    _parameter("mlp_bias2", mlp_bias2, ((c,),), x)

    if conv_weight is not None:
        count = 1 if maps == "light" else 2
        k = conv_weight.shape[-1] if isinstance(conv_weight, Tensor) and conv_weight.dim() else 0
        if k % 2 == 0:
            _fail(ValueError, "conv_weight", f"[1, {count}, k, k] with k odd", conv_weight)
        _parameter("conv_weight", conv_weight, ((1, count, k, k),), x)
    if conv_bias is not None and conv_weight is None:
        _fail(ValueError, "conv_bias", "None where conv_weight is None", conv_bias)
    one = ((1,),)
    _parameter("conv_bias", conv_bias, one, x)
    _parameter("norm_weight", norm_weight, one, x)
    _parameter("norm_bias", norm_bias, one, x)
    _parameter("running_mean", running_mean, one, x)
    _parameter("running_var", running_var, one, x)
    if (running_mean is None) != (running_var is None):
        _fail(ValueError, "running_var", "given with running_mean or not at all", running_var)
    normalises = batch_statistics or running_mean is not None
    if (norm_weight is not None or norm_bias is not None) and not normalises:
        given = norm_weight if norm_weight is not None else norm_bias
        expected = "None without running statistics or batch_statistics"
        _fail(
            ValueError, "norm_weight" if norm_weight is not None else "norm_bias", expected, given
        )

    mlp = (mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2)
    others = (conv_weight, conv_bias, norm_weight, norm_bias, running_mean, running_var)
    as_is = mlp_as_is(x, mlp) and all(p is None or p.dtype in dtypes_of(x) for p in others)
    device = x.device.type
    return Checked(pool, as_is, device if torch.amp.is_autocast_available(device) else None)
