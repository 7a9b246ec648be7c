"""Networks of one architecture, evaluated as one."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Observations,
    Partition,
    generator_loss,
    spectral_norm,
)

K, WIDTH, N = 5, 3, 6
PARTITION = Partition({f"x{i}": WIDTH for i in range(K)})
FLAT = Factorisation.flat(PARTITION.names)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch._dynamo.reset()


def mlp(width):
    return nn.Sequential(nn.Linear(width, 4), nn.LeakyReLU(0.2, inplace=True), nn.Linear(4, 1))


def no_bias(width):
    return nn.Sequential(nn.Linear(width, 4, bias=False), nn.Tanh(), nn.Linear(4, 1))


def one_activation(width):
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(width, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 1))


class Nested(nn.Module):
    """What torch.vmap evaluates."""

    def __init__(self, width):
        super().__init__()
        self.inner = mlp(width)

    def forward(self, x):
        return self.inner(x)


def normalised(width):
    return spectral_norm(mlp(width))


def conv(width):
    layers = (
        nn.Unflatten(1, (1, width)),
        nn.ConvTranspose1d(1, 2, 3),
        nn.Flatten(),
        nn.LazyLinear(1),
    )
    network = nn.Sequential(*layers)
    network(torch.zeros(2, width))
    return spectral_norm(network)


def pair(make=mlp, **options):
    """The same discriminator twice: stacked, and not."""
    networks = {t.name: make(WIDTH * len(t.parts)) for t in FLAT.terms}
    return [
        FactorisedDiscriminator(PARTITION, FLAT, copy.deepcopy(networks), stack=stack, **options)
        for stack in (True, False)
    ]


def real():
    x = torch.randn(N, K * WIDTH)
    return Observations(joint=x, x1=torch.randn(9, WIDTH), x3=torch.randn(9, WIDTH))


@pytest.mark.parametrize("make", [mlp, no_bias, one_activation, Nested, normalised, conv])
def test_training_ends_where_it_does_without(make):
    stacked, plain = pair(make)
    generator = torch.randn(N, K * WIDTH)
    assert_close(stacked.state_dict(), plain.state_dict())
    results = []
    for d in (stacked, plain):
        torch.manual_seed(1)
        criterion = DiscriminatorLoss(d, DependencySampler(PARTITION))
        optimiser = torch.optim.Adam(d.parameters(), 1e-2)
        for step in range(6):
            fake = (generator + step).requires_grad_()
            batch = real() if step % 3 else Observations(x1=torch.randn(4, WIDTH))
            loss, report = criterion(batch, fake, report=True)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            (gradient,) = torch.autograd.grad(generator_loss(d(fake)), fake)
        d.eval()
        state = {key: v for key, v in d.state_dict().items() if "._" not in key}
        results.append((loss, report, gradient, d(generator), state))
    # the power iterations of a stack follow every forward pass, which leaves sigma as near
    tolerance = {"rtol": 0.02, "atol": 0.02} if make in (normalised, conv) else {}
    assert_close(results[0], results[1], equal_nan=True, **tolerance)


def test_with_norms_iterated_alike_the_results_are_equal():
    stacked, plain = pair(lambda width: spectral_norm(mlp(width), every_forward=True))
    x = torch.randn(N, K * WIDTH)
    for _ in range(3):
        assert_close(stacked(x), plain(x))
    assert_close(stacked.state_dict(), plain.state_dict())


def test_an_optimiser_sees_few_tensors_and_networks_are_called_once():
    stacked, plain = pair()
    assert len(list(plain.parameters())) == 4 * (K + 2)
    assert len(list(stacked.parameters())) == 4 * 2  # the marginals, and the two dependencies
    assert sum(p.numel() for p in stacked.parameters()) == sum(
        p.numel() for p in plain.parameters()
    )
    calls = []
    for stack in stacked.stacks.values():
        stack.register_forward_hook(lambda *_: calls.append(1))
    stacked(torch.randn(N, K * WIDTH))
    assert len(calls) == 2


def test_terms_of_other_shapes_are_evaluated_in_calls_of_their_own():
    stacked, plain = pair()
    rows = DiscriminatorLoss(plain).rows(real(), torch.randn(N, K * WIDTH))
    assert_close(DiscriminatorLoss(stacked).cost(rows), DiscriminatorLoss(plain).cost(rows))
    separate = [DiscriminatorLoss(d, separate_batches=True).cost(rows) for d in (stacked, plain)]
    assert_close(*separate)
    alone = torch.randn(4, WIDTH)
    assert_close(stacked.term("x2", alone), plain.term("x2", alone))
    assert_close(stacked.networks["x2"](alone), plain.networks["x2"](alone))


def test_state_dicts_are_interchangeable():
    (stacked, plain), x = pair(normalised), torch.randn(N, K * WIDTH)
    others = pair(normalised)
    others[1].load_state_dict(stacked.state_dict())
    others[0].load_state_dict(plain.state_dict())
    for d in (stacked, plain, *others):
        d.eval()
    assert_close(others[1](x), stacked(x))
    assert_close(others[0](x), plain(x))
    copied = copy.deepcopy(stacked)
    assert_close(copied(x), stacked(x))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert_close(stacked(x), plain(x))
    state = stacked.state_dict()
    del state["networks.x1.0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*networks\.x1\.0\.bias"):
        stacked.load_state_dict(state)
    state["networks.x1.0.bias"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"size mismatch for networks\.x1\.0\.bias: \(7,\)"):
        stacked.load_state_dict(state)
    state["networks.x1.1.bias"] = torch.zeros(7)
    result = stacked.load_state_dict(plain.state_dict() | {"networks.x1.9": 0}, strict=False)
    assert result.unexpected_keys == ["networks.x1.9"]


def test_a_row_without_data_has_gradients_of_exactly_zero():
    stacked, _ = pair(lambda width: nn.Sequential(Log(), mlp(width)))
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.abs_()
    x = torch.rand(N, K * WIDTH)
    fake = torch.cat([x[:, :WIDTH], -x[:, WIDTH:]], 1)  # only x0 can be borne
    criterion = DiscriminatorLoss(stacked)
    rows = criterion.rows(Observations(x0=x[:, :WIDTH]), fake)
    names = [f"x{i}" for i in range(K)]
    loss = criterion.cost({name: rows[name] for name in names})
    assert loss.isfinite()
    loss.backward()
    for parameter in stacked.stacks["x0"].parameters():
        assert bool((parameter.grad[0] != 0).any())
        assert bool((parameter.grad[1:] == 0).all())


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def test_one_graph_whatever_a_step_lacks():
    stacked, plain = pair()
    criterion = DiscriminatorLoss(stacked)
    cost = torch.compile(criterion.cost, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, K * WIDTH)
    graphs = []
    for batch in (x, Observations(x1=x[:, :WIDTH], x3=x[:, :WIDTH]), x):
        rows = criterion.rows(batch, x + 1)
        assert_close(cost(rows), DiscriminatorLoss(plain).cost(rows))
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


def test_logit_and_repr():
    def two(width):
        return nn.Linear(width, 2)

    class Both(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inner = nn.Linear(width, 1)

        def forward(self, x):
            return self.inner(x), x

    x = torch.randn(N, K * WIDTH)
    for make, logit in ((two, lambda y: y[:, 1] - y[:, 0]), (Both, lambda output: output[0])):
        stacked, plain = pair(make, logit=logit)
        assert_close(stacked(x), plain(x))
    text = repr(stacked)
    assert "(x3): 4 parameters, Stacked(Both, row 3 of stack 'x0')" in text
    assert f"{K * 4 + 2 * 16} parameters in all" in text


def test_dropout_differs_between_rows():
    stacked, _ = pair(lambda width: nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 1)))
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.fill_(1.0)
    values = stacked.terms(torch.ones(50, K * WIDTH))
    assert not torch.equal(values["x0"], values["x1"])


class Legacy(nn.Module):
    def __new__(cls, width):
        return nn.utils.spectral_norm(nn.Linear(width, 1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda w: nn.Sequential(nn.BatchNorm1d(w), nn.Linear(w, 1)), "'0' keeps running stat"),
        (
            lambda w: nn.utils.parametrizations.spectral_norm(nn.Linear(w, 1)),
            "torch's spectral norm.*use factordisc.spectral_norm",
        ),
        (Legacy, "legacy torch.nn.utils.spectral_norm.*silently wrong"),
        (lambda w: nn.LazyLinear(1), "lazy and has no parameters yet"),
        (lambda w: Log(), "no parameters, so there is nothing to stack"),
        (lambda w: nn.Sequential(nn.LSTM(w, 1)), "'0' is a recurrent layer"),
    ],
)
def test_networks_that_cannot_be_stacked_are_refused_with_the_reason(make, says):
    networks = {t.name: make(WIDTH * len(t.parts)) for t in FLAT.terms}
    says = re.compile(f"network of term 'x0' cannot be stacked: .*{says}")
    with pytest.raises(ValueError, match=says):
        FactorisedDiscriminator(PARTITION, FLAT, networks, stack=True)


def test_networks_of_which_no_two_are_alike_are_refused():
    form = Factorisation.joint(["a", "b"])
    with pytest.raises(ValueError, match="no two of the networks of"):
        FactorisedDiscriminator(
            Partition({"a": 1, "b": 1}), form, {"joint": nn.Linear(2, 1)}, stack=True
        )
