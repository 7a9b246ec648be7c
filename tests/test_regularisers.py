import copy
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm as torchs
from torch.testing import assert_close

from factordisc.regularisers import iterate, spectral_norm

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "linear of one sample": (lambda: nn.Linear(6, 4), (6,)),
    "linear of sequences": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "conv2d, channels last": (
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        (2, 4, 5, 5),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 8)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "bilinear": (lambda: nn.Bilinear(3, 2, 4), (5, 5)),
    "embedding": (lambda: nn.Embedding(9, 4), None),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), None),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


class Both(nn.Module):
    """A bilinear layer that takes one tensor."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[:, :3], x[:, 3:])


def pair(kind, dtype=torch.float64, every_forward=True):
    """One layer with torch's spectral norm and one with ours, in one state, and an input."""
    make, shape = LAYERS[kind]
    theirs = torchs(make().to(dtype))
    ours = spectral_norm(make().to(dtype), every_forward=every_forward)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randint(9, (5, 2)) if shape is None else torch.randn(shape, dtype=dtype)
    if kind == "bilinear":
        theirs, ours = Both(theirs), Both(ours)
    return theirs, ours, x.requires_grad_() if shape is not None else x


def mlp(dtype=None, inplace=True):
    return nn.Sequential(
        nn.Linear(6, 5, dtype=dtype),
        nn.LeakyReLU(0.2, inplace=inplace),
        nn.Linear(5, 4, bias=False, dtype=dtype),
        nn.LeakyReLU(0.2, inplace=inplace),
        nn.Linear(4, 1, dtype=dtype),
    )


def torchs_on(network):
    for layer in network:
        if isinstance(layer, nn.Linear):
            torchs(layer)
    return network


