"""How far terms can be trusted: in nats, on rows that they learn from, on others, on fakes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from factordisc.densities import Ratio, is_dependency
from factordisc.discriminator import FactorisedDiscriminator
from factordisc.layouts import Batch, outward
from factordisc.observations import Observations
from factordisc.sampling import DependencySampler, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Diagnosis", "Finding", "TermDiagnosis", "diagnose"]

BINS = 10
# Findings: nats by which means must differ, and standard errors, not to be noise.
GAP, ERRORS = 1.0, 3.0
SATURATED = 15.0  # nats, where the slope of the loss is 3e-7
CONSTANT = 1e-3  # nats


class Finding(NamedTuple):
    """Something that is wrong with a term.

    Attributes:
        name: "memorised", "off its data", "exhausted", "dead" or "saturated".
        term: The name of the term.
        text: What was seen, in nats, and what to do.
    """

    name: str
    term: str
    text: str


@dataclass(frozen=True)
class TermDiagnosis:
    """What a term is worth; log ratios in nats, by row, without gradients.

    Attributes:
        own: The log ratio on the real side of rows that it learned from; None where there are
            none (of a q-dependency).
        held_out: The same on held-out rows; None where there are too few.
        others: The log ratio on the other side of the held-out rows.
        generated: The log ratio on the generator's rows, where the generator asks the term.
    """

    own: Tensor | None
    held_out: Tensor | None
    others: Tensor | None
    generated: Tensor

    @property
    def accuracy(self) -> float:
        """The share of held-out rows on the right side of zero, both sides weighing the same."""
        if self.held_out is None or self.others is None:
            return math.nan
        right = (self.held_out > 0).double().mean() + (self.others <= 0).double().mean()
        return float(right / 2)

    @property
    def divergence(self) -> float:
        """A lower bound of the Jensen-Shannon divergence of its sides, in nats (at most log 2)."""
        if self.held_out is None or self.others is None:
            return math.nan
        loss = softplus(-self.held_out.double()).mean() + softplus(self.others.double()).mean()
        return float(math.log(2) - loss / 2)

    def reliability(self, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
        """Returns predicted probability, observed share and weight of equally heavy bins."""
        if self.held_out is None or self.others is None:
            return (torch.full((bins,), math.nan),) * 3
        outputs = torch.cat([self.held_out, self.others]).double()
        real = torch.cat([torch.ones(len(self.held_out)), torch.zeros(len(self.others))]).double()
        weight = torch.where(real > 0, 0.5 / len(self.held_out), 0.5 / len(self.others)).double()
        ranked, order = outputs.sort()
        # Rows of one value share a bin: the one in which the last of them lies.
        last = torch.searchsorted(ranked, ranked, right=True) - 1
        heavy = weight[order].cumsum(0)[last].mul(bins).sub(1e-9)
        edges = heavy.floor().clamp(0, bins - 1).long()
        sums = torch.zeros(3, bins, dtype=torch.float64)
        for row, values in enumerate((outputs.sigmoid() * weight, real * weight, weight)):
            sums[row].index_add_(0, edges, values[order])
        predicted, observed = sums[0] / sums[2], sums[1] / sums[2]
        return predicted, observed, sums[2]

    @property
    def calibration_error(self) -> float:
        """The mean distance of predicted probabilities from observed shares, over the bins."""
        predicted, observed, weight = self.reliability()
        filled = weight > 0  # NaN where nothing is known, so not filled either
        return float(((predicted - observed).abs() * weight)[filled].sum() / weight[filled].sum())


@dataclass(frozen=True)
class Diagnosis:
    """What the terms of a discriminator are worth, with findings. Made by `diagnose`.

    Attributes:
        terms: A `TermDiagnosis` by term.
        findings: What is wrong, the worst first.
        total_correlation: The total correlation of the data and of the generator's samples, in
            nats, as the dependencies estimate them on held-out complete rows: "p" and "q". NaN
            where the form has no dependencies.
    """

    terms: Mapping[str, TermDiagnosis]
    findings: tuple[Finding, ...]
    total_correlation: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float]:
        """Returns all figures under flat names such as "p_dependency/accuracy", for any logger."""
        figures = {}
        for name, term in self.terms.items():
            for what in ("accuracy", "divergence", "calibration_error"):
                figures[f"{name}/{what}"] = float(getattr(term, what))
            for what in ("own", "held_out", "generated"):
                figures[f"{name}/{what}"] = _mean(getattr(term, what))
        p, q = (self.total_correlation.get(source, math.nan) for source in "pq")
        return figures | {
            "total_correlation/p": p,
            "total_correlation/q": q,
            "total_correlation/gap": p - q,
        }

    def __str__(self) -> str:
        head = f"{'term':<16}{'accuracy':>9}{'diverg.':>9}{'own':>9}{'held out':>9}{'fakes':>9}"
        lines = [f"{head}  (nats)"]
        for name, t in self.terms.items():
            means = "".join(f"{_mean(x):>9.2f}" for x in (t.own, t.held_out, t.generated))
            lines.append(f"{name:<16}{t.accuracy:>9.2f}{t.divergence:>9.2f}{means}")
        p, q = (self.total_correlation.get(source, math.nan) for source in "pq")
        lines.append(f"total correlation: {p:.2f} nats in the data, {q:.2f} in the generator's")
        return "\n".join([*lines, *(f"! {finding.text}" for finding in self.findings)])

    def plot(self) -> Figure:
        """Draws what each term says of its own rows, of held-out ones and of fakes; calibration.

        Raises:
            ImportError: If matplotlib is not installed, which factordisc does not require.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                "Diagnosis.plot needs matplotlib, which is not installed: pip install matplotlib."
            ) from error
        figure, axes = plt.subplots(
            len(self.terms),
            2,
            figsize=(8, 2.2 * len(self.terms)),
            width_ratios=(2, 1),
            squeeze=False,
            layout="constrained",
        )
        colours = {"own": "#0072B2", "held_out": "#009E73", "generated": "#D55E00"}
        labels = {"own": "rows learned from", "held_out": "held-out rows", "generated": "fakes"}
        for (left, right), (name, term) in zip(axes, self.terms.items(), strict=True):
            values = {what: getattr(term, what) for what in colours}
            shown = {w: v.cpu().double() for w, v in values.items() if v is not None and len(v)}
            low = min(float(v.min()) for v in shown.values())
            high = max(float(v.max()) for v in shown.values())
            edges = torch.linspace(low - 1e-6, high + 1e-6, 31).tolist()
            for what, v in shown.items():
                style = {"histtype": "step", "density": True, "color": colours[what]}
                left.hist(v.tolist(), bins=edges, label=labels[what], **style)
            left.set(title=name, ylabel="density", xlabel="log ratio (nats)")
            predicted, observed, _ = term.reliability()
            right.plot([0, 1], [0, 1], color="0.7", lw=1)
            right.plot(predicted, observed, "o-", color=colours["held_out"], ms=3)
            right.set(xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
        axes[0][0].legend(frameon=False, fontsize="small")
        return figure


@torch.no_grad()
def diagnose(
    discriminator: FactorisedDiscriminator,
    training: Observations | Batch,
    held_out: Observations | Batch,
    fake: Batch,
    sampler: DependencySampler | None = None,
) -> Diagnosis:
    """Asks every term about rows that it learned from, about others, and about fakes.

    It evaluates in eval mode, without gradients, and leaves the modes as they were.

    Args:
        discriminator: The discriminator.
        training: Real data that it was trained on.
        held_out: Real data that it was not trained on. Of 20 complete rows a mean has a standard
            error of about a quarter of the standard deviation of a row: take all that there are.
        fake: A batch of the generator's whole observations.
        sampler: Draws the rows. If ``None``, a collision-free `DependencySampler`.

    Returns:
        A `Diagnosis`. Print it; log ``to_dict()``; look at ``plot()``.

    Raises:
        ValueError: As the criterion, if a batch does not fit the partition.

    Example:
        >>> d = FactorisedDiscriminator(
        ...     Partition({"a": 1, "b": 1}),
        ...     marginals={"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)},
        ...     p_dependency=nn.Linear(2, 1),
        ...     q_dependency=nn.Linear(2, 1),
        ... )
        >>> x = torch.randn(3, 64, 2)
        >>> diagnosis = diagnostics.diagnose(d, x[0], x[1], x[2])
        >>> sorted(diagnosis.to_dict())[:3]
        ['a/accuracy', 'a/calibration_error', 'a/divergence']
    """
    sampler = DependencySampler(discriminator.partition) if sampler is None else sampler
    labels = {"p": "`training`", "q": "`fake`"}
    seen = Step(sampler, {"p": training, "q": fake}, labels, detach=True)
    other = Step(sampler, {"p": held_out, "q": fake}, labels | {"p": "`held_out`"}, detach=True)
    whole = other.batches["q"][discriminator.partition.names]
    terms: dict[str, TermDiagnosis] = {}
    findings: list[Finding] = []
    with _evaluating(discriminator):
        for term in discriminator.factorisation.terms:
            rows = outward(discriminator._takes[term.name](whole))
            generated = discriminator.term(term.name, rows)
            (own, _), (held, others) = (_asked(discriminator, term, s) for s in (seen, other))
            real = _is_real(term)
            terms[term.name] = TermDiagnosis(own if real else None, held, others, generated)
            number = _number(seen, term)
            findings += _findings(term, terms[term.name], number)
        total = {s: _total_correlation(discriminator, other, s) for s in ("p", "q")}
    order = ("off its data", "memorised", "exhausted", "saturated", "dead")
    findings.sort(key=lambda finding: order.index(finding.name))
    return Diagnosis(terms, tuple(findings), total)


def _asked(
    d: FactorisedDiscriminator, term: Ratio, step: Step
) -> tuple[Tensor | None, Tensor | None]:
    sides = step.sides(term)
    if sides is None:
        return None, None
    above, below = (d.term(term.name, outward(side)) for side in sides)
    return above, below


def _is_real(term: Ratio) -> bool:
    return any(density.source == "p" for density in term.numerator)


def _number(step: Step, term: Ratio) -> int:
    """The number of real rows that hold the parts of a term."""
    fitting = [b for names, b in step.batches["p"].items() if set(term.parts) <= set(names)]
    return max((len(batch[0]) for batch in fitting), default=0)


def _total_correlation(d: FactorisedDiscriminator, step: Step, source: str) -> float:
    """Sums what the dependencies of one source say of its complete rows."""
    whole = step.batches[source].get(d.partition.names)
    sign = 1 if source == "p" else -1
    own = [
        term
        for term in d.factorisation.terms
        if term.sign and is_dependency(term) and term.numerator[0].source == source
    ]
    if whole is None or not own:
        return math.nan
    means = [
        sign * t.sign * d.term(t.name, outward(d._takes[t.name](whole))).double().mean()
        for t in own
    ]
    return float(sum(means))


def _findings(term: Ratio, asked: TermDiagnosis, number: int) -> Iterator[Finding]:
    name, own, held, generated = term.name, asked.own, asked.held_out, asked.generated
    everything = torch.cat([x for x in (held, asked.others, generated) if x is not None])
    only_p = {d.source for d in (*term.numerator, *term.denominator)} == {"p"}
    if own is not None and only_p and _above(generated, own):
        yield Finding(
            "off its data",
            name,
            f"{name!r} is asked off its data: {_mean(generated):.1f} nats on fakes against "
            f"{_mean(own):.1f} on rows that it learned from, so it praises what it has never "
            "seen. Anchor it: DiscriminatorLoss(d, anchor=0.1); or use Factorisation.remainder.",
        )
    if own is not None and held is not None and _above(own, held):
        yield Finding(
            "memorised",
            name,
            f"{name!r} knows its rows by heart: {_mean(own):.1f} nats on them, "
            f"{_mean(held):.1f} on held-out ones. Bound it (spectral_norm, GradientPenalty), "
            "augment its rows, or train it less.",
        )
    if own is not None and only_p and number and _mean(own) > math.log(number) + GAP:
        yield Finding(
            "exhausted",
            name,
            f"{name!r} says {_mean(own):.1f} nats of its {number} rows, more than the "
            f"log {number} = {math.log(number):.1f} that so few can show. Bound it.",
        )
    if float((everything.abs() > SATURATED).double().mean()) > 0.5:
        yield Finding(
            "saturated",
            name,
            f"{name!r} is saturated: {_mean(everything.abs()):.0f} nats on average, where its "
            "loss is flat. The two sides may not overlap: bound it, or add noise to the rows.",
        )
    if len(everything) > 1 and float(everything.double().std()) < CONSTANT:
        yield Finding(
            "dead",
            name,
            f"{name!r} is dead: {_mean(everything):.3f} nats for every row. Look at its network "
            "(units that never fire, weights of zero) and at its learning rate.",
        )


def _above(one: Tensor, other: Tensor) -> bool:
    """Whether a mean lies above another by more than noise."""
    if len(one) < 2 or len(other) < 2:
        return False
    gap = one.double().mean() - other.double().mean()
    error = (one.double().var() / len(one) + other.double().var() / len(other)).sqrt()
    return bool(gap > GAP) and bool(gap > ERRORS * error)


def _mean(values: Tensor | None) -> float:
    return math.nan if values is None or not len(values) else float(values.double().mean())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluates in eval mode, and leaves every module's mode as it was."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
