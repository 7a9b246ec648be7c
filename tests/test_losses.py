import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from factordisc import (
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    Logistic,
    Observations,
    Partition,
    generator_loss,
    shared,
)
from factordisc.losses import TermRows

PARTS = Partition({"a": 2, "b": 3})
WIDTHS = {"a": 2, "b": 3, "p_dependency": 5, "q_dependency": 5}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def make(network=lambda width: nn.Linear(width, 1)):
    networks = {name: network(width) for name, width in WIDTHS.items()}
    return FactorisedDiscriminator(PARTS, Factorisation.flat(["a", "b"]), networks)


def seeded():
    return DependencySampler(PARTS, rng=torch.Generator().manual_seed(1))


def drawn(d, real, fake):
    """The rows of every term, drawn as a criterion with the sampler `seeded` draws them."""
    sampler = seeded()
    sources = {"p": real, "q": fake}
    return {term.name: sampler.draw(term, sources) for term in d.factorisation.terms}


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def some_real():
    return Observations(joint=torch.randn(4, 5), a=torch.randn(16, 2), b=torch.randn(7, 3))


# --- the loss and its report ---


def test_loss_and_report_against_direct_computation():
    d, real, fake = make(), some_real(), torch.randn(8, 5)
    loss, report = DiscriminatorLoss(d, seeded())(real, fake, report=True)
    total = 0.0
    for name, (numerator, denominator) in drawn(d, real, fake).items():
        above = d.networks[name](numerator)[:, 0]
        below = d.networks[name](denominator)[:, 0]
        expected = (1 + (-above).exp()).log().mean() + (1 + below.exp()).log().mean()
        total = total + expected
        accuracy = ((above > 0).double().mean() + (below <= 0).double().mean()) / 2
        assert_close(report[name].loss, expected.detach())
        assert_close(report[name].accuracy, accuracy)
        assert_close(report[name].numerator, above.mean().detach())
        assert_close(report[name].denominator, below.mean().detach())
        columns = {"a": [0, 1], "b": [2, 3, 4]}.get(name, range(5))
        asked = d.networks[name](fake[:, columns])[:, 0].mean().detach()
        assert_close(report[name].generated, asked)
    assert list(report) == list(WIDTHS)
    assert_close(loss, total)
    assert_close(loss, sum(term.loss for term in report.values()))
    figures = [figure for term in report.values() for figure in term]
    assert all(figure.shape == () and not figure.requires_grad for figure in figures)
    assert_close(DiscriminatorLoss(d, seeded())(real, fake), loss)


def test_accuracy_weighs_both_classes_the_same():
    d = make(lambda width: nn.Linear(width, 1))
    for parameter in d.parameters():
        nn.init.constant_(parameter, 0.0)
    nn.init.constant_(d.networks["a"].bias, 1.0)  # "real" to every row
    _, report = DiscriminatorLoss(d)(some_real(), torch.randn(8, 5), report=True)
    assert [term.accuracy.item() for term in report.values()] == [0.5] * 4  # 16 rows against 8
    assert_close(report["a"].loss, softplus(torch.tensor(-1.0)) + softplus(torch.tensor(1.0)))


def test_a_plain_batch_is_complete_real_data():
    d, x, fake = make(), torch.randn(6, 5), torch.randn(8, 5)
    expected = DiscriminatorLoss(d, seeded())(Observations(joint=x), fake)
    assert_close(DiscriminatorLoss(d, seeded())(x, fake), expected)


def test_one_forward_pass_per_network_and_step():
    d, calls = make(), []
    for network in d.networks.values():
        network.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    DiscriminatorLoss(d)(some_real(), torch.randn(8, 5)).backward()
    assert calls == [16 + 8, 7 + 8, 4 + 4, 8 + 8]
    calls.clear()
    # a report says what the p-dependency makes of the generator's rows
    DiscriminatorLoss(d)(some_real(), torch.randn(8, 5), report=True)[0].backward()
    assert calls == [16 + 8, 7 + 8, 4 + 4 + 8, 8 + 8]


# --- where gradients go ---


@pytest.mark.parametrize("name", WIDTHS)
def test_the_loss_of_a_term_leaves_the_other_networks_alone(name):
    d = make()
    criterion = DiscriminatorLoss(d)
    rows = criterion.rows(some_real(), torch.randn(8, 5))
    criterion.cost({name: rows[name]}).backward()
    for key, gradient in gradients(d.networks).items():
        assert (gradient is not None) == key.startswith(name + ".")
        assert gradient is None or bool((gradient != 0).any())