def mlps(dtype=torch.float64, **options):
    theirs, ours = torchs_on(mlp(dtype)), spectral_norm(mlp(dtype), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def norm_of(layer):
    return layer.parametrizations.weight[0]


def original(layer):
    return layer.parametrizations.weight.original


def singular_vectors(layer):
    return norm_of(layer)._u.clone(), norm_of(layer)._v.clone()


def gradients(network, x, loss):
    network.zero_grad()
    leaves = [*network.parameters(), *([x] if x.requires_grad else [])]
    return torch.autograd.grad(loss, leaves)


class Iterations:
    """Counts how often a layer's singular vectors are written."""

    def __init__(self, layer):
        self.layer = layer
        self.seen = self._versions()

    def _versions(self):
        return norm_of(self.layer)._u._version, norm_of(self.layer)._v._version

    def __call__(self):
        before, self.seen = self.seen, self._versions()
        counts = {now - then for now, then in zip(self.seen, before, strict=True)}
        assert len(counts) == 1  # u and v go together
        return counts.pop()


# ---- the same function and gradients as torch's ------------------------------------------------


@each_layer
def test_outputs_gradients_and_vectors_are_torchs_over_several_passes(kind):
    theirs, ours, x = pair(kind)
    for _ in range(3):
        y, expected = ours(x), theirs(x)
        assert_close(y, expected)
        weights = torch.randn_like(expected)
        found = gradients(ours, x, (weights * y).sum())
        assert_close(found, gradients(theirs, x, (weights * expected).sum()))
        assert_close(ours.state_dict(), theirs.state_dict())


@each_layer
def test_in_eval_mode_it_is_torchs_and_does_not_iterate(kind):
    theirs, ours, x = pair(kind, every_forward=False)
    for network in (theirs, ours):
        network.eval()
    state = copy.deepcopy(ours.state_dict())
    y, expected = ours(x), theirs(x)
    assert_close(y, expected)
    found = gradients(ours, x, y.square().sum())
    assert_close(found, gradients(theirs, x, expected.square().sum()))
    assert_close(ours.state_dict(), state, rtol=0.0, atol=0.0)
    with torch.no_grad():
        assert_close(ours(x), expected)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv2d", "transposed 2d"])
def test_gradcheck_and_gradgradcheck(kind):
    _, ours, x = pair(kind)
    ours.eval()
    leaves = (x, *ours.parameters())

    def function(x, *parameters):
        names = [name for name, _ in ours.named_parameters()]
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(ours, given, (x,))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_a_later_iteration_does_not_spoil_a_backward_pass():
    for training in (True, False):
        ours = spectral_norm(mlp(), every_forward=True).train(training)
        x = torch.randn(3, 6)
        twin = copy.deepcopy(ours)
        y, expected = ours(x), twin(x)
        ours.train()(x)
        assert_close(gradients(ours, x, y.sum()), gradients(twin, x, expected.sum()))


@pytest.mark.parametrize("every_forward", [True, False])
def test_gradient_penalties_are_torchs(every_forward):
    theirs, ours = mlps(every_forward=every_forward)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def penalised(network):
        y = network(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return gradients(network, x, y.sigmoid().mean() + slope.square().sum())

    assert_close(penalised(ours), penalised(theirs))


def test_a_shared_layer_is_penalised_once_for_each_use():
    layers = [torchs(nn.Linear(4, 4)).double(), spectral_norm(nn.Linear(4, 4)).double()]
    layers[1].load_state_dict(layers[0].state_dict())
    layers = [layer.eval() for layer in layers]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def penalised(layer):
        y = layer(layer(x).tanh())
        weight = original(layer)
        slopes = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
        return gradients(layer, x, sum(slope.square().sum() for slope in slopes))

    assert_close(penalised(layers[1]), penalised(layers[0]))


def test_an_activation_in_place_does_not_spoil_the_gradient():
    theirs, ours = mlps()
    free = mlp(torch.float64, inplace=False)
    spectral_norm(free).load_state_dict(theirs.state_dict())
    x = torch.randn(7, 6, dtype=torch.float64)
    assert_close(gradients(ours, x, ours(x).sum()), gradients(free, x, free(x).sum()))


def test_two_passes_before_one_backward():
    theirs, ours = mlps(every_forward=True)
    one, other = torch.randn(2, 7, 6, dtype=torch.float64)

    def loss(network):
        return network(one).square().sum() - network(other).sum()

    assert_close(gradients(ours, one, loss(ours)), gradients(theirs, one, loss(theirs)))


def trained(network, steps=6):
    rng = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    outputs = []
    for _ in range(steps):
        x = torch.randn(8, 6, generator=rng, dtype=torch.float64)
        optimiser.zero_grad()
        outputs.append(network(x))
        outputs[-1].sigmoid().sum().backward()
        optimiser.step()
    return outputs, network.state_dict()


@pytest.mark.parametrize("every_forward", [True, False])
def test_a_training_with_adam_is_torchs(every_forward):
    # One forward pass per update: both ways iterate equally often.
    theirs, ours = mlps(every_forward=every_forward)
    assert_close(trained(ours), trained(theirs), rtol=1e-9, atol=1e-11)


def test_every_forward_is_torchs_with_several_passes_between_updates():
    theirs, ours = mlps(every_forward=True)
    for network in (theirs, ours):
        for _ in range(3):
            with torch.no_grad():
                network(torch.ones(2, 6, dtype=torch.float64))
    assert_close(trained(ours), trained(theirs), rtol=1e-9, atol=1e-11)


def test_more_iterations_and_another_dimension_stay_as_torch_was_told():
    theirs = torchs(nn.Linear(6, 4), n_power_iterations=3, dim=1, eps=1e-6)
    ours = spectral_norm(copy.deepcopy(theirs), every_forward=True)
    x = torch.randn(5, 6)
    for _ in range(2):
        assert_close(ours(x), theirs(x))
        expected = gradients(theirs, x, theirs(x).square().sum())
        assert_close(gradients(ours, x, ours(x).square().sum()), expected)
    assert_close(ours.state_dict(), theirs.state_dict())


def test_complex_weights_are_left_to_torch():
    theirs, ours = (
        norm(nn.Linear(6, 4, dtype=torch.complex64)) for norm in (torchs, spectral_norm)
    )
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, dtype=torch.complex64)
    assert_close(ours(x), theirs(x))


def test_a_sparse_embedding():
    theirs, ours = torchs(nn.Embedding(9, 4, sparse=True)), spectral_norm(nn.Embedding(9, 4))
    ours.load_state_dict(theirs.state_dict())
    ours.sparse = True
    x = torch.tensor([3, 0, 3])
    expected = gradients(theirs, x, theirs(x).square().sum())
    assert_close(gradients(ours, x, ours(x).square().sum()), expected)


@each_layer
def test_the_weight_itself_is_what_the_layer_uses(kind):
    _, ours, x = pair(kind, every_forward=False)
    layer = ours.layer if kind == "bilinear" else ours
    y = ours(x)
    weight = layer.weight
    assert weight.requires_grad
    plain = LAYERS[kind][0]().double()
    state = {"weight": weight, **{k: v for k, v in layer.named_parameters() if k == "bias"}}
    plain.load_state_dict(state)
    assert_close((Both(plain) if kind == "bilinear" else plain)(x), y)


def test_the_bound_holds_after_training():
    ours = spectral_norm(mlp(torch.float64))
    trained(ours, steps=300)
    with torch.no_grad():
        for layer in (ours[0], ours[2], ours[4]):
            assert abs(torch.linalg.matrix_norm(layer.weight, 2).item() - 1) < 0.02


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(kind, dtype):
    theirs, ours, x = pair(kind, dtype)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]
    y, expected = ours(x), theirs(x)
    assert y.dtype == dtype
    assert_close(y, expected, rtol=tolerance, atol=tolerance)
    found = gradients(ours, x, y.square().sum())
    expected = gradients(theirs, x, expected.square().sum())
    assert_close(found, expected, rtol=tolerance, atol=8 * tolerance)


