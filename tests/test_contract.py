"""What every discriminator does as an nn.Module, whatever its form and its partition."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from factordisc import (
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    GradientPenalty,
    Observations,
    Partition,
    generator_loss,
    independent,
    markov,
    shared,
    spectral_norm,
)

N = 6
FORMS = {
    "joint": lambda: Factorisation.joint(["a", "b"]),
    "flat2": lambda: Factorisation.flat(["a", "b"]),
    "flat4": lambda: Factorisation.flat(["a", "b", "c", "d"]),
    "eq4": lambda: Factorisation.flat(["a", "b"], assuming=[shared("a")]),
    "no_p": lambda: Factorisation.flat(["a", "b"], assuming=[independent("a", "b", under="p")]),
    "eq6": lambda: Factorisation.flat(["a", "b", "c"], assuming=[shared("a", given=["b", "c"])]),
    "remainder": lambda: Factorisation.remainder(["a", "b"]),
    "hierarchical": lambda: Factorisation.hierarchical({"left": ["a", "b"], "right": ["c"]}),
    "markov": lambda: Factorisation.autoregressive(
        ["a", "b", "c"], assuming=[markov(1, under="p")]
    ),
}
PARTITIONS = {
    "slices": lambda names: Partition(dict.fromkeys(names, 2)),
    "indices": lambda names: Partition.indices(
        {name: [i, i + len(names)] for i, name in enumerate(names)}
    ),
    "fields": lambda names: Partition.fields(*names),
    "steps": lambda names: Partition.steps(len(names), names=names),
    "boxes": lambda names: Partition.boxes(
        {name: (slice(i, i + 1), slice(None)) for i, name in enumerate(names)}, (len(names), 2)
    ),
}
# Compiling costs seconds: every form once, and every partition once.
CHOSEN = [(form, "slices") for form in FORMS] + [("eq6", p) for p in PARTITIONS if p != "slices"]


class Network(nn.Module):
    """Takes any number of parts of any shape, each with two numbers per observation."""

    def __init__(self, parts):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * parts, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, *parts):
        return self.layers(torch.cat([part.flatten(1) for part in parts], dim=1))


def make(form, partition):
    factorisation = FORMS[form]()
    networks = {term.name: Network(len(term.parts)) for term in factorisation.terms}
    partition = PARTITIONS[partition](factorisation.parts)
    return FactorisedDiscriminator(partition, factorisation, networks)


def batch(d, rows=N, dtype=None):
    parts = len(d.partition)
    if d.partition == Partition.fields(*d.partition.names):
        return tuple(torch.randn(rows, 2, dtype=dtype) for _ in range(parts))
    if d.partition in (PARTITIONS[kind](d.partition.names) for kind in ("steps", "boxes")):
        return torch.randn(rows, parts, 2, dtype=dtype)
    return torch.randn(rows, 2 * parts, dtype=dtype)


def map_batch(change, x):
    return tuple(map(change, x)) if isinstance(x, tuple) else change(x)


every = pytest.mark.parametrize(("form", "partition"), [(f, p) for f in FORMS for p in PARTITIONS])
chosen = pytest.mark.parametrize(("form", "partition"), CHOSEN)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_signed_sum(form, partition, dtype):
    d = make(form, partition).to(dtype)
    x = batch(d, dtype=dtype)
    assert d(x).shape == (N,)
    assert d(x).dtype == dtype
    values = d.terms(x)
    # The networks themselves, on parts that are taken here by hand.
    parts = dict(zip(d.partition.names, by_hand(partition, x, len(d.partition)), strict=True))
    expected = {
        t.name: network_of(d, t.name)(torch.cat([parts[name] for name in t.parts], 1))[:, 0]
        for t in d.factorisation.terms
    }
    if partition != "indices":  # whose entries keep their original order
        assert_close(values, expected)
    assert_close(d(x), sum(t.sign * values[t.name] for t in d.factorisation.terms))


def network_of(d, name):
    return d.networks[name].layers


def by_hand(partition, x, parts):
    if partition == "fields":
        return list(x)
    if partition in ("steps", "boxes"):
        return list(x.unbind(1))
    return [x[:, 2 * i : 2 * i + 2] for i in range(parts)]


@every
def test_gradient_reaches_every_parameter(form, partition):
    d = make(form, partition).double()
    x = batch(d, dtype=torch.float64)
    # Signs cancel the gradient of the last biases in no form: the networks are separate.
    d(x).pow(2).sum().backward()
    assert all(bool((parameter.grad != 0).all()) for parameter in d.parameters())
    d.zero_grad()
    DiscriminatorLoss(d)(x, map_batch(lambda t: t + 1, x)).backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in d.parameters())


@every
def test_state_dict_and_deepcopy(form, partition):
    d, other = make(form, partition), make(form, partition)
    x = batch(d)
    before = d(x)
    assert not torch.equal(other(x), before)
    other.load_state_dict(d.state_dict())
    assert_close(other(x), before, rtol=0.0, atol=0.0)
    copied = copy.deepcopy(d)
    assert_close(copied(x), before, rtol=0.0, atol=0.0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert_close(d(x), before, rtol=0.0, atol=0.0)
    assert repr(copied) == repr(d)
    assert all(term.name in repr(d) for term in d.factorisation.terms)


@every
def test_permuting_the_batch_permutes_the_output(form, partition):
    d = make(form, partition).double()
    x, order = batch(d, dtype=torch.float64), torch.randperm(N)
    assert_close(d(map_batch(lambda t: t[order], x)), d(x)[order])
    assert_close(d(map_batch(lambda t: t[:2], x)), d(x)[:2])


@every
def test_train_and_eval_reach_the_networks(form, partition):
    d = make(form, partition)
    assert all(module.training for module in d.modules())
    d.eval()
    assert not any(module.training for module in d.modules())
    x = batch(d)
    assert_close(d(x), d.train()(x))


@every
def test_autocast_gives_finite_float32(form, partition):
    d = make(form, partition)
    x = batch(d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = d(x)
        loss = DiscriminatorLoss(d)(x, x)
    loss.backward()
    assert (value.dtype, loss.dtype) == (torch.float32, torch.float32)
    # bfloat16 keeps 8 bits: 2^-8 relative per layer, and up to 6 terms of order one.
    assert_close(value, d(x), rtol=0.0, atol=0.1)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in d.parameters())


@pytest.mark.usefixtures("_fresh_compiler")
@chosen
def test_compiled_in_one_graph(form, partition):
    d = make(form, partition)
    x = batch(d)
    assert_close(torch.compile(d, fullgraph=True, backend="aot_eager")(x), d(x))


# torch's own: inductor imports torch.utils.mkldnn, which is written in TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_by_inductor():
    d = make("flat2", "slices")
    x = batch(d)
    assert_close(torch.compile(d, fullgraph=True)(x), d(x))


def steps(d):
    """Real data of three steps: complete, without complete observations, complete again."""
    names = d.partition.names
    for complete in (True, False, True):
        x = batch(d)
        lone = {name: d.partition.take(x, name) for name in names}
        yield Observations(joint=x, **lone) if complete else Observations(**lone)


@pytest.mark.usefixtures("_fresh_compiler")
@chosen
def test_cost_is_one_graph_whatever_a_step_lacks(form, partition):
    d = make(form, partition)
    criterion = DiscriminatorLoss(d)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion.cost, fullgraph=True, backend=backend)
    for real in steps(d):
        rows = criterion.rows(real, batch(d))
        gradients = []
        for cost in (criterion.cost, compiled):
            d.zero_grad()
            loss = cost(rows)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in d.parameters())])
        assert_close(gradients[1], gradients[0])
    assert backend.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_whole_criterion_compiles_around_the_drawing_of_rows():
    d = make("flat2", "slices")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(DiscriminatorLoss(d), backend=backend)
    for real in steps(d):
        fake, results = batch(d), []
        for criterion in (DiscriminatorLoss(d), compiled):
            torch.manual_seed(3)
            results.append(criterion(real, fake, report=True))
        assert_close(results[1], results[0], equal_nan=True)
    assert backend.frame_count == 1


@chosen
def test_exported_with_a_dynamic_batch(form, partition):
    d = make(form, partition).eval()
    x = batch(d)
    dynamic = map_batch(lambda _: {0: torch.export.Dim("n", min=2)}, x)
    program = torch.export.export(d, (x,), dynamic_shapes=(dynamic,))
    other = batch(d, rows=N + 5)
    assert_close(program.module()(other), d(other))


class NoHost(TorchDispatchMode):
    """Refuses what waits for a device, reads from it, or makes a tensor of host values."""

    FORBIDDEN = (
        "aten::_local_scalar_dense",  # .item(), bool(), float()
        "aten::is_nonzero",
        "aten::lift_fresh",  # torch.tensor(...)
        "aten::nonzero",
        "aten::masked_select",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().split(".")[0], kwargs or {}
        assert name not in self.FORBIDDEN, name
        assert name != "aten::_to_copy" or kwargs.get("device") is None, name
        return func(*args, **kwargs)


def normalised(form, partition):
    d = make(form, partition)
    for network in d.networks.values():
        spectral_norm(network)
    return d


@chosen
def test_a_step_reads_nothing_back(form, partition):
    d = normalised(form, partition)
    penalties = {"*": GradientPenalty("numerator", 1.0)}
    anchor = 0.0 if form in ("joint", "remainder") else 0.1
    criterion = DiscriminatorLoss(d, penalties=penalties, anchor=anchor)
    for warm in (True, False):
        guard = contextlib.nullcontext() if warm else NoHost()
        for real in steps(d):
            fake = map_batch(torch.Tensor.requires_grad_, batch(d))
            with guard:
                loss, _ = criterion(real, fake, report=True)
                loss.backward()
                generator_loss(d(fake)).backward()


def test_the_guard_finds_what_is_read_back():
    for read in (
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: torch.tensor([1.0]),
    ):
        with pytest.raises(AssertionError, match="aten::"), NoHost():
            read(torch.ones(2))
