"""`cbam_fused.CBAM`: a drop-in for the authors' module, from its names to its gradients."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbam_fused import CBAM
from cbam_fused.testing import check_close
from tests import official

OPTIONS = [
    pytest.param({}, id="defaults"),
    pytest.param({"reduction_ratio": 4}, id="reduction"),
    pytest.param({"pool_types": ["max"]}, id="one_pool"),
    pytest.param({"pool_types": ["lse", "lp", "avg", "max"]}, id="all_pools_in_another_order"),
    pytest.param({"no_spatial": True}, id="no_spatial"),
]


def pair(**options):
    """The authors' module and ours, from the same seed."""
    modules = []
    for cls in (official.CBAM, CBAM):
        torch.manual_seed(3)
        modules.append(cls(32, **options))
    return modules


def run(module, x, grad):
    """Output, gradients and buffers, by name."""
    module = copy.deepcopy(module)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(grad)
    results = {"output": y.detach(), "gradient of x": leaf.grad}
    results |= {name: p.grad for name, p in module.named_parameters()}
    return results | {name: b for name, b in module.named_buffers() if b.is_floating_point()}


def check_same(module, own, draws=8):
    """The tolerance rule for `module` against the eager module `own`, over some draws together."""
    dtype = next(own.parameters()).dtype
    runs = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        x, grad = torch.randn(2, 2, 32, 9, 7, generator=generator).to(dtype)
        double = run(copy.deepcopy(own).double(), x.double(), grad.double())
        runs.append((run(module, x, grad), run(own, x, grad), double))
    for name in runs[0][1]:
        check_close(name, *(torch.stack([r[i][name] for r in runs]) for i in range(3)))


@pytest.mark.parametrize("options", OPTIONS)
def test_initial_values_and_names_are_the_authors(options):
    theirs, ours = pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("options", OPTIONS)
def test_checkpoints_load_strictly_both_ways(options):
    theirs, _ = pair(**options)
    ours = CBAM(32, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS)
def test_results_and_gradients_are_the_authors(options, training):
    theirs, ours = pair(**options)
    check_same(ours.train(training), theirs.train(training))


def norm_options():
    """What can be done to a batch norm: (name, change)."""

    def momentum_none(norm):
        norm.momentum = None

    def frozen(norm):
        norm.running_mean.fill_(0.3)
        norm.eval()

    def untracked(norm):
        norm.__init__(1, track_running_stats=False)

    def not_affine(norm):
        norm.__init__(1, affine=False)

    changes = (momentum_none, frozen, untracked, not_affine)
    return [pytest.param(change, id=change.__name__) for change in changes]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", norm_options())
def test_norm_is_treated_as_batch_norm_treats_itself(change, training):
    modules = pair()
    for module in modules:
        change(module.train(training).SpatialGate.spatial.bn)
    theirs, ours = modules
    check_same(ours, theirs)
    for _ in range(3):
        x = torch.randn(2, 32, 5, 5)
        theirs(x), ours(x)
    for (name, expected), actual in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_a_refused_call_counts_no_batch():
    module = CBAM(32)
    with pytest.raises((TypeError, ValueError), match="cbam: x must be"):
        module(torch.zeros(2, 32))
    assert module.SpatialGate.spatial.bn.num_batches_tracked == 0


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of none, relu, relu6; got 'gelu'"),
        ({"residual": torch.zeros(2, 32, 1, 1)}, r"residual must be as x, float32 \[2, 32, 5, 5\]"),
        ({"residual": 1.0}, "residual must be as x, .*; got 1.0"),
        ({"x": torch.zeros(2, 32, 5, 5, dtype=torch.int32)}, "x must be .*; got int32"),
    ],
)
def test_a_refused_call_changes_nothing_on_either_path(call, message, hooked):
    module = CBAM(32)
    if hooked:
        module.ChannelGate.mlp[1].register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=f"^cbam: {message}"):
        module(**{"x": torch.randn(2, 32, 5, 5)} | call)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_gives_one_dtype_on_every_path(dtype):
    module = CBAM(32).eval().to(dtype)
    x, residual = torch.randn(2, 2, 32, 6, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        fused = module(x, residual=residual)
        layers, calls = by_its_layers(module, x, residual=residual)
    assert calls
    assert fused.dtype == layers.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)