def test_only_the_gradients_that_are_asked_for_are_computed():
    ours = spectral_norm(mlp())
    x = torch.randn(3, 6, requires_grad=True)
    count = Iterations(ours[0])
    ours(x).sum().backward(inputs=[x])
    assert count() == 1
    assert x.grad is not None
    assert all(p.grad is None for p in ours.parameters())
    # no gradient of the weight was computed: nothing says that it will change
    ours(x)
    assert count() == 0
    ours.requires_grad_(False)
    y = ours(x)
    assert y.requires_grad
    assert count() == 0
    ours.requires_grad_(True)
    ours[0].bias.requires_grad_(False)
    ours(x).sum().backward()
    assert ours[0].bias.grad is None
    assert original(ours[0]).grad is not None


# ---- when it iterates --------------------------------------------------------------------------


def test_it_iterates_once_per_update():
    ours = spectral_norm(mlp())
    optimiser = torch.optim.Adam(ours.parameters())
    count, x = Iterations(ours[2]), torch.randn(4, 6)
    for step in range(3):
        optimiser.zero_grad()
        loss = ours(x).sum() - ours(x + 1).sum()
        with torch.no_grad():
            ours(x)
        _ = ours[2].weight
        # later the generator's step, after the update, has iterated already
        assert count() == (1 if step == 0 else 0)
        loss.backward()
        optimiser.step()
        ours(x)  # the generator's step
        assert count() == 1
        ours.eval()(x)
        ours.train()
        assert count() == 0


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_every_forward_iterates_in_each(kind):
    _, ours, x = pair(kind)
    count = Iterations(ours)
    for _ in range(3):
        ours(x)
        assert count() == 1
    spectral_norm(ours)  # and by default once per update again
    ours(x)
    count()
    ours(x)
    assert count() == 0


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_a_backward_pass_is_followed_by_an_iteration(kind):
    """Optimisers that write through `.data` leave no other trace."""
    _, ours, x = pair(kind, every_forward=False)
    count = Iterations(ours)
    for _ in range(3):
        y = ours(x)
        ours(x)
        assert count() == 1
        y.sum().backward()
        original(ours).data.mul_(1.1)
    with torch.no_grad():
        ours(x)
    assert count() == 1


def test_a_backward_pass_under_autocast_is_followed_by_an_iteration():
    ours = spectral_norm(nn.Linear(6, 4))
    count = Iterations(ours)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(torch.randn(3, 6))
            ours(torch.randn(3, 6))
        assert count() == 1
        y.sum().backward()