@pytest.mark.parametrize("name", WIDTHS)
def test_the_sum_over_terms_mixes_no_gradients(name):
    """With the rows of another term changed, the gradient of a term stays as it was."""
    d, results = make(), []
    criterion = DiscriminatorLoss(d)
    rows = criterion.rows(some_real(), torch.randn(8, 5))
    for scale in (1.0, 3.0):
        changed = {
            n: r if n == name else TermRows((scale * r.numerator, r.denominator), r.weight)
            for n, r in rows.items()
        }
        d.zero_grad()
        criterion.cost(changed).backward()
        results.append(d.networks[name].weight.grad.clone())
    assert_close(results[0], results[1], rtol=0.0, atol=0.0)


def test_the_discriminator_loss_does_not_reach_the_generator():
    d, generator = make(), nn.Linear(3, 5)
    fake = generator(torch.randn(8, 3))
    DiscriminatorLoss(d)(Observations(a=torch.randn(4, 2)), fake).backward()
    assert all(gradient is None for gradient in gradients(generator).values())
    assert all(gradient is not None for gradient in gradients(d).values())


@pytest.mark.parametrize("kind", ["non-saturating", "minimax", "kl"])
@pytest.mark.parametrize("name", WIDTHS)
def test_the_generator_loss_reaches_the_generator_through_every_term(name, kind):
    d, generator = make(), nn.Linear(3, 5)
    for other, network in d.networks.items():
        if other != name:
            nn.init.zeros_(network.weight)
    generator_loss(d(generator(torch.randn(8, 3))), kind).backward()
    columns = {"a": [0, 1], "b": [2, 3, 4]}.get(name, range(5))
    reached = [bool((generator.weight.grad[column] != 0).all()) for column in range(5)]
    assert reached == [column in columns for column in range(5)]


def test_the_generators_step_leaves_no_gradient_in_the_discriminator():
    d, generator = make(), nn.Linear(3, 5)
    fake = generator(torch.randn(8, 3))
    generator_loss(d(fake)).backward(inputs=list(generator.parameters()))
    assert all(gradient is None for gradient in gradients(d).values())
    assert all(bool((gradient != 0).any()) for gradient in gradients(generator).values())


# --- generator_loss ---


@pytest.mark.parametrize(
    ("kind", "values", "slopes"),
    [
        ("non-saturating", [100.0, 0.0], [-1.0, 0.0]),
        ("minimax", [0.0, -100.0], [0.0, -1.0]),
        ("kl", [100.0, -100.0], [-1.0, -1.0]),
    ],
)
def test_generator_loss_at_extreme_logits_in_float32(kind, values, slopes):
    for log_ratio, value in zip([-100.0, 100.0], values, strict=True):
        loss = generator_loss(torch.full((4,), log_ratio, dtype=torch.float32), kind)
        assert_close(loss.item(), value, rtol=0.0, atol=1e-40)
    log_ratio = torch.tensor([-100.0, 100.0], dtype=torch.float32, requires_grad=True)
    generator_loss(log_ratio, kind).backward()
    expected = torch.tensor(slopes, dtype=torch.float32) / 2
    assert_close(log_ratio.grad, expected, rtol=0.0, atol=1e-40)


@pytest.mark.parametrize("kind", ["non-saturating", "minimax", "kl"])
def test_generator_loss_gradcheck_and_repeated_batch(kind):
    log_ratio = torch.randn(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: generator_loss(d, kind), (log_ratio,))
    assert_close(generator_loss(log_ratio.repeat(2), kind), generator_loss(log_ratio, kind))


def test_generator_loss_is_the_log_of_the_discriminators_probability():
    d = torch.randn(6)
    assert_close(generator_loss(d), -torch.sigmoid(d).log().mean())
    assert_close(generator_loss(d, "minimax"), (1 - torch.sigmoid(d)).log().mean())


def test_an_unknown_kind_is_answered_with_the_known():
    with pytest.raises(ValueError, match="'non-saturating', 'minimax' or 'kl', but got 'hinge'"):
        generator_loss(torch.zeros(2), "hinge")


# --- missing data ---


def test_a_term_without_data_costs_nothing_and_has_zero_gradients():
    d, real = make(), Observations(a=torch.randn(16, 2), b=torch.randn(7, 3))
    loss, report = DiscriminatorLoss(d)(real, torch.randn(8, 5), report=True)
    loss.backward()
    assert report["p_dependency"].loss == 0
    assert all(bool(figure.isnan()) for figure in report["p_dependency"][1:])
    for name in ("a", "b", "q_dependency"):
        assert all(bool(figure.isfinite()) for figure in report[name])
    for name, gradient in gradients(d.networks).items():
        assert bool((gradient == 0).all()) == name.startswith("p_dependency")
    assert_close(loss, sum(term.loss for term in report.values()))


