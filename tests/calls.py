"""Calling a gate through the public functional form, or anything with its signature, and
differentiating it.
"""

from dataclasses import fields, replace

from torch import Tensor

DIFFERENTIABLE = (
    "x",
    "mlp_weight1",
    "mlp_bias1",
    "mlp_weight2",
    "mlp_bias2",
    "conv_weight",
    "conv_bias",
    "norm_weight",
    "norm_bias",
    "residual",
)
PARAMETERS = (*DIFFERENTIABLE[1:-1], "running_mean", "running_var")


def require_grad(gate, names=DIFFERENTIABLE):
    """The gate with leaves that require a gradient in place of the tensors called `names`; x may be
    its own residual.
    """
    leaves = {}
    for field in fields(gate):
        value = getattr(gate, field.name)
        if field.name in names and value is not None:
            leaves[field.name] = value.detach().requires_grad_()
    if gate.residual is gate.x and "x" in leaves:
        leaves["residual"] = leaves["x"]
    return replace(gate, **leaves)


def call(function, gate):
    """`gate` through `function`, which has the signature of `cbam_fused.cbam`."""
    tensors = (getattr(gate, name) for name in DIFFERENTIABLE[:-1])
    return function(
        *tensors,
        gate.running_mean,
        gate.running_var,
        residual=gate.residual,
        batch_statistics=gate.batch_statistics,
        eps=gate.eps,
        pool=gate.pool,
        maps=gate.maps,
        ties=gate.ties,
        activation=gate.activation,
    )


def differentiate(function, gate, names=DIFFERENTIABLE) -> dict[str, Tensor]:
    """y and the gradients of the tensors called `names`."""
    gate = require_grad(gate, names)
    y = call(function, gate)
    y.backward(gate.grad)
    return {"y": y.detach()} | {
        name: getattr(gate, name).grad for name in names if getattr(gate, name) is not None
    }