def rescaled(layer):
    with torch.no_grad():
        original(layer).mul_(7)


def other_data(layer):
    original(layer).data = 7 * original(layer).detach()


def assigned(layer):
    layer.weight = 7 * original(layer).detach()


def loaded(layer, **options):
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["parametrizations.weight.original"] *= 7
    layer.load_state_dict(state, **options)


def reassigned(layer):
    loaded(layer, assign=True)


def replaced(layer):
    # in the same memory, at the same version
    weight = nn.Parameter(original(layer).data.mul_(7))
    with torch.no_grad():
        while weight._version < original(layer)._version:
            weight.mul_(1)
    layer.parametrizations.weight.original = weight


CHANGES = [rescaled, other_data, assigned, loaded, reassigned, replaced]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_nothing_stale_is_used(kind, change):
    _, ours, x = pair(kind, every_forward=False)
    ours.bias.data.zero_()
    for _ in range(100):
        original(ours).data.mul_(1)
        y = ours(x)
        y.sum().backward()
    y = ours(x)
    change(ours)
    # seven times the weight has seven times the sigma
    assert_close(ours(x), y, rtol=1e-5, atol=1e-7)


def test_loaded_singular_vectors_are_used():
    ours = spectral_norm(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    ours(x)
    state = ours.state_dict()
    state |= {"parametrizations.weight.0._u": torch.eye(4)[0]}
    state |= {"parametrizations.weight.0._v": torch.eye(6)[0]}
    ours.load_state_dict(state)
    theirs = torchs(nn.Linear(6, 4))
    theirs.load_state_dict(state)
    assert_close(ours(x), theirs(x))


def test_another_dtype_is_iterated_anew():
    ours = spectral_norm(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    y = ours(x)
    assert ours.double()(x.double()).dtype == torch.float64
    assert_close(ours(x.double()).float(), y, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed 2d"])
def test_a_copy_is_independent(kind):
    _, ours, x = pair(kind, every_forward=False)
    ours(x).sum().backward()
    ours(x)
    twin = copy.deepcopy(ours)
    count, vectors = Iterations(ours), singular_vectors(ours)
    theirs = torchs(LAYERS[kind][0]().double())
    theirs.load_state_dict(twin.state_dict())
    assert_close(twin(x), theirs(x))
    rescaled(twin)
    twin(x).sum().backward()
    twin(x)
    assert count() == 0
    ours(x)
    assert count() == 0  # neither did the copy's backward pass touch what ours remembers
    assert_close(singular_vectors(ours), vectors, rtol=0.0, atol=0.0)


def test_inference_mode_leaves_nothing_that_training_could_stumble_over():
    ours = spectral_norm(nn.Linear(6, 4))
    x = torch.randn(3, 6)
    with torch.inference_mode():
        y = ours(x)
    assert_close(ours(x), y, rtol=0.2, atol=0.2)
    ours(x).sum().backward()
    assert original(ours).grad is not None


def test_checkpointing_recomputes_what_was():
    ours = spectral_norm(nn.Linear(6, 4)).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    count = Iterations(ours)
    found = gradients(ours, x, ours(x).square().sum())
    count()
    ours(x)  # iterates; a checkpoint repeats this pass
    state = copy.deepcopy(ours)
    y = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    checkpointed = gradients(ours, x, y.square().sum())
    assert count() == 1
    expected = gradients(state.eval(), x, state(x).square().sum())
    assert_close(checkpointed, expected)
    assert len(found) == len(expected)


# ---- states ------------------------------------------------------------------------------------


@each_layer
def test_state_dicts_are_torchs_both_ways(kind):
    make, _ = LAYERS[kind]
    theirs, ours = torchs(make()), spectral_norm(make())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for source, target in ((theirs, ours), (ours, theirs)):
        assert not any(target.load_state_dict(source.state_dict(), strict=True))
        assert_close(target.state_dict(), source.state_dict(), rtol=0.0, atol=0.0)
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]


def test_an_optimiser_made_before_goes_on():
    network = mlp()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    spectral_norm(network)
    before = original(network[0]).clone()
    network(torch.randn(3, 6)).sum().backward()
    optimiser.step()
    assert not torch.equal(original(network[0]), before)


def test_removal_leaves_an_ordinary_layer():
    ours = spectral_norm(nn.Linear(6, 4)).eval()
    x = torch.randn(3, 6)
    y = ours(x)
    parametrize.remove_parametrizations(ours, "weight")
    assert type(ours) is nn.Linear
    assert_close(ours(x), y)


# ---- once --------------------------------------------------------------------------------------


def test_it_returns_the_network_and_norms_all_layers():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Sequential(nn.Linear(8, 1))
    )
    assert spectral_norm(network) is network
    assert parametrize.is_parametrized(network[0], "weight")
    assert parametrize.is_parametrized(network[3][0], "weight")
    assert not parametrize.is_parametrized(network[1])


def test_it_norms_once():
    network = spectral_norm(spectral_norm(mlp()))
    assert [len(network[i].parametrizations.weight) for i in (0, 2, 4)] == [1, 1, 1]
    assert len(network.state_dict()) == 3 * 3 + 2


def test_what_torch_has_normed_keeps_its_state_and_gets_the_fused_pass():
    theirs = torchs_on(mlp())
    state = copy.deepcopy(theirs.state_dict())
    before = copy.deepcopy(theirs)
    ours = spectral_norm(theirs)
    assert_close(ours.state_dict(), state, rtol=0.0, atol=0.0)
    assert ours(torch.randn(3, 6)).grad_fn.name() == "_DividedOutputBackward"
    # a copy that was made before is torch's still
    assert before(torch.randn(3, 6)).grad_fn.name() == "AddmmBackward0"
    count = Iterations(before[0])
    before(torch.randn(3, 6))
    before(torch.randn(3, 6))
    assert count() == 2


def test_a_shared_layer_is_normed_once():
    layer = nn.Linear(4, 4)
    network = spectral_norm(nn.ModuleList([nn.Sequential(layer), nn.Sequential(layer)]))
    spectral_norm(nn.Sequential(layer))
    assert len(layer.parametrizations.weight) == 1
    assert network[0][0] is network[1][0]


def test_a_layer_with_a_forward_pass_of_its_own_keeps_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    ours, x = spectral_norm(Doubled(6, 4)), torch.randn(3, 6)
    assert_close(ours(x), 2 * nn.functional.linear(x, ours.weight, ours.bias))
    count = Iterations(ours)
    ours(x)
    assert count() == 0


def test_attention_uses_its_normed_output_layer():
    attention = spectral_norm(nn.MultiheadAttention(4, 2, batch_first=True)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    attention(x, x, x)[0].sum().backward()
    assert original(attention.out_proj).grad is not None


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nn.utils.spectral_norm, r"layer '1\.0' has the legacy .*remove_spectral_norm\(layer\)\."),
        (
            lambda layer: nn.utils.parametrizations.weight_norm(layer),
            r"weight of layer '1\.0' is parametrised already, by _WeightNorm\. Remove",
        ),
        (
            lambda layer: nn.utils.parametrizations.orthogonal(torchs(layer)),
            r"layer '1\.0' is parametrised already, by _SpectralNorm, _Orthogonal\.",
        ),
        (
            lambda layer: prune.random_unstructured(layer, "weight", 0.5),
            r"weight of layer '1\.0' is no parameter; something computes it \(weight_norm, pr",
        ),
        (lambda _: nn.LazyLinear(3), r"layer '1\.0' is lazy and has no weight yet\. Run a batch"),
    ],
)
def test_what_it_refuses_it_leaves_as_it_was(change, message):
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(change(nn.Linear(3, 3))))
    with pytest.raises(ValueError, match=message):
        spectral_norm(network)
    assert not parametrize.is_parametrized(network[0])