def test_empty_batches_and_none_count_as_missing():
    real = Observations(joint=torch.randn(0, 5), a=torch.randn(4, 2), b=None)
    _, report = DiscriminatorLoss(make())(real, torch.randn(8, 5), report=True)
    assert {name for name in report if report[name].loss == 0} == {"b", "p_dependency"}


def test_conditional_generation_with_separate_fields():
    partition = Partition.fields("scene", "labels")
    factorisation = Factorisation.flat(["scene", "labels"], assuming=[shared("scene")])
    networks = {
        "labels": nn.Linear(2, 1),
        "p_dependency": nn.Bilinear(3, 2, 1),
        "q_dependency": nn.Bilinear(3, 2, 1),
    }
    d = FactorisedDiscriminator(partition, factorisation, networks)
    generator = nn.Linear(3, 2)
    scene = torch.randn(9, 3)
    real = Observations(joint=(torch.randn(4, 3), torch.randn(4, 2)), labels=torch.randn(6, 2))
    fake = (scene, generator(scene))
    loss, report = DiscriminatorLoss(d)(real, fake, report=True)
    loss.backward()
    assert list(report) == ["labels", "p_dependency", "q_dependency"]
    assert all(bool((gradient != 0).any()) for gradient in gradients(d).values())
    assert generator.weight.grad is None
    generator_loss(d(fake)).backward(inputs=list(generator.parameters()))
    assert bool((generator.weight.grad != 0).all())


# --- penalties ---


def gradient_penalty(term, rows):
    x = rows.numerator.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()


def test_a_gradient_penalty_against_its_closed_form_for_linear_networks():
    d, real, fake = make(), some_real(), torch.randn(8, 5)
    plain = DiscriminatorLoss(d, seeded())(real, fake)
    some = DiscriminatorLoss(d, seeded(), {"b": gradient_penalty})
    every = DiscriminatorLoss(d, seeded(), {"*": gradient_penalty, "a": lambda *_: torch.ones(())})
    cost = {name: (network.weight.norm() - 1) ** 2 for name, network in d.networks.items()}
    assert_close(some(real, fake), plain + cost["b"])
    expected = plain + 1 + cost["b"] + cost["p_dependency"] + cost["q_dependency"]
    loss, report = every(real, fake, report=True)
    assert_close(loss, expected)
    assert_close(sum(term.loss for term in report.values()), plain.detach())  # without penalties
    weight = d.networks["b"].weight
    (extra,) = torch.autograd.grad(some(real, fake) - plain, weight)
    assert_close(extra, 2 * (weight.norm() - 1) * weight / weight.norm())  # double backward


def test_the_three_stages_are_the_whole():
    d, real, fake = make(), some_real(), torch.randn(8, 5)
    penalties = {"b": gradient_penalty, "q_dependency": gradient_penalty}
    criterion = DiscriminatorLoss(d, seeded(), penalties)
    rows = criterion.rows(real, fake)
    whole = DiscriminatorLoss(d, seeded(), penalties)(real, fake)
    assert_close(criterion.cost(rows) + criterion.penalty(rows), whole)
    assert_close(criterion.cost(rows), DiscriminatorLoss(d, seeded())(real, fake))
    assert_close(criterion.penalty({"b": rows["b"]}), gradient_penalty(d.networks["b"], rows["b"]))
    assert criterion.penalty({"a": rows["a"]}) == 0
    assert DiscriminatorLoss(d).penalty(rows) == 0


def test_a_cost_that_was_replaced_by_a_compiled_one_is_called():
    criterion, seen = DiscriminatorLoss(make()), []
    cost = criterion.cost
    criterion.cost = lambda rows, **options: seen.append(options) or cost(rows, **options)
    criterion(some_real(), torch.randn(8, 5))
    criterion(some_real(), torch.randn(8, 5), report=True)
    assert seen == [{}, {"report": True}]


def test_a_penalty_gets_the_rows_of_the_sides_and_the_generators():
    d, real, fake, seen = make(), some_real(), torch.randn(8, 5), {}

    def record(term, rows):
        seen["rows"] = rows
        return term(rows.generated).sum() * 0

    criterion = DiscriminatorLoss(d, seeded(), {"p_dependency": record, "a": record})
    rows = criterion.rows(real, fake)
    criterion.penalty({"p_dependency": rows["p_dependency"]})
    assert_close(seen["rows"].sides, drawn(d, real, fake)["p_dependency"])
    assert_close((seen["rows"].numerator, seen["rows"].denominator), seen["rows"].sides)
    assert_close(seen["rows"].generated, fake)
    assert_close(rows["a"].generated, fake[:, :2])
    assert rows["b"].generated is None  # nobody asked


