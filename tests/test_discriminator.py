import re

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from factordisc import (
    Density,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Logistic,
    Partition,
    Ratio,
    independent,
    shared,
)

N = 5
PARTS = Partition({"a": 2, "b": 3})
FLAT = Factorisation.flat(["a", "b"])
WIDTHS = {"a": 2, "b": 3, "p_dependency": 5, "q_dependency": 5}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def linears(**others):
    return {name: nn.Linear(width, 1) for name, width in WIDTHS.items()} | others


def make(partition=PARTS, factorisation=FLAT, networks=None, **options):
    return FactorisedDiscriminator(partition, factorisation, networks or linears(), **options)


def with_a(network, **options):
    """The flat form whose network of marginal "a" is the one under test."""
    return make(networks=linears(a=network), **options)


class Returns(nn.Module):
    """Turns its first input's rows into an output of any kind."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def count_calls(network):
    calls = []
    network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


# --- construction ---


def test_both_constructors_give_equal_results():
    n = linears()
    flat = FactorisedDiscriminator(
        PARTS,
        marginals={"a": n["a"], "b": n["b"]},
        p_dependency=n["p_dependency"],
        q_dependency=n["q_dependency"],
    )
    x = torch.randn(N, 5)
    a, b = x[:, :2], x[:, 2:]
    expected = n["a"](a) + n["b"](b) + n["p_dependency"](x) - n["q_dependency"](x)
    assert_close(flat(x), expected[:, 0])
    assert_close(make(networks=n)(x), expected[:, 0])
    assert flat.factorisation == FLAT


def test_assumptions_of_the_flat_form_remove_terms():
    x = torch.randn(N, 5)
    b, p, q = nn.Linear(3, 1), nn.Linear(5, 1), nn.Linear(5, 1)
    d = FactorisedDiscriminator(
        PARTS, marginals={"b": b}, p_dependency=p, q_dependency=q, assuming=[shared("a")]
    )
    assert_close(d(x), (b(x[:, 2:]) + p(x) - q(x))[:, 0])


class LogRatio(nn.Module):
    """The exact log ratio of one term, of Gaussians with zero mean."""

    def __init__(self, term, covariances):
        super().__init__()
        self.columns = {part: i for i, part in enumerate(term.parts)}
        self.term, self.covariances = term, covariances

    def side(self, densities, x):
        total = 0.0
        for density in densities:
            of_x = [self.columns[part] for part in density.parts]
            of_all = ["abc".index(part) for part in density.parts]
            covariance = self.covariances[density.source][of_all][:, of_all]
            normal = MultivariateNormal(torch.zeros(len(of_x)), covariance)
            total = total + normal.log_prob(x[:, of_x])
        return total

    def forward(self, x):
        return self.side(self.term.numerator, x) - self.side(self.term.denominator, x)


def gaussian(source):
    root = torch.randn(3, 3)
    covariance = root @ root.T + torch.eye(3)
    if source == "q":
        covariance[0, 1:] = covariance[1:, 0] = 0.0
    return covariance


@pytest.mark.parametrize("assuming", [[], [independent("a", ("b", "c"), under="q")]])
@pytest.mark.parametrize("form", [Factorisation.flat, Factorisation.joint])
def test_exact_terms_give_the_exact_log_ratio(form, assuming):
    covariances = {source: gaussian(source) for source in ("p", "q")}
    factorisation = form(["a", "b", "c"], assuming=assuming)
    networks = {term.name: LogRatio(term, covariances) for term in factorisation.terms}
    d = make(Partition.steps(3, names=["a", "b", "c"]), factorisation, networks)
    x = 3 * torch.randn(50, 3)
    p, q = (MultivariateNormal(torch.zeros(3), covariances[s]).log_prob(x) for s in "pq")
    assert_close(d(x), p - q, rtol=0.0, atol=1e-10)


def test_every_missing_network_is_named_with_what_would_remove_its_term():
    remedies = {
        "a": "assuming=[shared('a')]",
        "b": "assuming=[shared('b')]",
        "p_dependency": "assuming=[independent('a', 'b', under='p')]",
        "q_dependency": "assuming=[independent('a', 'b', under='q')]",
    }
    for name, remedy in remedies.items():
        networks = linears()
        del networks[name]
        with pytest.raises(ValueError, match=re.escape(f"Term {name!r} (log")) as error:
            make(networks=networks)
        assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"networks": linears(c=nn.Linear(1, 1))}, ValueError, "network for 'c', but no such"),
        ({"partition": Partition({"a": 2, "c": 3})}, ValueError, r"parts \('a', 'c'\), but"),
        ({"partition": "abc"}, TypeError, "`partition` expects a Partition, but got 'abc'"),
        ({"networks": linears(a=torch.sum)}, TypeError, "network of term 'a' is an nn.Module"),
        ({"assuming": [shared("a")]}, ValueError, "With a `factorisation`, pass the networks as"),
        ({"marginals": {}}, ValueError, "With a `factorisation`, pass the networks as networks="),
        ({"factorisation": None}, ValueError, "`networks` belong to a `factorisation`"),
        ({"logit": 3}, TypeError, "`logit` of term 'a' is a callable, but got 3"),
        ({"logit": {"c": abs}}, ValueError, "`logit` names term 'c', but the terms are"),
        ({"inputs": {"c": abs}}, ValueError, "`inputs` names term 'c', but the terms are"),
        ({"logit": nn.Linear(1, 1)}, TypeError, "a module with parameters.*part of the network"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_an_objective_that_is_no_ratio_is_refused():
    class Hinge:
        def loss(self, numerator_output, denominator_output):
            return (1 - numerator_output).relu().mean() + (1 + denominator_output).relu().mean()

    with pytest.raises(TypeError, match="Hinge and Wasserstein critics do not estimate a density"):
        make(objective=Hinge())


def test_an_objective_is_an_object_not_a_class():
    with pytest.raises(TypeError, match="`objective` expects an object with loss"):
        make(objective=Logistic)


def test_the_objective_is_applied_to_every_term_before_the_sum():
    class Doubled:
        def loss(self, numerator_output, denominator_output):
            return (denominator_output - numerator_output).mean()

        def log_ratio(self, output):
            return 2 * output + 1

    n, x = linears(), torch.randn(N, 5)
    d = make(networks=n, objective=Doubled())
    assert_close(d(x), 2 * make(networks=n)(x) + 2)  # 1 + 1 + 1 - 1
    assert_close(d.terms(x)["a"], 2 * n["a"](x[:, :2])[:, 0] + 1)
    assert_close(d.term("a", x[:, :2]), d.terms(x)["a"])
    # the criterion costs what the objective says, and reports what it says of the ratio
    loss, report = DiscriminatorLoss(d)(x, x + 1, report=True)
    rows = DiscriminatorLoss(d).rows(x, x + 1)["a"]
    above, below = (n["a"](side)[:, 0].mean() for side in rows.sides)
    assert_close(report["a"].loss, (below - above).detach())
    assert_close(report["a"].numerator, (2 * above + 1).detach())
    assert_close(report["a"].denominator, (2 * below + 1).detach())
    assert_close(loss, sum(term.loss for term in report.values()))


# --- outputs, logit= and inputs= ---


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 1, 1, 1)])
def test_one_logit_per_observation_is_accepted(shape):
    d, x = with_a(Returns(lambda a: a.sum(1).reshape(shape))), torch.randn(N, 5)
    assert_close(d.terms(x)["a"], x[:, :2].sum(1))
    assert d(x).shape == (N,)


@pytest.mark.parametrize("shape", [(), (1,), (1, N), (N, 3), (N, 1, 1), (N, 1, 3, 3), (N + 1, 1)])
def test_other_shapes_are_refused_with_what_to_pass(shape):
    d = with_a(Returns(lambda a: a.new_zeros(shape)))
    says = re.escape(f"returned {shape}. Pass logit={{'a': lambda y: y.flatten(1).mean(1)}}")
    with pytest.raises(ValueError, match=says):
        d(torch.randn(N, 5))


def test_of_two_classes_the_difference_is_advised():
    d = with_a(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"\(5, 2\).*logit=\{'a': lambda y: y\[:, 1\] - y\[:, 0\]\}"
    ):
        d(torch.randn(N, 5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_outputs_that_are_no_real_numbers_are_refused(dtype):
    d = with_a(Returns(lambda a: torch.ones(len(a)).to(dtype)))
    with pytest.raises(ValueError, match=rf"a real number, but returned {dtype}"):
        d(torch.randn(N, 5))


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.LogSigmoid(), nn.Softmax(1)])
def test_a_network_that_gives_probabilities_is_refused(last):
    network = nn.Sequential(nn.Linear(2, 1), last)
    with pytest.raises(ValueError, match=r"term 'a' ends in .*gives no logit.*logit=\{'a': torch"):
        with_a(network)
    undone = with_a(nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()), logit={"a": torch.logit})
    x = torch.randn(N, 5)
    assert_close(undone.terms(x)["a"], undone.networks["a"][0](x[:, :2])[:, 0])


def test_inputs_keep_the_number_of_rows():
    d = with_a(nn.Linear(2, 1), inputs={"a": lambda a: a[:1]})
    with pytest.raises(ValueError, match=r"`inputs` of term 'a' keeps the 5 rows .*\(1, 2\)"):
        d(torch.randn(N, 5))


def test_a_dependency_among_the_marginals_is_refused():
    one = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="`marginals` names 'p_dependency', which is no part"):
        FactorisedDiscriminator(
            PARTS,
            marginals={"a": one, "b": nn.Linear(3, 1), "p_dependency": nn.Linear(5, 1)},
            p_dependency=nn.Linear(5, 1),
            q_dependency=nn.Linear(5, 1),
        )


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one, two)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(RuntimeError("no"), RuntimeError), (KeyError("no"), KeyError), (Odd(1, 2), RuntimeError)],
)
def test_what_happens_in_a_network_is_told_with_its_term(raised, kind):
    def fail(_):
        raise raised

    d = with_a(Returns(fail))
    with pytest.raises(
        kind, match=r"In the network of term 'a', on \(5, 2\) float64 cpu: "
    ) as error:
        d(torch.randn(N, 5))
    assert error.value.__cause__ is raised
    with pytest.raises(
        RuntimeError, match=r"term 'b', on \(5, 3\) float64 cpu: mat1 and mat2 shapes"
    ):
        make(networks=linears(b=nn.Linear(4, 1)))(torch.randn(N, 5))


def test_being_out_of_memory_is_told_as_it_is():
    def fail(_):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        with_a(Returns(fail))(torch.randn(N, 5))


def test_other_kinds_are_refused_with_what_to_pass():
    d = with_a(Returns(lambda a: (a.sum(1), a)))
    says = re.escape("returned a tuple. Pass logit={'a': lambda output: output[0]}")
    with pytest.raises(TypeError, match=says):
        d(torch.randn(N, 5))


def test_what_logit_returns_is_checked_too():
    d = with_a(Returns(lambda a: a), logit={"a": lambda y: y[:, :2]})
    with pytest.raises(ValueError, match=r"returned \(5, 2\) after `logit`"):
        d(torch.randn(N, 5))


def test_logit_for_all_terms_and_for_some():
    x, networks = torch.randn(N, 5), {name: nn.Identity() for name in WIDTHS}
    d = make(networks=networks, logit=lambda y: y.sum(1))
    assert_close(d(x), x.sum(1))  # a + b + (a + b) - (a + b)
    d = with_a(nn.Identity(), logit={"a": lambda y: y.sum(1)})
    assert_close(d.terms(x)["a"], x[:, :2].sum(1))


def test_inputs_may_return_a_tensor_or_a_tuple():
    x = torch.randn(N, 5)
    d = with_a(nn.Linear(3, 1), inputs={"a": lambda a: torch.cat([a, a.sum(1, True)], 1)})
    assert d(x).shape == (N,)
    d = with_a(
        nn.Bilinear(1, 1, 1),
        inputs={"a": lambda a: (a[:, :1], a[:, 1:]), "b": lambda b: 2 * b},
    )
    assert_close(d.terms(x)["a"], d.networks["a"](x[:, :1], x[:, 1:2])[:, 0])
    assert_close(d.terms(x)["b"], d.networks["b"](2 * x[:, 2:])[:, 0])


def test_what_inputs_returns_is_checked():
    d = with_a(nn.Linear(2, 1), inputs={"a": lambda a: [a]})
    with pytest.raises(TypeError, match="'a'"):
        d(torch.randn(N, 5))


# --- foreign networks ---

IMAGES = Partition({"a": 1, "b": 3})


def conv(channels, *last):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), *last
    )


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_dcgan_with_batch_and_spectral_norm(norm):
    def dcgan(channels):
        return conv(channels, norm(nn.Conv2d(4, 1, 4)))  # (N, 1, 1, 1)

    widths = {"a": 1, "b": 3, "p_dependency": 4, "q_dependency": 4}
    networks = {name: dcgan(width) for name, width in widths.items()}
    d, x = make(IMAGES, FLAT, networks), torch.randn(N, 4, 8, 8)
    d(x).sum().backward()
    assert all(bool((p.grad != 0).any()) for n, p in d.named_parameters() if "0.bias" not in n)
    d.eval()
    assert_close(d.terms(x)["b"], networks["b"](x[:, 1:])[:, 0, 0, 0])
    other = make(IMAGES, FLAT, {name: dcgan(width) for name, width in widths.items()}).eval()
    other.load_state_dict(d.state_dict())
    assert_close(other(x), d(x), rtol=0.0, atol=0.0)


def test_patchgan_needs_logit():
    def patchgan(channels):
        return conv(channels, nn.Conv2d(4, 1, 2))  # (N, 1, 3, 3)

    widths = {"a": 1, "b": 3, "p_dependency": 4, "q_dependency": 4}
    networks = {name: patchgan(width).eval() for name, width in widths.items()}
    x = torch.randn(N, 4, 8, 8)
    with pytest.raises(ValueError, match=r"\(5, 1, 3, 3\).*Pass logit=.*mean over patches"):
        make(IMAGES, FLAT, networks)(x)
    d = make(IMAGES, FLAT, networks, logit=lambda y: y.flatten(1).mean(1))
    assert_close(d.terms(x)["a"], networks["a"](x[:, :1]).mean((1, 2, 3)))


def test_logit_and_features_need_logit():
    d = with_a(Returns(lambda a: (a.sum(1), [a])), logit={"a": lambda output: output[0]})
    x = torch.randn(N, 5)
    assert_close(d.terms(x)["a"], x[:, :2].sum(1))


def test_fields_are_positional_arguments_in_the_order_of_the_partition():
    partition = Partition.fields("b", "a")
    networks = linears(p_dependency=nn.Bilinear(3, 2, 1), q_dependency=nn.Bilinear(3, 2, 1))
    d = make(partition, FLAT, networks)
    b, a = torch.randn(N, 3), torch.randn(N, 2)
    n = networks
    expected = n["a"](a) + n["b"](b) + n["p_dependency"](b, a) - n["q_dependency"](b, a)
    assert_close(d((b, a)), expected[:, 0])
    assert_close(d({"a": a, "b": b}), expected[:, 0])
    assert_close(d.term("p_dependency", (b, a)), n["p_dependency"](b, a)[:, 0])


def test_integer_parts():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 1)

        def forward(self, *words):
            return sum(self.embedding(w).flatten(1).sum(1) for w in words)

    partition = Partition.fields("a", "b")
    d = make(partition, FLAT, {name: Words() for name in WIDTHS})
    a, b = torch.randint(10, (N, 3)), torch.randint(10, (N,))
    assert_close(d.terms((a, b))["a"], d.networks["a"].embedding.weight[a, 0].sum(1))
    DiscriminatorLoss(d)((a, b), (a, b)).backward()
    assert all(bool((p.grad != 0).any()) for p in d.parameters())


# --- a network owns what it is called with ---


def in_place():
    return nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Linear(2, 1))


@pytest.mark.parametrize("separate", [False, True])
def test_networks_that_work_in_place_change_nothing_that_others_see(separate):
    d, x = with_a(in_place()), torch.randn(N, 5)
    before = x.clone()
    assert_close(d(x) - d(x), torch.zeros(N))
    expected = d.networks["a"](x[:, :2].clone())[:, 0]
    assert_close(d.terms(x)["a"], expected)
    assert_close(d.term("a", x[:, :2]), expected)
    leaf = x.clone().requires_grad_()
    d(leaf * 1).sum().backward()  # a fake that carries gradients

    def penalty(term, rows):
        return term(rows.numerator).mean()

    criterion = DiscriminatorLoss(d, penalties={"a": penalty}, separate_batches=separate)
    criterion(x, x).backward()
    rows = criterion.rows(x, x)
    kept = rows["a"].numerator.clone()
    assert_close(criterion.cost(rows), criterion.cost(rows))
    assert_close(rows["a"].numerator, kept, rtol=0.0, atol=0.0)
    assert_close(x, before, rtol=0.0, atol=0.0)


def test_only_a_network_that_may_overwrite_its_input_gets_a_copy():
    late = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 1))
    viewed = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(2, 1))
    x, seen = torch.randn(N, 2), []
    for network, copied in ((late, False), (viewed, True), (in_place(), True)):
        network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].data_ptr()))
        before = x.clone()
        with_a(network).term("a", x)
        assert (seen[-1] != x.data_ptr()) == copied
        assert_close(x, before, rtol=0.0, atol=0.0)


def test_a_change_in_place_that_nobody_announced_is_found():
    d, x = with_a(Returns(lambda a: a.mul_(2).sum(1))), torch.randn(N, 5)
    with pytest.raises(ValueError, match=r"term 'a' changes its input in place.*torch\.clone"):
        d(x)
    mended = with_a(Returns(lambda a: a.mul_(2).sum(1)), inputs={"a": torch.clone})
    assert_close(mended.terms(x)["a"], 2 * x[:, :2].sum(1))


def test_evaluation_works_in_inference_mode():
    d = make()
    with torch.inference_mode():
        x = torch.randn(N, 5)
        inside = d(x)
    assert_close(inside, d(x.clone()))


# --- shared networks ---


@pytest.mark.parametrize(("width", "calls"), [((2, 2), [2 * N]), ((2, 3), [N, N])])
def test_a_shared_network_is_called_once_where_shapes_agree(width, calls):
    network = Returns(lambda x: x.pow(2).sum(1))
    partition = Partition({"a": width[0], "b": width[1]})
    both = nn.Linear(sum(width), 1)
    networks = {"a": network, "b": network, "p_dependency": both, "q_dependency": both}
    d, x = make(partition, FLAT, networks), torch.randn(N, sum(width))
    counted, of_both = count_calls(network), count_calls(both)
    values = d.terms(x)
    assert (counted, of_both) == (calls, [2 * N])
    assert_close(values["a"], x[:, :2].pow(2).sum(1))
    assert_close(values["b"], x[:, 2:].pow(2).sum(1))
    assert_close(values["p_dependency"], both(x)[:, 0])
    assert_close(d(x), x.pow(2).sum(1))


def test_a_shared_network_is_called_apart_for_different_logits():
    network = nn.Identity()
    networks = {"a": network, "b": network, "p_dependency": network, "q_dependency": network}
    logit = {name: (lambda y, i=i: y.sum(1) * i) for i, name in enumerate(WIDTHS, 1)}
    d, x = make(Partition({"a": 2, "b": 2}), FLAT, networks, logit=logit), torch.randn(N, 4)
    assert_close(d.terms(x)["b"], 2 * x[:, 2:].sum(1))
    assert_close(d.terms(x)["q_dependency"], 4 * x.sum(1))


def test_a_shared_network_is_called_apart_for_integers_and_floats():
    seen = []

    def network(x):
        seen.append(x.dtype)
        return x.double().sum(1)

    partition, both = Partition.fields("a", "b"), Returns(lambda a, b: a.double().sum(1))
    shared_network = Returns(network)
    networks = {
        "a": shared_network,
        "b": shared_network,
        "p_dependency": both,
        "q_dependency": both,
    }
    make(partition, FLAT, networks)((torch.ones(N, 2, dtype=torch.int64), torch.randn(N, 2)))
    assert seen == [torch.int64, torch.float64]


def test_networks_without_parameters_load_their_own_state_dict():
    networks = {name: Returns(lambda x: x.sum(1)) for name in WIDTHS}
    d = make(networks=networks)
    assert d.load_state_dict(d.state_dict()).missing_keys == []
    one = make(networks=networks | {"a": nn.Linear(2, 1)})
    assert set(one.state_dict()) == {"networks.a.weight", "networks.a.bias"}
    one.load_state_dict(one.state_dict())


def test_a_shared_network_survives_its_state_dict():
    def build():
        one, both = nn.Linear(2, 1), nn.Linear(4, 1)
        networks = {"a": one, "b": one, "p_dependency": both, "q_dependency": both}
        return make(Partition({"a": 2, "b": 2}), FLAT, networks)

    d, other, x = build(), build(), torch.randn(N, 4)
    other.load_state_dict(d.state_dict())
    assert_close(other(x), d(x))


# --- values ---


def test_terms_are_unsigned_and_term_takes_their_own_rows():
    d, x = make(), torch.randn(N, 5)
    values = d.terms(x)
    assert list(values) == ["a", "b", "p_dependency", "q_dependency"]
    assert_close(values["q_dependency"], d.networks["q_dependency"](x)[:, 0])
    assert_close(d(x), values["a"] + values["b"] + values["p_dependency"] - values["q_dependency"])
    alone = torch.randn(3, 2)
    assert_close(d.term("a", alone), d.networks["a"](alone)[:, 0])
    with pytest.raises(ValueError, match="`name` names term 'c', but the terms are"):
        d.term("c", alone)
    with pytest.raises(ValueError, match=r"rows of term 'a'.*2 entries along dim 1.*\(3, 5\)"):
        d.term("a", torch.randn(3, 5))


def test_a_batch_that_does_not_fit_is_refused_before_any_network_sees_it():
    d = make()
    calls = [count_calls(network) for network in d.networks.values()]
    with pytest.raises(ValueError, match=r"expects 5 entries along dim 1, but got x with shape"):
        d(torch.randn(N, 6))
    assert calls == [[], [], [], []]


def test_terms_of_sign_zero_are_not_summed_and_not_called():
    joint = Ratio("joint", 1, [Density("p", ("a", "b"))], [Density("q", ("a", "b"))])
    check = Ratio("check", 0, [Density("p", ("a",))], [Density("q", ("a",))])
    networks = {"joint": nn.Linear(5, 1), "check": nn.Linear(2, 1)}
    d = make(PARTS, Factorisation(["a", "b"], [check, joint]), networks)
    calls, x = count_calls(networks["check"]), torch.randn(N, 5)
    assert_close(d(x), networks["joint"](x)[:, 0])
    assert calls == []
    assert_close(d.terms(x)["check"], networks["check"](x[:, :2])[:, 0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_sum_is_taken_in_float32_at_least(given, expected):
    # 2048 + 1 + 1 - 0 is 2048 in float16 and bfloat16, whichever way it is rounded.
    values = {"a": 2048.0, "b": 1.0, "p_dependency": 1.0, "q_dependency": 0.0}
    networks = {
        name: Returns(lambda x, v=v: torch.full((len(x), 1), v, dtype=given))
        for name, v in values.items()
    }
    d, x = make(networks=networks), torch.randn(N, 5)
    assert_close(d(x), torch.full((N,), 2050.0, dtype=expected))
    assert {value.dtype for value in d.terms(x).values()} == {expected}


# --- what a module is ---


def test_repr_holds_the_equation_and_parameter_counts():
    linear = nn.Linear(5, 1)
    text = repr(make(networks=linears(p_dependency=linear, q_dependency=linear)))
    for line in str(FLAT).splitlines():
        assert line in text
    assert "(a): 3 parameters, Linear(in_features=2" in text
    assert "(p_dependency): 6 parameters, Linear(in_features=5" in text
    assert "(q_dependency): the network of (p_dependency)" in text
    assert "13 parameters in all" in text  # 3 + 4 + 6


def test_networks_are_the_users_modules():
    networks = linears()
    d = make(networks=networks)
    assert all(d.networks[name] is network for name, network in networks.items())


def test_state_dict_names_terms_and_loads():
    d, other, x = make(), make(), torch.randn(N, 5)
    keys = {f"networks.{name}.{what}" for name in WIDTHS for what in ("weight", "bias")}
    assert set(d.state_dict()) == keys
    other.load_state_dict(d.state_dict())
    assert_close(other(x), d(x), rtol=0.0, atol=0.0)
    nested = DiscriminatorLoss(make())
    assert set(nested.state_dict()) == {f"discriminator.{key}" for key in keys}
    nested.load_state_dict(DiscriminatorLoss(d).state_dict())
    assert_close(nested.discriminator(x), d(x), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("wrap", [lambda d: d, DiscriminatorLoss, nn.Sequential])
def test_the_state_dict_of_another_factorisation_is_refused_by_terms(wrap):
    joint = make(PARTS, Factorisation.joint(["a", "b"]), {"joint": nn.Linear(5, 1)})
    says = r'Missing key.*networks\.a\.weight".*Unexpected key.*networks\.joint\.weight"'
    says = re.compile(says, re.DOTALL)
    with pytest.raises(RuntimeError, match=says):
        wrap(make()).load_state_dict(wrap(joint).state_dict())
    other = wrap(make())
    result = other.load_state_dict(wrap(joint).state_dict(), strict=False)
    assert len(result.missing_keys) == 8
    assert len(result.unexpected_keys) == 2
    with pytest.raises(RuntimeError, match=says):  # not strict was for that call only
        other.load_state_dict(wrap(joint).state_dict())


def test_strict_false_loads_the_terms_that_are_there():
    d, x = make(), torch.randn(N, 5)
    other = make()
    some = {key: value for key, value in d.state_dict().items() if ".a." in key}
    other.load_state_dict(some, strict=False)
    assert_close(other.terms(x)["a"], d.terms(x)["a"], rtol=0.0, atol=0.0)