def test_a_layer_by_itself_has_no_path():
    with pytest.raises(ValueError, match="spectral_norm: the network is lazy"):
        spectral_norm(nn.LazyLinear(3))


@pytest.mark.parametrize("network", [nn.ReLU(), nn.Sequential(), nn.BatchNorm1d(3)])
def test_a_network_without_a_weight_is_refused(network):
    with pytest.raises(
        ValueError, match=f"no layer with a weight in this {type(network).__name__}"
    ):
        spectral_norm(network)


def test_a_lazy_layer_that_has_seen_a_batch():
    network = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    network(torch.randn(2, 5))
    network = spectral_norm(network)
    assert network(torch.randn(2, 5)).grad_fn is not None
    assert len(network[0].parametrizations.weight) == 1


# ---- the iteration -----------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
def test_iterate_finds_the_largest_singular_value(stack):
    weight = torch.randn(*stack, 5, 7, dtype=torch.float64)
    u, v = torch.randn(*stack, 5, dtype=torch.float64), torch.randn(*stack, 7, dtype=torch.float64)
    sigmas = []
    for _ in range(500):
        u, v, sigma = iterate(weight, u, v)
        sigmas.append(sigma)
    assert u.shape == (*stack, 5)
    assert v.shape == (*stack, 7)
    assert_close(sigma, torch.linalg.matrix_norm(weight, 2), rtol=1e-8, atol=0.0)
    assert all(bool((after >= before - 1e-12).all()) for before, after in pairwise(sigmas))


