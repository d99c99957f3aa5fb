"""`CBAM`: the authors' module, fused."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cbam_fused import checks
from cbam_fused import reference_gates as gates
from cbam_fused.plan import GateSpec, call_fused, make_plan, pool_of, result_dtype
from cbam_fused.schemas import ACTIVATIONS, POOL_TYPES, TIES


class ChannelGate(nn.Module):
    """The channel gate by its layers: ``y = x * sigmoid(sum over pool types of mlp(pool(x)))``."""

    def __init__(self, channels: int, hidden: int, pool: str, ties: str, **factory) -> None:
        super().__init__()
        self.pool = pool
        self.ties = ties
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, hidden, **factory),
            nn.ReLU(),
            nn.Linear(hidden, channels, **factory),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x ``[N, C, H, W]`` -> y of the same shape."""
        descriptors, _ = gates.pool_pixels(x, self.pool, self.ties)
        logits = sum(self.mlp(descriptor) for descriptor in descriptors.unbind(1))
        return x * gates.per_channel(logits.sigmoid())


class SpatialGate(nn.Module):
    """The spatial gate by its layers: ``y = x * sigmoid(norm(conv(max_c x, mean_c x)))``."""

    def __init__(self, kernel_size: int, ties: str, **factory) -> None:
        super().__init__()
        self.ties = ties
        conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **factory)
        norm = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01, **factory)
        self.spatial = nn.Sequential(OrderedDict(conv=conv, bn=norm))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[N, C, H, W]`` -> y of the same shape."""
        pooled, _ = gates.pool_channels(x, "max_mean", self.ties)
        return x * self.spatial(pooled).sigmoid()


class CBAM(nn.Module):
    """The convolutional block attention module (Woo et al., ECCV 2018, section 3), fused.

    A drop-in for the authors' module (Jongchan/attention-module): the same first four arguments,
    the same names in ``state_dict`` and the same initial values from the same seed, so checkpoints
    load strictly, both ways.

    ``ChannelGate`` and ``SpatialGate`` hold the layers. A call does not run them: it takes their
    parameters to `cbam_fused.cbam`. It does run them where it must: while an inner module has
    hooks, is parametrised, or was replaced or reconfigured, or while hooks on all modules are
    registered. A SyncBatchNorm in the place of the norm is synchronised as ever.

    Args:
        gate_channels: C, the channels of x.
        reduction_ratio: the MLP has ``gate_channels // reduction_ratio`` hidden units.
        pool_types: what is pooled over H*W, each a branch of the MLP: ``avg``, ``max``, ``lp`` (p
            = 2), ``lse``.
        no_spatial: leave the spatial gate out.
        kernel_size: of the spatial gate's convolution, odd.
        ties: the gradient of a maximum goes to the ``first`` index (as the authors' code does), or
            is spread ``even``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected
            and what came.
    """

    def __init__(
        self,
        gate_channels: int,
        reduction_ratio: int = 16,
        pool_types: Sequence[str] = ("avg", "max"),
        no_spatial: bool = False,
        *,
        kernel_size: int = 7,
        ties: str = "first",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive("gate_channels", gate_channels)
        _check_positive("reduction_ratio", reduction_ratio)
        _check_positive("kernel_size", kernel_size)
        if reduction_ratio > gate_channels:
            expected = f"at most gate_channels, {gate_channels}"
            raise ValueError(f"CBAM: reduction_ratio must be {expected}; got {reduction_ratio}")
        if kernel_size % 2 == 0:
            raise ValueError(f"CBAM: kernel_size must be odd; got {kernel_size}")
        checks.choice("ties", ties, TIES, op="CBAM")
        factory = {"device": device, "dtype": dtype}
        hidden = gate_channels // reduction_ratio
        pool = pool_of(pool_types)
        if pool is None:
            expected = f"a list of different ones of {', '.join(POOL_TYPES)}"
            raise ValueError(f"CBAM: pool_types must be {expected}; got {pool_types!r}")
        self.no_spatial = no_spatial
        self.ChannelGate = ChannelGate(gate_channels, hidden, pool, ties, **factory)
        if not no_spatial:
            self.SpatialGate = SpatialGate(kernel_size, ties, **factory)
        spec = GateSpec(
            hidden_layer="ChannelGate.mlp.1",
            output_layer="ChannelGate.mlp.3",
            conv=None if no_spatial else "SpatialGate.spatial.conv",
            norm=None if no_spatial else "SpatialGate.spatial.bn",
            pool=pool,
            maps="max_mean",
            ties=ties,
        )
        self._plan = make_plan(self, spec)

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        """``y = activation(gate(x) + residual)``.

        Args:
            x: ``[N, C, H, W]``, NCHW or channels_last, float32, float16, bfloat16 or float64.
            residual: as x, added after the gate; or None.
            activation: ``none``, ``relu`` or ``relu6``.

        Returns:
            y, in shape, dtype and strides as x; under autocast in its dtype, unless x is float64.

        Raises:
            TypeError, ValueError: an argument does not fit; nothing was changed.
        """
        y = call_fused(self, self._plan, x, residual=residual, activation=activation)
        if y is not None:
            return y
        if not isinstance(x, torch.fx.Proxy):
            x, residual = _checked(x, residual, activation)
        y = self.ChannelGate(x)
        if not self.no_spatial:
            y = self.SpatialGate(y)
        if residual is not None:
            y = y + residual
        y = gates.activate(y, activation)
        return y if isinstance(x, torch.fx.Proxy) else y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"pool={self._plan.pool}, ties={self._plan.ties}"


def _check_positive(argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"CBAM: {argument} must be an integer of at least 1; got {value!r}")


def _checked(x: Tensor, residual: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """x and residual as `cbam_fused.cbam` takes them, with its checks and its autocast."""
    checks.tensor(x)
    dtype = result_dtype(x)
    if dtype != x.dtype and isinstance(residual, Tensor) and residual.is_floating_point():
        residual = residual.to(dtype)
    x = x.to(dtype)
    checks.residual(x, residual)
    checks.choice("activation", activation, ACTIVATIONS)
    return x, residual
