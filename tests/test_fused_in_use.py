"""What people do with a network, done with a fused one: it computes what the unfused one does."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cbam_fused import fuse_, unfuse_
from cbam_fused.testing import check_close
from tests.gates import new_gate, small_net
from tests.package_gates import ALL_GATES


@pytest.fixture(params=ALL_GATES)
def nets(request) -> dict[str, nn.Module]:
    """A network as it was, in float64 too, and fused."""
    plain = small_net(new_gate(request.param, ALL_GATES))
    fused = copy.deepcopy(plain)
    fuse_(fused, strict=True)
    return {"fused": fused, "eager": plain, "exact": copy.deepcopy(plain).double()}


def check_same(nets: dict[str, nn.Module], use) -> None:
    """Holds what `use(net, x)` returns, tensors by name, to the tolerance rule."""
    torch.manual_seed(3)
    x = torch.randn(2, 3, 9, 8)
    results = {
        name: use(net, x.to(next(net.parameters()).dtype, copy=True)) for name, net in nets.items()
    }
    assert results["fused"]
    for name, actual in results["fused"].items():
        check_close(name, actual, results["eager"][name], results["exact"][name])


def gradients(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_frozen_parameters(nets):
    def use(net, x):
        net.requires_grad_(False)
        y = net(x.requires_grad_())
        y.square().mean().backward()
        return {"y": y.detach(), "x grad": x.grad}

    check_same(nets, use)


def test_part_of_the_parameters_is_trained(nets):
    def use(net, x):
        net.requires_grad_(False)
        net[2].requires_grad_(True)
        net(x).square().mean().backward()
        return {"gradients": gradients(net)}

    check_same(nets, use)


def test_gradients_accumulate(nets):
    def use(net, x):
        for part in (x, -x):
            net(part).square().mean().backward()
        return {"gradients": gradients(net)}

    check_same(nets, use)


def test_tied_weights(nets):
    def use(net, x):
        again = copy.deepcopy(net[2])
        for (name, parameter), (_, other) in zip(
            net[2].named_parameters(), again.named_parameters(), strict=True
        ):
            parent, _, leaf = name.rpartition(".")
            assert other.shape == parameter.shape
            setattr(again.get_submodule(parent), leaf, parameter)
        net = nn.Sequential(*net[:3], again, *net[3:])
        net(x).square().mean().backward()
        return {"gradients": gradients(net)}

    check_same(nets, use)


def test_exported(nets):
    def use(net, x):
        program = torch.export.export(net.eval(), (x,))
        return {"y": program.module()(x)}

    with torch.no_grad():
        check_same(nets, use)


def test_replicas_of_data_parallel(nets):
    """As `torch.nn.parallel.replicate` builds them: with tensors in place of the parameters."""

    def use(net, x):
        replicas = {module: module._replicate_for_data_parallel() for module in net.modules()}
        for module, replica in replicas.items():
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else replicas[child]
            for name, parameter in module._parameters.items():
                replica._parameters.pop(name, None)
                setattr(replica, name, None if parameter is None else parameter * 1)
        y = replicas[net](x)
        y.square().mean().backward()
        return {"y": y.detach(), "gradients": gradients(net)}

    check_same(nets, use)


def test_scripting_asks_to_unfuse_first(nets):
    fused = nets["fused"].eval()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .* fused; cbam_fused\.unfuse_"):
        torch.jit.script(fused)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .* fused; cbam_fused\.unfuse_"):
        torch.jit.script(fused[2])
    assert unfuse_(fused) == ["2"]