def test_the_penalty_of_a_term_without_data_weighs_nothing():
    def penalty(term, rows):
        return 7 * (term(rows.numerator) - term(rows.denominator)).abs().mean().log()

    criterion = DiscriminatorLoss(make(), penalties={"p_dependency": lambda *_: torch.tensor(7.0)})
    fake = torch.randn(8, 5)
    loss, report = criterion(Observations(a=torch.randn(6, 2)), fake, report=True)
    assert_close(loss, sum(term.loss for term in report.values()))
    loss, report = criterion(torch.randn(6, 5), fake, report=True)
    assert_close(loss, sum(term.loss for term in report.values()) + 7)
    loss = DiscriminatorLoss(make(), penalties={"p_dependency": penalty})(Observations(), fake)
    assert loss.isfinite()


# --- the anchor ---

TABLE = Partition.fields("a", "b")
CELLS = [(i, j) for i in range(3) for j in range(4)]


class Free(nn.Module):
    """A free output for every cell of a table."""

    def __init__(self, *shape):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(shape))

    def forward(self, *cells):
        return self.values[cells]


def exact_cost(criterion, p, q):
    """What a criterion costs in expectation, and its free outputs at the optimum."""
    d, epsilon = criterion.discriminator, criterion.anchors
    marginals = {s: t.sum(1)[:, None] * t.sum(0)[None] for s, t in (("p", p), ("q", q))}
    total = 0.0
    for s, table in (("p", p), ("q", q)):
        y = d.networks[f"{s}_dependency"].values
        total = total + (table * softplus(-y)).sum() + (marginals[s] * softplus(y)).sum()
        total = total + epsilon[f"{s}_dependency"] * (q * (softplus(-y) + softplus(y))).sum()
    return total


def table_discriminator():
    networks = {"a": Free(3), "b": Free(4), "p_dependency": Free(3, 4), "q_dependency": Free(3, 4)}
    return FactorisedDiscriminator(TABLE, Factorisation.flat(["a", "b"]), networks)


