"""Modules that look like bubbliiiing's or mmyolo's CBAM, ultralytics' or pytorchcv's, and are none.

Most have the names, layers and keys of the genuine one: their forward is another.
"""

from collections.abc import Callable
from functools import partial

import torch
from pytorchcv.models.cbamresnet import CbamBlock
from torch import nn

from tests import pasted, yolo
from tests.lookalikes import DIFFERS, Lookalike, changed, replaced


def with_forward(make: Callable[[], nn.Module], path: str, forward: Callable):
    """A genuine module, one part of which has another forward; `own` is the one it had."""

    def made() -> nn.Module:
        module = make()
        part = module.get_submodule(path)
        own = type(part)
        method = partial(forward, own.forward)
        part.__class__ = type(own.__name__, (own,), {"forward": lambda self, x: method(self, x)})
        return module

    return made


def adds_x(own, self, x):
    return own(self, x) + x


def gates_twice(own, self, x):
    return own(self, x) * x


def squares(own, self, x):
    return own(self, x).square()


def returns_the_map(own, self, x):
    return (own(self, x) / x)[:, :1]


def _mlp(gate):
    return gate.fc if hasattr(gate, "fc") else gate.mlp


def sigmoid_before_the_sum(_, self, x):
    mlp = _mlp(self)
    return (self.sigmoid(mlp(self.avg_pool(x))) + self.sigmoid(mlp(self.max_pool(x)))) / 2


def average_only(_, self, x):
    return self.sigmoid(_mlp(self)(self.avg_pool(x)) * 2)


def sum_before_the_mlp(_, self, x):
    return self.sigmoid(_mlp(self)(self.avg_pool(x) + self.max_pool(x)))


def _spatial(self, pooled):
    return self.conv(pooled) if hasattr(self, "conv") else self.sigmoid(self.conv1(pooled))


def maximum_first(_, self, x):
    return _spatial(self, pasted.mean_and_max(x).flip(1))


def even_ties(_, self, x):
    maps = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
    return _spatial(self, maps)


def other_order_of_gates(_, self, x):
    channel, spatial = self.children()
    x = spatial(x) * x
    return channel(x) * x


def parallel_gates(_, self, x):
    channel, spatial = self.children()
    return x * channel(x) * spatial(x)


def _variants(source: str, make: Callable[[], nn.Module], channel: str, spatial: str, mlp: str):
    """The same changes to a genuine module, by the names of its two gates and of its ReLU."""
    for path, forward in (
        ("", adds_x),
        ("", other_order_of_gates),
        ("", parallel_gates),
        (channel, gates_twice),
        (channel, sigmoid_before_the_sum),
        (channel, average_only),
        (channel, sum_before_the_mlp),
        (spatial, gates_twice),
        (spatial, maximum_first),
        (spatial, even_ties),
    ):
        name = f"{source}_{path or 'block'}_{forward.__name__}"
        yield Lookalike(name, with_forward(make, path, forward), DIFFERS)
    yield Lookalike(
        f"{source}_returns_the_map",
        with_forward(make, "", returns_the_map),
        r"^its own forward returns \[2, 1, 5, 6\] for",
    )
    yield Lookalike(
        f"{source}_other_relu",
        with_forward(make, mlp, squares),
        f"^{mlp} is a {__name__}.ReLU, not a ReLU$",
    )
    yield Lookalike(
        f"{source}_leaky", replaced(mlp, nn.LeakyReLU(), base=make), "is a LeakyReLU, not a ReLU$"
    )
    yield Lookalike(
        f"{source}_hard_sigmoid",
        replaced(f"{channel}.sigmoid", nn.Hardsigmoid(), base=make),
        f"^{channel}.sigmoid is a Hardsigmoid, not a Sigmoid$",
    )
    yield Lookalike(
        f"{source}_pools_to_2x2",
        replaced(f"{channel}.avg_pool", nn.AdaptiveAvgPool2d((2, 2)), base=make),
        rf"^{channel}.avg_pool pools to \(2, 2\), not to 1 x 1$",
    )


class UltralyticsSubclass(yolo.CBAM):
    def forward(self, x):
        return super().forward(x) + x


class PytorchcvSubclass(CbamBlock):
    def forward(self, x):
        return super().forward(x) + x


class UltralyticsSpatial(type(yolo.CBAM(8).spatial_attention)):
    pass


def _block() -> nn.Module:
    return CbamBlock(32, 4)


PASTED_LOOKALIKES = [
    *_variants(
        "bubbliiiing",
        lambda: pasted.cbam_block(32, 4),
        "channelattention",
        "spatialattention",
        "channelattention.relu1",
    ),
    *_variants(
        "mmyolo",
        lambda: pasted.CBAM(32, 4),
        "channel_attention",
        "spatial_attention",
        "channel_attention.fc.0.activate",
    ),
    Lookalike(
        "mmyolo_conv_module",
        with_forward(lambda: pasted.CBAM(32, 4), "channel_attention.fc.0", squares),
        DIFFERS,
    ),
    Lookalike(
        "mmyolo_no_activation",
        replaced(
            "channel_attention.fc.0",
            pasted.ConvModule(32, 8, 1),
            base=lambda: pasted.CBAM(32, 4),
        ),
        "^channel_attention.fc.0 has the children conv, not conv, activate$",
    ),
    Lookalike(
        "bubbliiiing_parametrised",
        changed(
            lambda module: nn.utils.parametrizations.weight_norm(module.channelattention.fc1),
            lambda: pasted.cbam_block(32, 4),
        ),
        "^channelattention.fc1 is a ParametrizedConv2d, not a Conv2d$",
    ),
    Lookalike(
        "ultralytics_subclass", lambda: UltralyticsSubclass(32), "another forward than CBAM$"
    ),
    Lookalike(
        "ultralytics_inner_subclass",
        replaced("spatial_attention", UltralyticsSpatial(), base=lambda: yolo.CBAM(32)),
        "^spatial_attention is a UltralyticsSpatial, not the SpatialAttention of ultralytics",
    ),
    Lookalike(
        "ultralytics_activation",
        replaced("channel_attention.act", nn.Hardsigmoid(), base=lambda: yolo.CBAM(32)),
        "^channel_attention.act is a Hardsigmoid, not a Sigmoid$",
    ),
    Lookalike(
        "ultralytics_pool",
        replaced("channel_attention.pool", nn.AdaptiveMaxPool2d(1), base=lambda: yolo.CBAM(32)),
        "^channel_attention.pool is a AdaptiveMaxPool2d, not a AdaptiveAvgPool2d$",
    ),
    Lookalike(
        "pytorchcv_subclass", lambda: PytorchcvSubclass(32), "another forward than CbamBlock$"
    ),
    Lookalike(
        "pytorchcv_activation",
        replaced("ch_gate.mlp.activ", nn.ReLU6(), base=_block),
        "^ch_gate.mlp.activ is a ReLU6, not a ReLU$",
    ),
    Lookalike(
        "pytorchcv_norm",
        replaced("sp_gate.conv.bn", nn.GroupNorm(1, 1), base=_block),
        "^sp_gate.conv.bn is a GroupNorm, not a batch norm$",
    ),
]
