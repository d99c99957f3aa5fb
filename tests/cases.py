"""The cases every operation and every backend is held to, as data: each has a name and the reason
it exists.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cbam_fused.testing import Gate
from tests import selection
from tests.usable import SLOW


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _random(shape, generator):
    return _normal(shape, generator)


def _relu_ties(shape, generator):
    """After a ReLU, on a coarse grid: many zeros, many equal maxima, whole pixels of zeros."""
    x = (_normal(shape, generator) * 2).round().relu() / 2
    x[..., : shape[3] // 2] = 0
    return x


def _all_equal(shape, generator):
    return torch.full(shape, 0.75, dtype=torch.float64)


def _zeros(shape, generator):
    return torch.zeros(shape, dtype=torch.float64)


def _negative(shape, generator):
    return -_normal(shape, generator).abs() - 0.125


def _large_offset(shape, generator):
    return 100 + _normal(shape, generator)


def _with(value: float) -> Callable:
    """Random, with `value` twice in one plane and twice in one pixel, in the first sample only."""

    def build(shape, generator):
        x = _normal(shape, generator)
        _, c, height, _width = shape
        for channel, row, column in ((1, 1, 2), (1, height - 1, 0), (c - 1, 1, 2)):
            x[0, channel, row, column] = value
        return x

    return build


DATA: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "random": _random,
    "relu_ties": _relu_ties,
    "all_equal": _all_equal,
    "zeros": _zeros,
    "negative": _negative,
    "large_offset": _large_offset,
    "nan": _with(float("nan")),
    "inf": _with(float("inf")),
    "minus_inf": _with(float("-inf")),
}


def _sliced(x: Tensor) -> Tensor:
    n, c, height, width = x.shape
    storage = x.new_full((n, c + 1, height, 2 * width + 3), float("nan"))
    view = storage[:, 1:, :, 1 : 1 + 2 * width : 2]
    return view.copy_(x)


def _permuted(x: Tensor) -> Tensor:
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(x.shape)


def _nchw(x: Tensor) -> Tensor:
    return x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Name: how x, the residual and the gradient of y lie in memory. A real network mixes them, and the
# gradient of a sum is
# one number seen through strides of 0.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "nchw": (_nchw, _nchw, _nchw),
    "channels_last": (_channels_last, _channels_last, _channels_last),
    "mixed": (_channels_last, _nchw, _expanded),
    "sliced": (_sliced, _channels_last, _sliced),
    "permuted": (_permuted, _sliced, _permuted),
    "expanded": (_expanded, _expanded, _nchw),
}


def _on(device: torch.device, gate: Gate) -> Gate:
    """The gate on `device`; its tensors lie in memory as they did, and x may still be its own
    residual.
    """

    def move(tensor: Tensor) -> Tensor:
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        stored = tensor.as_strided((count,), (1,), 0).to(device)
        return stored.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    values = {field.name: getattr(gate, field.name) for field in fields(gate)}
    moved = {id(v): move(v) for v in values.values() if isinstance(v, Tensor)}
    return replace(gate, **{name: moved.get(id(v), v) for name, v in values.items()})


@dataclass(frozen=True)
class Case:
    """A gate's shape, options and data. `hidden=None` is one C x C layer; `kernel_size=None` no
    spatial gate.
    """

    name: str
    reason: str
    shape: tuple[int, int, int, int] = (2, 16, 9, 10)
    data: str = "random"
    hidden: int | None = 4
    mlp_bias: bool = True
    mlp_in_x_dtype: bool = False
    spatial_in_x_dtype: bool = False
    mlp_4d: bool = False
    kernel_size: int | None = 7
    conv_bias: bool = False
    norm: str = "batch"  # batch: statistics of the batch; frozen: running statistics; none
    norm_affine: bool = True
    residual: str = "none"  # none; other: another tensor; x: x itself
    activation: str = "none"
    pool: str = "avg+max"
    maps: str = "max_mean"
    ties: str = "first"

    def __str__(self) -> str:
        return self.name

    @property
    def draws(self) -> int:
        """How many draws are judged together (see `cbam_fused.testing.check_gate`): more of the
        small ones.
        """
        n, c, height, width = self.shape
        return max(
            4,
            min(selection.DRAWS if SLOW else 64, 150_000 // max(1, n * c * height * width)),
        )

    def gates(self, dtype: torch.dtype, layout: str) -> list[Gate]:
        return [self.gate(dtype, layout, draw) for draw in range(self.draws)]

    def gate(self, dtype: torch.dtype = torch.float32, layout: str = "nchw", draw: int = 0) -> Gate:
        """The gate of this case in `dtype` and `layout`, on the default device; equal arguments
        give equal numbers, on every device.
        """
        with torch.device("cpu"):
            gate = self._gate(dtype, layout, draw)
        device = torch.get_default_device()
        return gate if device.type == "cpu" else _on(device, gate)

    def _gate(self, dtype: torch.dtype, layout: str, draw: int) -> Gate:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + draw)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        mlp_dtype = dtype if self.mlp_in_x_dtype else compute
        spatial_dtype = dtype if self.spatial_in_x_dtype else compute
        _n, c, _, _ = self.shape
        place_x, place_residual, place_grad = LAYOUTS[layout]

        def parameter(*shape: int, fan_in: int = 1, dtype: torch.dtype = spatial_dtype) -> Tensor:
            return (_normal(shape, generator) / fan_in**0.5).to(dtype)

        def activations(place: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
            # With ties="even" a product x * Mc must be exact, for a tie to be one in every
            # precision.
            values = values.bfloat16() if self.ties == "even" else values
            return place(values.to(dtype))

        x = activations(place_x, DATA[self.data](self.shape, generator))
        reduced, tail = self.hidden or c, (1, 1) if self.mlp_4d else ()
        two_layers = self.hidden is not None
        spatial, k = self.kernel_size is not None, self.kernel_size or 1
        count = 1 if self.maps == "light" else 2
        affine = spatial and self.norm != "none" and self.norm_affine
        frozen = spatial and self.norm == "frozen"
        residual = None
        if self.residual == "x":
            residual = x
        elif self.residual == "other":
            residual = activations(place_residual, 3 * _normal(self.shape, generator))

        first = parameter(reduced, c, *tail, fan_in=c, dtype=mlp_dtype)
        second = parameter(c, reduced, *tail, fan_in=reduced, dtype=mlp_dtype)
        bias1 = parameter(reduced, fan_in=4, dtype=mlp_dtype)
        bias2 = parameter(c, fan_in=4, dtype=mlp_dtype)
        conv = parameter(1, count, k, k, fan_in=count * k)
        return Gate(
            x=x,
            mlp_weight1=first if two_layers else None,
            mlp_bias1=bias1 if two_layers and self.mlp_bias else None,
            mlp_weight2=second,
            mlp_bias2=bias2 if self.mlp_bias else None,
            conv_weight=conv if spatial else None,
            conv_bias=parameter(1) if spatial and self.conv_bias else None,
            norm_weight=parameter(1) + 2 if affine else None,
            norm_bias=parameter(1) if affine else None,
            running_mean=parameter(1) if frozen else None,
            running_var=parameter(1).square() + 0.5 if frozen else None,
            residual=residual,
            grad=place_grad(_normal(self.shape, generator).to(dtype)),
            batch_statistics=spatial and self.norm == "batch",
            pool=self.pool,
            maps=self.maps,
            ties=self.ties,
            activation=self.activation,
        )


CASES = (
    Case("plain", "the official module in training: rows and planes of whole and broken vectors"),
    Case("frozen", "running statistics are constants: no batch term in the gradient",
         norm="frozen"),
    Case("no_norm", "many pasted variants have none", norm="none"),
    Case("no_affine", "a batch norm without weight and bias", norm_affine=False),
    Case("no_bias", "MLP without biases (timm)", mlp_bias=False, mlp_4d=True, maps="mean_max"),
    Case("conv_bias", "a bias in the spatial convolution (mmyolo)", conv_bias=True, norm="none"),
    Case("conv_bias_norm", "its gradient is rounding only, behind batch statistics",
         conv_bias=True),
    Case("no_spatial", "channel gate only", kernel_size=None),
    Case("no_spatial_relu", "channel gate, residual and mask without logits", kernel_size=None,
         residual="other", activation="relu"),
    Case("k1", "smallest kernel: no neighbours", kernel_size=1),
    Case("k3", "another kernel size", kernel_size=3, norm="frozen"),
    Case("k_over_map", "kernel larger than the map: every window is padding on all sides",
         (2, 8, 3, 2), kernel_size=11),
    Case("avg", "no maximum: its ties do not exist", pool="avg"),
    Case("max", "the maximum alone", pool="max"),
    Case("lp", "L2 pooling alone", pool="lp"),
    Case("lse", "log-sum-exp pooling alone", pool="lse"),
    Case("lse_large", "log-sum-exp overflows unless the maximum is taken out", pool="lse",
         data="large_offset"),
    Case("all_pools", "four branches of the MLP", pool="avg+max+lp+lse"),
    Case("lp_zeros", "the gradient of an L2 norm at zero is zero", pool="avg+lp", data="zeros"),
    Case("single_layer", "one C x C layer on the average (ultralytics)", (2, 24, 9, 10),
         pool="avg", hidden=None, maps="mean_max", norm="none"),
    Case("single_layer_wide", "a C x C layer longer than a leaf of the sum", (3, 200, 5, 5),
         pool="avg", hidden=None),
    Case("light",
         "half average, half maximum, before the MLP and before the convolution (timm's light)",
         pool="light", maps="light", mlp_bias=False),
    Case("light_even", "the same with shared maxima", data="relu_ties", pool="light", maps="light",
         ties="even", norm="frozen"),
    Case("mlp_half", "MLP parameters in the dtype of x", mlp_in_x_dtype=True, hidden=8),
    Case("half", "all parameters in the dtype of x (model.half())", mlp_in_x_dtype=True,
         spatial_in_x_dtype=True, conv_bias=True),
    Case("half_frozen", "the same with running statistics", mlp_in_x_dtype=True,
         spatial_in_x_dtype=True, norm="frozen", residual="other", activation="relu"),
    Case("residual", "a sum without activation: grad itself is the residual's", residual="other"),
    Case("residual_relu", "the end of a residual block", residual="other", activation="relu"),
    Case("residual_relu6", "an activation closed at both ends", residual="other",
         activation="relu6", norm="frozen"),
    Case("residual_x", "x + gate(x): the residual is x itself", residual="x"),
    Case("relu_alone", "an activation without a residual", activation="relu"),
    Case("relu_ties", "after a ReLU many values are equal, and whole pixels zero",
         data="relu_ties"),
    Case("relu_ties_even", "the same with the gradient shared", data="relu_ties", ties="even"),
    Case("all_equal", "every pixel is a maximum", data="all_equal"),
    Case("all_equal_even", "every pixel shares", data="all_equal", ties="even", norm="frozen"),
    Case("zeros", "nothing but ties, in every map", data="zeros", norm="frozen"),
    Case("negative", "maxima below zero: padding and initial values must not win", data="negative"),
    Case("large_offset", "mean far above the deviation: sums of squares would cancel",
         data="large_offset"),
    Case("nan", "NaN is the maximum, and the first one the index", data="nan"),
    Case("nan_even", "a NaN maximum shares NaN with all", data="nan", ties="even", norm="frozen"),
    Case("nan_one_sample", "without batch statistics NaN stays in its sample", (3, 16, 9, 10),
         data="nan", norm="frozen", residual="other", activation="relu"),
    Case("inf", "infinity in a maximum and in a mean", data="inf", norm="frozen"),
    Case("minus_inf", "negative infinity in a mean only", data="minus_inf", norm="frozen"),
    Case("inf_odd", "infinities beside channels and hidden units that fill no power of two",
         shape=(2, 37, 5, 5), hidden=3, data="inf", norm="frozen"),
    # 24 samples: a norm over a few values magnifies every rounding.
    Case("hw1", "plane smaller than a vector", (24, 16, 1, 1)),
    Case("hw1_even", "a plane is its own maximum", (3, 40, 1, 1), ties="even", norm="frozen"),
    Case("odd", "7 x 7 rows and planes are not 16-byte aligned", (2, 64, 7, 7)),
    Case("prime", "no channel count divides by a vector or a leaf", (2, 37, 5, 11), hidden=3),
    Case("c1", "one channel: the maximum over channels is x", (2, 1, 8, 9), hidden=1),
    Case("c2", "fewer channels than a vector", (2, 2, 8, 9), hidden=1),
    Case("leaf", "exactly one leaf of channels and of pixels", (2, 32, 4, 8)),
    Case("leaf_plus_one", "one more than a leaf of channels and of pixels", (2, 33, 3, 11)),
    Case("row", "one long row", (2, 12, 1, 131)),
    Case("column", "one long column", (2, 12, 131, 1)),
    Case("many_channels", "the last stage of a ResNet", (1, 2048, 7, 7), hidden=128),
    Case("long_plane", "many leaves per plane, the last one broken", (1, 6, 96, 97)),
    Case("stage1", "the first stage of a ResNet: a sample larger than the inner caches",
         (1, 256, 56, 56), hidden=16, residual="other", activation="relu"),
    Case("n0", "an empty batch", (0, 16, 9, 10), norm="frozen"),
    Case("n1", "one sample: parallel within it", (1, 64, 14, 14)),
    Case("n3", "samples that two threads cannot share evenly", (3, 32, 14, 14), norm="frozen"),
    Case("n5_even", "several samples, with shared maxima", (5, 24, 6, 6), data="relu_ties",
         ties="even", residual="other", activation="relu6"),
)  # fmt: skip

if SLOW:
    CASES = selection.cases(CASES)

BY_NAME = {case.name: case for case in CASES}

# Every case runs in these variants ...
VARIANTS = ((torch.float32, "nchw"), (torch.bfloat16, "channels_last"))
# ... and these, which between them reach every path of a kernel, in all dtypes and layouts.
CORE = ("plain", "odd", "prime", "all_pools", "light_even", "residual_relu", "relu_ties_even", "n3")
CORE_VARIANTS = tuple(
    (dtype, layout)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for layout in LAYOUTS
    if (dtype, layout) not in VARIANTS
)

RUNS = [(case, *variant) for case in CASES for variant in VARIANTS] + [
    (BY_NAME[name], *variant) for name in CORE for variant in CORE_VARIANTS
]
if SLOW:
    RUNS = selection.runs(BY_NAME)


def run_id(run: tuple[Case, torch.dtype, str]) -> str:
    case, dtype, layout = run
    return f"{case.name}-{str(dtype).removeprefix('torch.')}-{layout}"
