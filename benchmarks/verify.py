"""A module against the same module in float64, under the tolerance rule, before anything is timed.

The maxima in a gate are decisions that rounding may move, and a moved one changes gradients by far
more than rounding does. So the inputs here are random data in which every maximum leads by more
than rounding can move it.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cbam_fused.testing import check_close

LEAD = 8 * torch.finfo(torch.bfloat16).eps
"""By how much, relatively, each maximum exceeds the next value: a few roundings in bfloat16."""

Results = dict[str, Tensor]


def draws(values: int) -> int:
    """How many inputs of so many values are judged together: more small ones, since the largest
    error of a few numbers is a matter of luck.
    """
    return max(3, min(16, 2_000_000 // values))


def narrow_maxima(u: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The elements that are a maximum of `u` over `dims`, and lead by less than LEAD."""
    largest = u.amax(dims, keepdim=True)
    is_maximum = u == largest
    second = u.masked_fill(is_maximum, -torch.inf).amax(dims, keepdim=True)
    shared = is_maximum.sum(dims, keepdim=True) > 1
    return is_maximum & (shared | (largest < second * (1 + LEAD)))


def separate_maxima(
    x: Tensor, channel_gate: Callable[[Tensor], Tensor], rounds: int = 100
) -> Tensor:
    """A copy of `x` with its maxima raised until each leads by LEAD.

    The maxima are those of CBAM: over H*W in x, and over C in ``channel_gate(x)``.

    Args:
        x: ``[N, C, H, W]``; dtype and strides are kept.
        channel_gate: maps x in float64 to x * Mc, each sample for itself.
        rounds: raising a maximum shifts the gate a little, so this is repeated, at most so often.
    """
    result = x.clone()
    for sample in result.split(1):
        for _ in range(rounds):
            exact = sample.double()
            narrow = narrow_maxima(exact, (2, 3)) | narrow_maxima(channel_gate(exact), (1,))
            if not narrow.any():
                break
            # Equal maxima must part, so no two are raised by the same factor.
            factor = 1 + LEAD * (1 + torch.rand_like(sample))
            sample.copy_(torch.where(narrow, sample * factor, sample))
        else:
            raise RuntimeError(f"maxima still too close after {rounds} rounds in {list(x.shape)}")
    return result


def forward(module: nn.Module, x: Tensor) -> Results:
    """What inference yields, by name."""
    with torch.inference_mode():
        return {"y": module(x)}


def forward_backward(module: nn.Module, x: Tensor, grad: Tensor) -> Results:
    """What a training step yields, by name: y, every gradient, and the buffers afterwards.

    Gradients of a single value are judged together: eager's error in one number is a matter of
    luck, and may well be 0.
    """
    x = x.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module(x)
    y.backward(grad)
    results = {"y": y.detach(), "x grad": x.grad}
    results |= {f"{name} grad": p.grad for name, p in module.named_parameters() if p.numel() > 1}
    results["single gradients"] = torch.cat([p.grad for p in module.parameters() if p.numel() == 1])
    floating = ((name, b) for name, b in module.named_buffers() if b.is_floating_point())
    results |= {name: buffer.clone() for name, buffer in floating}
    module.zero_grad(set_to_none=True)
    return results


class Oracle:
    """What a module yields in its own dtype and in float64; other implementations are held to it.

    Args:
        module: the implementation by eager PyTorch; it is copied.
        inputs: pairs of x and the gradient of y, or of x and None for inference.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[tuple[Tensor, Tensor | None]]):
        self.inputs = inputs
        self.eager = self._run(copy.deepcopy(module), inputs)
        exact = [(x.double(), None if grad is None else grad.double()) for x, grad in inputs]
        self.expected = self._run(copy.deepcopy(module).double(), exact)

    @staticmethod
    def _run(module: nn.Module, inputs: Sequence[tuple[Tensor, Tensor | None]]) -> list[Results]:
        return [
            forward(module, x) if grad is None else forward_backward(module, x, grad)
            for x, grad in inputs
        ]

    def check(self, module: nn.Module) -> None:
        """Raises AssertionError if `module`, in the state that the oracle's was in, is off.

        Results must be laid out as eager's too: another layout moves work to whoever reads them.
        """
        actual = self._run(module, self.inputs)
        for name, result in self.eager[0].items():
            strides = actual[0][name].stride()
            if strides != result.stride():
                raise AssertionError(f"{name}: strides {strides}, eager {result.stride()}")
            runs = (actual, self.eager, self.expected)
            check_close(name, *(torch.stack([results[name] for results in run]) for run in runs))