@pytest.mark.parametrize("epsilon", [0.02, 0.3, 1.0])
def test_the_optimum_of_anchored_dependencies(epsilon):
    p, q = (torch.rand(3, 4).pow(2) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    p[0, 1] = 0.0  # only the generator has mass there
    p = p / p.sum()
    d = table_discriminator()
    criterion = DiscriminatorLoss(d, anchor=epsilon)
    optimiser = torch.optim.LBFGS(
        d.parameters(),
        max_iter=2000,
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        loss = exact_cost(criterion, p, q)
        loss.backward()
        return loss

    optimiser.step(closure)
    product = {s: t.sum(1)[:, None] * t.sum(0)[None] for s, t in (("p", p), ("q", q))}
    values = {s: d.networks[f"{s}_dependency"].values.detach() for s in "pq"}
    expected = ((p + epsilon * q) / (product["p"] + epsilon * q)).log()
    assert_close(values["p"], expected, rtol=0.0, atol=1e-5)
    expected = ((1 + epsilon) * q / (product["q"] + epsilon * q)).log()
    assert_close(values["q"], expected, rtol=0.0, atol=1e-5)
    # where p = q the two cancel for every weight: the fixed point is not biased
    same = ((q + epsilon * q) / (product["q"] + epsilon * q)).log()
    assert_close(same, expected)


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
@pytest.mark.parametrize("separate", [False, True])
def test_an_anchor_costs_what_its_rows_do_on_both_sides(epsilon, separate):
    d, real, fake = make(), some_real(), torch.randn(8, 5)
    plain, terms = DiscriminatorLoss(d, seeded())(real, fake, report=True)
    criterion = DiscriminatorLoss(d, seeded(), anchor=epsilon, separate_batches=separate)
    _, report = criterion(real, fake, report=True)
    for name in WIDTHS:
        y = d.networks[name](
            fake if "dependency" in name else fake[:, :1].expand(-1, WIDTHS[name])
        )
        both = (softplus(-y).mean() + softplus(y).mean()) * (epsilon if "_" in name else 0.0)
        assert_close(report[name].loss, (terms[name].loss + both).detach())
    assert_close(
        report["p_dependency"].generated, d.networks["p_dependency"](fake).mean().detach()
    )
    one = DiscriminatorLoss(d, seeded(), anchor={"q_dependency": epsilon})
    y = d.networks["q_dependency"](fake)
    assert_close(one(real, fake), plain + epsilon * (softplus(-y).mean() + softplus(y).mean()))
    assert_close(DiscriminatorLoss(d, seeded(), anchor=0.0)(real, fake), plain)


@pytest.mark.parametrize("form", ["hierarchical", "autoregressive"])
def test_anchors_of_all_dependencies_of_a_form(form):
    names = ["w", "x", "y", "z"]
    tree = {"l": names[:2], "r": names[2:]}
    factorisation = Factorisation.hierarchical(tree)
    if form == "autoregressive":
        factorisation = Factorisation.autoregressive(names)
    networks = {t.name: nn.Linear(len(t.parts), 1) for t in factorisation.terms}
    d = FactorisedDiscriminator(Partition(dict.fromkeys(names, 1)), factorisation, networks)
    criterion = DiscriminatorLoss(d, anchor=0.3)
    assert set(criterion.anchors) == {t.name for t in factorisation.terms if "dep" in t.name}
    fake = torch.randn(8, 4)
    loss, report = criterion(Observations(w=torch.randn(6, 1)), fake, report=True)
    loss.backward()
    for name, parameter in d.networks.named_parameters():
        term = name.split(".")[0]
        lacks = not report[term].loss
        assert bool((parameter.grad == 0).all()) == lacks
    criterion(torch.randn(8, 4), fake).backward()
    assert all(bool((p.grad != 0).any()) for p in d.parameters())


def test_rows_that_were_drawn_without_an_anchor_are_refused():
    d = make()
    rows = DiscriminatorLoss(d).rows(torch.randn(8, 5), torch.randn(8, 5))
    with pytest.raises(ValueError, match="anchor of term 'p_dependency' expects the generator's"):
        DiscriminatorLoss(d, anchor=0.1).cost(rows)


def test_an_anchored_cost_is_one_graph():
    torch._dynamo.reset()
    criterion = DiscriminatorLoss(make(), anchor=0.1)
    cost = torch.compile(criterion.cost, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for real in (torch.randn(8, 5), Observations(a=torch.randn(8, 2))):
            rows = criterion.rows(real, torch.randn(8, 5))
            assert_close(cost(rows), criterion.cost(rows))


@pytest.mark.parametrize(
    ("error", "says", "anchor"),
    [
        (ValueError, "of term 'p_dependency' is finite and at least 0, but got -0.1", -0.1),
        (ValueError, "finite and at least 0, but got nan", float("nan")),
        (ValueError, "finite and at least 0, but got inf", {"q_dependency": float("inf")}),
        (
            ValueError,
            r"names term 'a', which is no dependency; .*\('p_dependency', 'q",
            {"a": 0.1},
        ),
        (TypeError, "anchor of term 'p_dependency' is a number, but got 'much'", "much"),
        (TypeError, "is a number, but got True", True),
    ],
)
def test_what_is_no_anchor_is_refused(error, says, anchor):
    with pytest.raises(error, match=says):
        DiscriminatorLoss(make(), anchor=anchor)


# --- terms that are given others ---


def remainder(networks=None):
    widths = {"a": 2, "b": 3, "remainder": 5}
    networks = networks or {name: nn.Linear(width, 1) for name, width in widths.items()}
    return FactorisedDiscriminator(PARTS, Factorisation.remainder(["a", "b"]), networks)


def test_a_remainder_learns_with_the_marginals_as_an_offset():
    d, x, fake = remainder(), torch.randn(6, 5), torch.randn(8, 5)
    criterion = DiscriminatorLoss(d, seeded())
    loss, report = criterion(Observations(joint=x, a=torch.randn(9, 2)), fake, report=True)
    n = d.networks

    def joint(y):
        return (n["a"](y[:, :2]) + n["b"](y[:, 2:]) + n["remainder"](y))[:, 0]

    expected = softplus(-joint(x)).mean() + softplus(joint(fake)).mean()
    assert_close(report["remainder"].loss, expected.detach())
    assert_close(report["remainder"].numerator, n["remainder"](x).mean().detach())
    assert_close(report["remainder"].generated, n["remainder"](fake).mean().detach())
    right = (joint(x) > 0).double().mean() + (joint(fake) <= 0).double().mean()
    assert_close(report["remainder"].accuracy, right / 2)
    assert_close(loss, sum(term.loss for term in report.values()))
    assert_close(d(fake), joint(fake))
    # the offset is a constant: the marginals learn from their own rows alone
    rows = criterion.rows(x, fake)
    criterion.cost({"remainder": rows["remainder"]}).backward()
    assert n["a"].weight.grad is None
    assert bool((n["remainder"].weight.grad != 0).all())


def test_the_optimum_of_a_remainder_is_what_the_marginals_leave():
    p, q = (torch.rand(3, 4) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    networks = {"a": Free(3), "b": Free(4), "remainder": Free(3, 4)}
    d = FactorisedDiscriminator(TABLE, Factorisation.remainder(["a", "b"]), networks)
    cells = tuple(torch.tensor(column) for column in zip(*CELLS, strict=True))
    with torch.no_grad():
        networks["a"].values.copy_((p.sum(1) / q.sum(1)).log())
        networks["b"].values.copy_((p.sum(0) / q.sum(0)).log())
    optimiser = torch.optim.LBFGS(
        networks["remainder"].parameters(),
        max_iter=2000,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        y = networks["remainder"].values.flatten() + d.offset("remainder", cells)
        loss = (p.flatten() * softplus(-y)).sum() + (q.flatten() * softplus(y)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert_close(d(cells), (p / q).log().flatten(), rtol=0.0, atol=1e-6)


def test_a_remainder_without_complete_rows_costs_nothing():
    d, fake = remainder(), torch.randn(8, 5)
    loss, report = DiscriminatorLoss(d)(Observations(a=torch.randn(9, 2)), fake, report=True)
    loss.backward()
    assert report["remainder"].loss == 0
    assert report["remainder"].accuracy.isnan()
    assert bool((d.networks["remainder"].weight.grad == 0).all())


@pytest.mark.parametrize("complete", [True, False])
def test_what_a_remainder_is_given_keeps_its_statistics(complete):
    def norm(width):
        return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 1))

    d = remainder({"a": norm(2), "b": norm(3), "remainder": nn.Linear(5, 1)})
    lone = {"a": torch.randn(9, 2), "b": torch.randn(9, 3)}
    real = Observations(lone | ({"joint": 5 + torch.randn(6, 5)} if complete else {}))
    criterion = DiscriminatorLoss(d)
    rows = criterion.rows(real, torch.randn(8, 5))
    other = copy.deepcopy(d)
    criterion.cost(rows).backward()
    DiscriminatorLoss(other).cost({name: rows[name] for name in ("a", "b")}).backward()
    for name in ("a", "b"):
        ours, theirs = (dict(each.networks[name].named_buffers()) for each in (d, other))
        assert ours["0.running_mean"].abs().sum() > 0
        assert_close(ours, theirs, rtol=0.0, atol=0.0)


def test_an_objective_without_offsets_is_refused():
    class Doubled(Logistic):
        pass

    class Other:
        def loss(self, numerator_output, denominator_output):
            return (denominator_output - numerator_output).mean()

        def log_ratio(self, output):
            return output

    form = Factorisation.remainder(["a", "b"])
    networks = {name: nn.Linear(1, 1) for name in ("a", "b", "remainder")}
    FactorisedDiscriminator(PARTS, form, networks, objective=Doubled())
    with pytest.raises(TypeError, match=r"offset of its logit, which Logistic\(\) can do"):
        FactorisedDiscriminator(PARTS, form, networks, objective=Other())


# --- a term without data costs exactly nothing ---


class Fragile(nn.Module):
    """A network that is NaN for negative inputs, with a buffer that follows its inputs."""

    def __init__(self, width, function=torch.log):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        return self.last(self.norm(self.linear(self.function(x))))


@pytest.mark.parametrize("compiled", [False, True])
def test_without_data_neither_nan_nor_buffers_come_through(compiled):
    # only the p-dependency meets what it cannot bear
    networks = {name: nn.Linear(width, 1) for name, width in WIDTHS.items()}
    networks["p_dependency"] = Fragile(5, torch.exp if compiled else torch.log)
    d = FactorisedDiscriminator(PARTS, Factorisation.flat(["a", "b"]), networks)
    criterion = DiscriminatorLoss(d)
    torch._dynamo.reset()
    cost = criterion.cost
    if compiled:
        cost = torch.compile(cost, fullgraph=True, backend="aot_eager")
    network, fake = d.networks["p_dependency"], torch.randn(8, 5)
    cost(criterion.rows(torch.rand(6, 5), fake)).backward()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert before["norm.running_mean"].abs().sum() > 0  # with data, it learns
    assert all(
        bool((p.grad != 0).any()) for n, p in network.named_parameters() if "linear.b" not in n
    )
    d.zero_grad()
    rows = criterion.rows(Observations(a=torch.randn(6, 2), b=torch.randn(6, 3)), fake)
    loss = cost(rows)
    assert loss.isfinite()
    loss.backward()
    assert all(bool((p.grad == 0).all()) for p in network.parameters())
    assert_close(dict(network.named_buffers()), before, rtol=0.0, atol=0.0)


def test_a_term_without_data_gets_rows_whose_differences_are_not_zero():
    fake = torch.randn(8, 5)
    rows = DiscriminatorLoss(make()).rows(Observations(a=torch.randn(6, 2)), fake)
    above, below = rows["p_dependency"].sides
    assert_close(above, fake)
    assert bool((above != below).all())
    assert_close(above.sort(0).values, below.sort(0).values)
    assert rows["p_dependency"].missing
    assert not rows["a"].missing


def test_one_complete_row_is_a_step_without_the_dependency():
    real = Observations(joint=torch.randn(1, 5), a=torch.randn(8, 2))
    _, report = DiscriminatorLoss(make())(real, torch.randn(8, 5), report=True)
    assert {name for name, term in report.items() if term.loss == 0} == {"p_dependency"}
    assert {name for name, term in report.items() if term.accuracy.isnan()} == {"p_dependency"}


def test_rows_can_keep_the_graph_of_the_generator():
    d, generator = make(), nn.Linear(3, 5)
    fake = generator(torch.randn(8, 3))
    rows = DiscriminatorLoss(d, seeded()).rows(some_real(), fake, detach=False)
    DiscriminatorLoss(d).cost(rows).backward()
    assert bool((generator.weight.grad != 0).all())
    rows = DiscriminatorLoss(d).rows(some_real(), fake)
    assert not any(side.requires_grad for term in rows.values() for side in term.sides)


def test_a_step_makes_no_copy_of_its_rows_but_one():
    """Networks are called with the memory that the rows lie in."""
    d, seen = make(), {}
    for name, network in d.networks.items():
        network.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    criterion = DiscriminatorLoss(d)
    rows = criterion.rows(some_real(), torch.randn(8, 5))
    criterion.cost(rows)
    for name, term in rows.items():
        assert seen[name].data_ptr() == term.numerator.data_ptr()
        assert_close(seen[name], torch.cat(term.sides))


def test_sides_of_unlike_shapes_take_a_pass_each():
    partition = Partition({"a": 1, "b": 1})
    networks = {
        name: nn.Sequential(nn.Conv1d(width, 1, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        for name, width in {"a": 1, "b": 1, "p_dependency": 2, "q_dependency": 2}.items()
    }
    d = FactorisedDiscriminator(partition, Factorisation.flat(["a", "b"]), networks)
    real, fake = torch.randn(6, 2, 20), torch.randn(4, 2, 12)
    loss, report = DiscriminatorLoss(d)(real, fake, report=True)
    above, below = networks["a"](real[:, :1]), networks["a"](fake[:, :1])
    assert_close(report["a"].loss, (softplus(-above).mean() + softplus(below).mean()).detach())
    loss.backward()


def test_an_objective_may_average_over_everything():
    class Plain:
        def loss(self, numerator_output, denominator_output):
            return softplus(-numerator_output).mean() + softplus(denominator_output).mean()

        def log_ratio(self, output):
            return output

    networks = {name: nn.Linear(width, 1) for name, width in WIDTHS.items()}
    ours, theirs = (
        FactorisedDiscriminator(PARTS, Factorisation.flat(["a", "b"]), networks, objective=o)
        for o in (None, Plain())
    )
    x, fake = torch.randn(8, 5), torch.randn(8, 5)  # all terms have as many rows
    one, other = (DiscriminatorLoss(d, seeded())(x, fake, report=True) for d in (ours, theirs))
    assert_close(one, other)


# --- options and errors ---


def test_separate_batches_are_two_passes():
    d = make(lambda width: nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    real, fake = some_real(), 3 + torch.randn(8, 5)
    apart = DiscriminatorLoss(d, seeded(), separate_batches=True)(real, fake)
    together = DiscriminatorLoss(d, seeded())(real, fake)
    two, one = 0.0, 0.0
    for name, (above, below) in drawn(d, real, fake).items():
        network = d.networks[name]
        two = two + softplus(-network(above)).mean() + softplus(network(below)).mean()
        both = network(torch.cat([above, below]))
        one = one + softplus(-both[: len(above)]).mean() + softplus(both[len(above) :]).mean()
    assert_close(apart, two)
    assert_close(together, one)
    assert abs((apart - together).item()) > 1e-3


def test_separate_batches_separate_terms_that_share_a_network_too():
    partition = Partition({"a": 2, "b": 2})
    network, calls = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)), []
    network.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    networks = {"a": network, "b": network} | {f"{s}_dependency": nn.Linear(4, 1) for s in "pq"}
    d = FactorisedDiscriminator(partition, Factorisation.flat(["a", "b"]), networks)
    real, fake = torch.randn(6, 4), torch.randn(8, 4)
    DiscriminatorLoss(d, separate_batches=True)(real, fake)
    assert calls == [6, 6, 8, 8]
    calls.clear()
    DiscriminatorLoss(d)(real, fake)
    assert calls == [28]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_names_source_pattern_and_part(value):
    criterion = DiscriminatorLoss(make(), check_finite=True)
    pairs, fake, lone = torch.randn(4, 5), torch.randn(8, 5), torch.randn(6, 2)
    criterion(Observations(joint=pairs, a=lone), fake)
    spoiled = pairs.clone()
    spoiled[1, 3] = value
    with pytest.raises(
        ValueError, match=r"Part 'b' of the batch of p over \('a', 'b'\) holds NaN"
    ):
        criterion(Observations(joint=spoiled, a=lone), fake)
    with pytest.raises(ValueError, match=r"Part 'a' of the batch of p over \('a',\) holds NaN or"):
        criterion(Observations(joint=pairs, a=lone * value), fake)
    with pytest.raises(
        ValueError, match=r"Part 'b' of the batch of q over \('a', 'b'\) holds NaN"
    ):
        criterion(pairs, spoiled)
    assert not DiscriminatorLoss(make())(spoiled, fake).isfinite()  # off by default


def test_refused_arguments():
    d = make()
    with pytest.raises(TypeError, match="expects a FactorisedDiscriminator, but got a Linear"):
        DiscriminatorLoss(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"`penalties` names term 'c', but the terms are \('a', "):
        DiscriminatorLoss(d, penalties={"c": gradient_penalty})
    other = Partition({"a": 3, "b": 2})
    with pytest.raises(ValueError, match=r"The sampler divides by .*, but the discriminator by"):
        DiscriminatorLoss(d, DependencySampler(other))


def test_refused_batches():
    criterion, fake = DiscriminatorLoss(make()), torch.randn(8, 5)
    with pytest.raises(ValueError, match=r"observed of 'a': .* 2 entries along dim 1, .*\(4, 3\)"):
        criterion(Observations(a=torch.randn(4, 3)), fake)
    with pytest.raises(ValueError, match=r"In `fake`: .* 5 entries along dim 1, .*\(8, 4\)"):
        criterion(torch.randn(4, 5), fake[:, :4])
    with pytest.raises(ValueError, match=r"In `real`: .* 5 entries along dim 1, .*\(8, 4\)"):
        criterion(fake[:, :4], fake)
    with pytest.raises(ValueError, match="`fake` expects whole observations, at least one"):
        criterion(torch.randn(4, 5), fake[:0])
    with pytest.raises(
        ValueError, match=r"is torch.float64 in `real` and torch.float32 in `fake`"
    ):
        criterion(torch.randn(4, 5), fake.float())
    d = FactorisedDiscriminator(
        Partition.fields("a", "b"),
        Factorisation.joint(["a", "b"]),
        {"joint": nn.Bilinear(2, 3, 1)},
    )
    whole = (torch.randn(4, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"one length, but got \{'a': 4, 'b': 5\}"):
        DiscriminatorLoss(d)(whole, (torch.randn(4, 2), torch.randn(5, 3)))


@pytest.mark.parametrize(
    ("real", "got"),
    [(None, "None"), ({"a": torch.zeros(8, 2), "b": torch.zeros(8, 3)}, "a mapping")],
)
def test_what_does_not_say_what_was_seen_together_is_refused(real, got):
    with pytest.raises(TypeError, match=rf"`real` expects Observations .* got {got}.*a=\.\.\., b"):
        DiscriminatorLoss(make())(real, torch.randn(8, 5))


def test_under_autocast_a_generator_may_make_half_precision():
    d = make().float()
    real, fake = torch.randn(6, 5).float(), torch.randn(8, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = DiscriminatorLoss(d)(real, fake)
    loss.backward()
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"`real` and torch.bfloat16 in `fake`"):
        DiscriminatorLoss(d)(real, fake)


# --- DistributedDataParallel ---


def data_of(rank):
    """The real and generated batches of a process; the second has no pairs."""
    rng = torch.Generator().manual_seed(10 + rank)
    pairs, a, b, fake = (torch.randn(6, n, generator=rng) for n in (5, 2, 3, 5))
    return Observations(a=a, b=b) if rank else Observations(joint=pairs, a=a, b=b), fake


def made(rank):
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(rank)
    return DiscriminatorLoss(make(), DependencySampler(PARTS, rng=rng))


def distributed_step(rank, directory):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    criterion = made(rank)
    wrapped = DistributedDataParallel(criterion)
    loss, report = wrapped(*data_of(rank), report=True)
    loss.backward()  # while `wrapped` lives: it owns the hooks that reduce
    torch.save((gradients(criterion), report["p_dependency"].loss), f"{directory}/{rank}.pt")
    dist.barrier()  # gloo may abort a process whose partner is gone
    dist.destroy_process_group()


def test_distributed_gradients_are_the_mean_over_ranks(tmp_path):
    torch.multiprocessing.spawn(distributed_step, args=(str(tmp_path),), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert saved[0][1] > 0
    assert saved[1][1] == 0
    alone = [made(rank) for rank in (0, 1)]
    for rank, criterion in enumerate(alone):
        criterion(*data_of(rank)).backward()
    first, second = map(gradients, alone)
    for name, gradient in saved[0][0].items():
        assert_close(gradient, (first[name] + second[name]) / 2)
        assert_close(saved[1][0][name], gradient, rtol=0.0, atol=0.0)