def test_iterate_of_a_stack_is_one_by_one():
    weight, u, v = torch.randn(4, 5, 7), torch.randn(4, 5), torch.randn(4, 7)
    expected = [iterate(*each) for each in zip(weight, u, v, strict=True)]
    for found, one in zip(iterate(weight, u, v), zip(*expected, strict=True), strict=True):
        assert_close(found, torch.stack(one))


def test_iterate_on_a_weight_of_zero():
    found = iterate(torch.zeros(5, 7), torch.ones(5), torch.ones(7))
    assert all(bool((each == 0).all()) for each in found)


def test_the_gradient_of_sigma_is_u_v():
    weight = torch.randn(2, 5, 7, requires_grad=True)
    u, v, sigma = iterate(weight, torch.randn(2, 5), torch.randn(2, 7))
    assert not u.requires_grad
    assert not v.requires_grad
    sigma.sum().backward()
    assert_close(weight.grad, u[..., :, None] * v[..., None, :])


def test_sigma_is_computed_in_float32_under_autocast():
    args = torch.randn(20, 30), torch.randn(20), torch.randn(30)
    expected = iterate(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(iterate(*args), expected, rtol=0.0, atol=0.0)


# ---- under other machinery ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(kind, training):
    theirs, ours, x = pair(kind, torch.float32, every_forward=False)
    for network in (theirs, ours):
        network.train(training)
    expected = theirs(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    # the singular vectors went through no half precision
    assert_close(singular_vectors(ours), singular_vectors(theirs), rtol=1e-5, atol=1e-6)
    found = gradients(ours, x, y.float().square().sum())
    assert_close(found, gradients(theirs, x, expected.square().sum()), rtol=0.1, atol=0.1)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 2, 3),
        nn.Flatten(),
        nn.Linear(50, 4),
        nn.ReLU(),
        nn.Linear(4, 1, bias=False),
    )


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_compiled_it_is_one_graph_that_iterates_as_torch_does(training, autocast):
    ours = spectral_norm(cnn(), every_forward=True).train(training)
    twin = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 5, 5, requires_grad=True)
    tolerance = 3e-2 if autocast else 1e-5
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, expected = compiled(x), twin(x)
        assert y.dtype == expected.dtype
        assert_close(y, expected, rtol=tolerance, atol=tolerance)
        found = gradients(ours, x, y.float().square().sum())
        expected = gradients(twin, x, expected.float().square().sum())
        assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert_close(ours.state_dict(), twin.state_dict())


@pytest.mark.usefixtures("dynamo")
def test_compiled_and_eager_passes_may_alternate():
    ours, x = spectral_norm(mlp()), torch.randn(3, 6)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    theirs = torchs_on(mlp())
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):
        assert_close(compiled(x), theirs(x))
        assert_close(ours(x), theirs(x))