def test_residual_and_activation():
    module = CBAM(32).eval()
    x, residual = torch.randn(2, 2, 32, 6, 6)
    y = module(x, residual=residual, activation="relu")
    torch.testing.assert_close(y, (module(x) + residual).relu())
    assert (module(x) + residual).min() < 0


def by_its_layers(module, x, **epilogue):
    """A call made with a hook on an inner module, and how often the hook ran."""
    calls = []
    handle = module.ChannelGate.mlp[1].register_forward_hook(lambda *_: calls.append(1))
    try:
        return module(x, **epilogue), len(calls)
    finally:
        handle.remove()


@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("options", OPTIONS)
def test_hooks_on_inner_modules_run(options, ties):
    module = CBAM(32, **options, ties=ties).eval()
    x, residual = torch.randn(2, 2, 32, 6, 6)
    epilogue = {"residual": residual, "activation": "relu6"}
    y, calls = by_its_layers(module, x, **epilogue)
    assert calls == len(options.get("pool_types", ["avg", "max"]))
    torch.testing.assert_close(y, module(x, **epilogue))


def test_ties_rule_decides_the_gradient():
    x = torch.randn(2, 32, 6, 6)
    x[:, :8] = 0
    x.requires_grad_()
    gradients = {}
    for ties in ("first", "even"):
        torch.manual_seed(0)
        module = CBAM(32, 4, ties=ties)
        gradients[ties] = torch.autograd.grad(module(x).square().sum(), x)[0]
        layers = torch.autograd.grad(by_its_layers(module, x)[0].square().sum(), x)[0]
        torch.testing.assert_close(gradients[ties], layers)
    assert not torch.allclose(gradients["first"], gradients["even"])


def test_parametrised_layer_is_used():
    module = CBAM(32).eval()
    x = torch.randn(2, 32, 6, 6)
    plain = module(x)
    nn.utils.parametrizations.weight_norm(module.ChannelGate.mlp[1])
    torch.testing.assert_close(module(x), plain)
    with torch.no_grad():
        module.ChannelGate.mlp[1].parametrizations.weight.original0.mul_(3)
    assert not torch.allclose(module(x), plain)


@pytest.mark.parametrize("rebuild", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_parameters_of_their_own(rebuild):
    module = CBAM(32).eval()
    x = torch.randn(2, 32, 6, 6)
    y = module(x)
    made = rebuild(module)
    assert torch.equal(made(x), y)
    with torch.no_grad():
        made.ChannelGate.mlp[3].bias.add_(1)
    assert torch.equal(module(x), y)
    assert not torch.equal(made(x), y)


def test_functional_call_uses_the_given_parameters():
    module, other = CBAM(32).eval(), CBAM(32).eval()
    x = torch.randn(2, 32, 6, 6)
    assert torch.equal(torch.func.functional_call(module, other.state_dict(), (x,)), other(x))


def test_checkpointing_gives_the_same_gradients():
    module = CBAM(32).eval()
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), x)
    y = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected[0])


def test_repr_states_the_options():
    first_line = repr(CBAM(32, pool_types=["max", "avg"], ties="even")).splitlines()[1]
    assert first_line.strip() == "pool=avg+max, ties=even"


_POOLS = "a list of different ones of avg, max, lp, lse"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate_channels": 0}, "CBAM: gate_channels must be an integer of at least 1; got 0"),
        ({"gate_channels": 2.5}, "CBAM: gate_channels must be an integer of at least 1; got 2.5"),
        ({"reduction_ratio": 0}, "CBAM: reduction_ratio must be an integer of at least 1; got 0"),
        (
            {"reduction_ratio": 128},
            "CBAM: reduction_ratio must be at most gate_channels, 64; got 128",
        ),
        ({"kernel_size": 4}, "CBAM: kernel_size must be odd; got 4"),
        ({"kernel_size": -1}, "CBAM: kernel_size must be an integer of at least 1; got -1"),
        (
            {"pool_types": ["avg", "median"]},
            f"CBAM: pool_types must be {_POOLS}; got ['avg', 'median']",
        ),
        ({"pool_types": ["avg", "avg"]}, f"CBAM: pool_types must be {_POOLS}; got ['avg', 'avg']"),
        ({"pool_types": []}, f"CBAM: pool_types must be {_POOLS}; got []"),
        ({"pool_types": "avg"}, f"CBAM: pool_types must be {_POOLS}; got 'avg'"),
        ({"ties": "last"}, "CBAM: ties must be one of first, even; got 'last'"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CBAM(**{"gate_channels": 64} | arguments)