def stacked(number=3, make=mlp):
    networks = [spectral_norm(make()) for _ in range(number)]
    parameters, buffers = torch.func.stack_module_state(networks)

    def call(parameters, buffers, x):
        return torch.func.functional_call(networks[0], (parameters, buffers), (x,))

    return networks, parameters, buffers, call


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (3, 6)), (cnn, (3, 2, 5, 5))])
def test_networks_of_stacked_parameters(make, shape, compiled):
    networks, parameters, buffers, call = stacked(make=make)
    before = {name: value.clone() for name, value in buffers.items()}
    x = torch.randn(shape)
    vmapped = torch.vmap(call, in_dims=(0, 0, None))
    if compiled:
        vmapped = torch.compile(vmapped, fullgraph=True, backend="aot_eager")
    y = vmapped(parameters, buffers, x)
    # pure: nothing has iterated, although all networks are in training mode
    assert_close(buffers, before, rtol=0.0, atol=0.0)
    expected = torch.stack([network.eval()(x) for network in networks])
    assert_close(y, expected)
    names = list(parameters)
    found = torch.autograd.grad(y.square().sum(), [parameters[n] for n in names])
    for i, network in enumerate(networks):
        loss = network(x).square().sum()
        one = torch.autograd.grad(loss, [dict(network.named_parameters())[n] for n in names])
        assert_close(tuple(each[i] for each in found), one, rtol=1e-4, atol=1e-5)


def test_a_stack_is_trained_as_its_networks_are():
    """Iterating by hand and then a vmapped pass is what each network does by itself."""
    networks, parameters, buffers, call = stacked()
    x = torch.randn(3, 6)
    for i in (0, 2, 4):
        stem = f"{i}.parametrizations.weight"
        u, v = buffers[f"{stem}.0._u"], buffers[f"{stem}.0._v"]
        new_u, new_v, _ = iterate(parameters[f"{stem}.original"].detach(), u, v)
        u.copy_(new_u)
        v.copy_(new_v)
    y = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    assert_close(y, torch.stack([network(x) for network in networks]))
    for name, value in buffers.items():
        assert_close(value, torch.stack([dict(n.named_buffers())[name] for n in networks]))


def test_fake_tensors_and_the_meta_device():
    with torch._subclasses.FakeTensorMode():
        ours = spectral_norm(cnn())
        assert ours(torch.randn(3, 2, 5, 5)).shape == (3, 1)
    ours = spectral_norm(cnn()).to("meta")
    assert ours(torch.randn(3, 2, 5, 5, device="meta")).shape == (3, 1)


def test_functional_call_and_torch_func_grad():
    theirs, ours = mlps()
    x = torch.randn(3, 6, dtype=torch.float64)
    parameters = {k: v.detach() + 0.1 for k, v in ours.named_parameters()}

    def loss(network, parameters):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    assert_close(loss(ours, parameters), loss(theirs, parameters))
    for network in (theirs, ours):
        network.eval()
    gradient = torch.func.grad(lambda p: loss(ours, p))(parameters)
    assert_close(gradient, torch.func.grad(lambda p: loss(theirs, p))(parameters))


def test_export():
    ours = spectral_norm(cnn()).eval()
    x = torch.randn(3, 2, 5, 5)
    assert_close(torch.export.export(ours, (x,)).module()(x), ours(x))


DISTRIBUTED = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from factordisc.regularisers import spectral_norm

dist.init_process_group("gloo")
torch.manual_seed(0)
network = spectral_norm(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)))
batches = torch.randn(4, 2, 8, 6)
ddp = DistributedDataParallel(network)
optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
for batch in batches:
    optimiser.zero_grad()
    ddp(batch[dist.get_rank()]).sigmoid().mean().backward()
    optimiser.step()
torch.save(network.state_dict(), f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.barrier()
os._exit(0)  # gloo may abort while its threads are torn down
"""


def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_close(one, other, rtol=0.0, atol=0.0)
    torch.manual_seed(0)
    network = spectral_norm(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)))
    batches = torch.randn(4, 2, 8, 6)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for batch in batches:
        optimiser.zero_grad()
        network(batch.flatten(0, 1)).sigmoid().mean().backward()
        optimiser.step()
    assert_close(one, network.state_dict(), rtol=1e-4, atol=1e-5)
