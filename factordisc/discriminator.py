"""FactorisedDiscriminator: one network per term, the joint log ratio out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from factordisc.densities import Assumption, Ratio
from factordisc.factorisation import Factorisation
from factordisc.layouts import Batch
from factordisc.objectives import Logistic, Objective
from factordisc.partition import Partition

__all__ = ["FactorisedDiscriminator"]

ToLogit: TypeAlias = Callable[[Any], Tensor]
ToInputs: TypeAlias = Callable[..., "Tensor | tuple[Tensor, ...]"]


class FactorisedDiscriminator(nn.Module):
    r"""Estimates log p(x) - log q(x) as the signed sum of what one network per term estimates.

    It is an ordinary discriminator to the generator: ``d(x)`` is a logit, whose sigmoid
    estimates p / (p + q). Put spectral normalisation (or another bound) on the network of the
    p-dependency: it sees the fewest samples, and over-confidence there is the known weakness of
    the method.

    There are two ways to make one. ``FactorisedDiscriminator(partition, marginals=...,
    p_dependency=..., q_dependency=...)`` is the flat form of the paper;
    ``FactorisedDiscriminator(partition, factorisation, networks)`` is any form.

    A network is any module. It receives the parts of its term as `Partition.take` gives them
    (fields: one positional argument per part) and returns a logit of shape (N,), (N, 1) or
    (N, 1, 1, 1). One module may serve several terms; inputs of equal shape are then evaluated
    in one call.

    References:
        | Training Generative Adversarial Networks from Incomplete Observations using
          Factorised Discriminators (Stoller et al., 2020), Equation 3 and Theorem 1
        | https://arxiv.org/abs/1905.12660

    Args:
        partition: The split of an observation into its parts.
        factorisation: The terms, over the same parts.
        networks: The network of every term, by the term's name.
        marginals: For the flat form: the network of every part's marginal, by the part's name.
        p_dependency: For the flat form: the network of the dependency in real data.
        q_dependency: For the flat form: the network of the dependency in generated data.
        assuming: For the flat form: what is known about p and q; it removes terms.
        objective: How ratios are learned. If ``None``, `Logistic`.
        logit: What turns a network's output into a logit of shape (N,), where it is not one
            already: one callable for all terms, or a mapping from terms to callables.
        inputs: What a network is given in place of its parts, by term: a callable of the
            network's arguments that returns a tensor or a tuple of arguments.

    Raises:
        ValueError: If a network is missing, or given for a term that does not exist; if
            partition and factorisation have different parts.
        TypeError: If a network is not a module, or the objective does not learn a ratio.

    Example:
        >>> d = FactorisedDiscriminator(
        ...     Partition({"left": 2, "right": 3}),
        ...     marginals={"left": nn.Linear(2, 1), "right": nn.Linear(3, 1)},
        ...     p_dependency=nn.utils.parametrizations.spectral_norm(nn.Linear(5, 1)),
        ...     q_dependency=nn.Linear(5, 1),
        ... )
        >>> x = torch.randn(8, 5)
        >>> d(x).shape
        torch.Size([8])
        >>> terms = d.terms(x)
        >>> total = terms["left"] + terms["right"] + terms["p_dependency"] - terms["q_dependency"]
        >>> torch.allclose(d.eval()(x), total, atol=1e-5)
        True
    """

    def __init__(
        self,
        partition: Partition,
        factorisation: Factorisation | None = None,
        networks: Mapping[str, nn.Module] | None = None,
        *,
        marginals: Mapping[str, nn.Module] | None = None,
        p_dependency: nn.Module | None = None,
        q_dependency: nn.Module | None = None,
        assuming: Iterable[Assumption] = (),
        objective: Objective | None = None,
        logit: ToLogit | Mapping[str, ToLogit] | None = None,
        inputs: Mapping[str, ToInputs] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(partition, Partition):
            raise TypeError(f"`partition` expects a Partition, but got {partition!r}.")
        assuming = tuple(assuming)
        flat = {"p_dependency": p_dependency, "q_dependency": q_dependency}
        if factorisation is None:
            if networks is not None:
                raise ValueError(
                    "`networks` belong to a `factorisation`, which is missing. For the flat form "
                    "pass `marginals`, `p_dependency` and `q_dependency` instead."
                )
            factorisation = Factorisation.flat(partition.names, assuming)
            networks = {
                **(marginals or {}),
                **{name: network for name, network in flat.items() if network is not None},
            }
        elif marginals is not None or assuming or any(n is not None for n in flat.values()):
            raise ValueError(
                "With a `factorisation`, pass the networks as networks={term name: module}; "
                "its assumptions are part of it. `marginals`, `p_dependency`, `q_dependency` and "
                "`assuming` make the flat form."
            )
        if set(factorisation.parts) != set(partition.names):
            raise ValueError(
                f"The partition has the parts {partition.names}, "
                f"but the factorisation {factorisation.parts}."
            )
        self.partition = partition
        self.factorisation = factorisation
        self.objective = Logistic() if objective is None else objective
        if not isinstance(self.objective, Objective) or isinstance(self.objective, type):
            raise TypeError(
                f"`objective` expects an object with loss(numerator, denominator) and "
                f"log_ratio(output), but got {objective!r}. Hinge and Wasserstein critics do "
                "not estimate a density ratio, so they cannot be summed; use Logistic()."
            )
        self._terms = {term.name: term for term in factorisation.terms}
        # Made now, so that tracing a forward pass finds them.
        self._partitions = {n: partition.restrict(t.parts) for n, t in self._terms.items()}
        self._check_networks(networks or {})
        self.networks = nn.ModuleDict({name: (networks or {})[name] for name in self._terms})
        if isinstance(logit, Mapping):
            self._logits = self._checked_callables(logit, "logit")
        else:
            everywhere = {} if logit is None else dict.fromkeys(self._terms, logit)
            self._logits = self._checked_callables(everywhere, "logit")
        self._inputs = self._checked_callables(inputs or {}, "inputs")
        for name, term in self._terms.items():
            if name not in self._inputs:
                try:
                    partition.check_input(term.parts)
                except ValueError as error:
                    raise ValueError(f"For term {name!r}: {error}") from None
        self._strict = True  # torch does not tell a hook whether loading is strict
        self.register_load_state_dict_pre_hook(_refuse_other_terms)  # type: ignore[no-untyped-call]

    def forward(self, x: Batch) -> Tensor:
        """Estimates the joint log ratio.

        Args:
            x: A batch of N whole observations.

        Returns:
            The estimate of log p(x) - log q(x), in nats, with shape (N,); float32 or float64.

        Raises:
            ValueError: If the batch does not fit the partition, or a network's output is not
                one logit per observation.
        """
        summed = [name for name, term in self._terms.items() if term.sign]
        values = self._log_ratios(x, summed)
        total = values[summed[0]] * self._terms[summed[0]].sign
        for name in summed[1:]:
            total = total + values[name] if self._terms[name].sign > 0 else total - values[name]
        return total

    def terms(self, x: Batch) -> dict[str, Tensor]:
        """Estimates the log ratio of every term.

        Args:
            x: A batch of N whole observations.

        Returns:
            By term, its log ratio in nats, without its sign, with shape (N,).
        """
        return self._log_ratios(x, list(self._terms))

    def term(self, name: str, batch: Batch) -> Tensor:
        """Estimates the log ratio of one term, also on incomplete observations.

        Args:
            name: The name of the term.
            batch: N observations of the term's parts, in the form of
                ``partition.take(x, parts)``: what its network receives.

        Returns:
            The log ratio in nats, without its sign, with shape (N,).

        Raises:
            ValueError: If there is no such term, or the batch does not fit its parts.
        """
        self._check_term(name, "`name`")
        return self.objective.log_ratio(self.outputs({name: [batch]})[name][0])

    def outputs(self, batches: Mapping[str, Sequence[Batch]]) -> dict[str, list[Tensor]]:
        """Evaluates networks on batches of their terms, each network once if shapes allow it.

        This is what the losses are made of; `term` and `terms` give log ratios.

        Args:
            batches: By term, batches in the form of ``partition.take(x, parts)``.

        Returns:
            By term, the logit of every batch with shape (N,), before `objective.log_ratio`;
            in float32 where the network computed in half precision.
        """
        calls: list[_Call] = []
        by_network: dict[nn.Module, list[_Call]] = {}
        for name, several in batches.items():
            self._check_term(name, "`batches`")
            network = self.networks[name]
            for batch in several:
                arguments = self._arguments(name, batch)
                logit = self._logits.get(name)
                for call in by_network.setdefault(network, []):
                    if call.logit is logit and _alike(call.arguments[0], arguments):
                        break
                else:
                    call = _Call(network, logit, [], [])
                    calls.append(call)
                    by_network[network].append(call)
                call.names.append(name)
                call.arguments.append(arguments)
        outputs: dict[str, list[Tensor]] = {name: [] for name in batches}
        for call in calls:
            for name, output in zip(call.names, self._evaluate(call), strict=True):
                outputs[name].append(output)
        return outputs

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads parameters and buffers as any module; refuses another factorisation's.

        Raises:
            ValueError: If `strict` and the state dict is of other terms, with those that differ.
        """
        self._strict = strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._strict = True

    def _log_ratios(self, x: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        batches = {name: [self.partition.cut(x, self._terms[name].parts)] for name in names}
        outputs = self.outputs(batches)
        return {name: self.objective.log_ratio(outputs[name][0]) for name in names}

    def _arguments(self, name: str, batch: Batch) -> tuple[Any, ...]:
        try:
            arguments = self._partitions[name].arguments(batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"In the rows of term {name!r}: {error}") from None
        if name in self._inputs:
            changed = self._inputs[name](*arguments)
            arguments = changed if isinstance(changed, tuple) else (changed,)
            if not all(isinstance(argument, Tensor) for argument in arguments):
                raise TypeError(
                    f"`inputs` of term {name!r} returns a tensor or a tuple of tensors, "
                    f"but it returned a {type(changed).__name__}."
                )
        return arguments

    def _evaluate(self, call: _Call) -> list[Tensor]:
        sizes = [arguments[0].shape[0] for arguments in call.arguments]
        columns = zip(*call.arguments, strict=True)
        joined = [torch.cat(column) if len(column) > 1 else column[0] for column in columns]
        output = call.network(*joined)
        if call.logit is not None:
            output = call.logit(output)
        flat = self._one_logit_each(output, sum(sizes), call)
        return list(torch.split(flat, sizes)) if len(sizes) > 1 else [flat]

    def _one_logit_each(self, output: Any, rows: int, call: _Call) -> Tensor:
        name = call.names[0]
        converted = "" if call.logit is None else " after `logit`"
        if not isinstance(output, Tensor):
            raise TypeError(
                f"The network of term {name!r} expects to return one logit per observation, but "
                f"returned a {type(output).__name__}{converted}. Pass logit={{{name!r}: "
                "lambda output: output[0]}, or what else picks the logit from it."
            )
        if output.shape not in ((rows,), (rows, 1), (rows, 1, 1, 1)):
            raise ValueError(
                f"The network of term {name!r} expects to return one logit per observation, "
                f"with shape ({rows},) or ({rows}, 1), but returned {tuple(output.shape)}"
                f"{converted}. Pass logit={{{name!r}: lambda y: y.flatten(1).mean(1)}} for the "
                "mean over patches, .sum(1) for steps, or what else makes one number of it."
            )
        half = output.dtype in (torch.float16, torch.bfloat16)
        return output.reshape(rows).float() if half else output.reshape(rows)

    def _check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        for name in networks:
            if name not in self._terms:
                raise ValueError(
                    f"There is a network for {name!r}, but no such term. "
                    f"The terms are {tuple(self._terms)}."
                )
        for name, term in self._terms.items():
            if name not in networks:
                raise ValueError(
                    f"Term {name!r} ({term}) has no network. Pass one{_without(term)}."
                )
            if not isinstance(networks[name], nn.Module):
                raise TypeError(
                    f"The network of term {name!r} is an nn.Module, but got {networks[name]!r}."
                )

    def _checked_callables(self, callables: Mapping[str, Any], what: str) -> dict[str, Any]:
        for name, function in callables.items():
            self._check_term(name, f"`{what}`")
            if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
                raise TypeError(
                    f"`{what}` of term {name!r} is a function, but got a module with parameters, "
                    "which would be neither saved nor moved here. Make it part of the network."
                )
            if not callable(function):
                raise TypeError(f"`{what}` of term {name!r} is a callable, but got {function!r}.")
        return dict(callables)

    def _check_term(self, name: str, what: str) -> None:
        if name not in self._terms:
            raise ValueError(
                f"{what} names term {name!r}, but the terms are {tuple(self._terms)}."
            )

    def __repr__(self) -> str:
        equation = "\n  ".join(str(self.factorisation).splitlines())
        lines = [f"FactorisedDiscriminator({self.partition}, {self.objective}", f"  {equation}"]
        owners: dict[nn.Module, str] = {}
        for name, network in self.networks.items():
            if network in owners:
                lines.append(f"  ({name}): the network of ({owners[network]})")
                continue
            owners[network] = name
            count = sum(parameter.numel() for parameter in network.parameters())
            inner = "\n  ".join(repr(network).splitlines())
            lines.append(f"  ({name}): {count:,} parameters, {inner}")
        total = sum(parameter.numel() for parameter in self.parameters())
        return "\n".join([*lines, f"  {total:,} parameters in all", ")"])


class _Call(NamedTuple):
    """One evaluation of a network: batches of one or more terms, side by side."""

    network: nn.Module
    logit: ToLogit | None
    names: list[str]
    arguments: list[tuple[Tensor, ...]]


def _alike(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether two lists of arguments can be concatenated along the batch."""
    return len(one) == len(other) and all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(one, other, strict=True)
    )


def _without(term: Ratio) -> str:
    """Says which assumption would remove a term."""
    names = ", ".join(map(repr, term.parts))
    sources = {density.source for density in (*term.numerator, *term.denominator)}
    if sources == {"p", "q"} and len(term.numerator) == len(term.denominator) == 1:
        return f", or pass assuming=[shared({names})] if p and q agree there"
    if len(sources) == 1 and len(term.parts) > 1:
        return (
            f", or pass assuming=[independent({names}, under={sources.pop()!r})] "
            "if these parts are independent"
        )
    return ""


def _refuse_other_terms(
    module: FactorisedDiscriminator, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Refuses the state dict of another factorisation by the terms that differ."""
    if not module._strict:
        return
    start = f"{prefix}networks."
    # A term name has no dots, so it is what stands before the first one.
    saved = {key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)}
    # items, since named_children leaves out a network that serves a second term
    expected = {name for name, network in module.networks.items() if network.state_dict()}
    if saved != expected:
        raise ValueError(
            "The state dict is of another factorisation: it lacks terms "
            f"{sorted(expected - saved)} and has {sorted(saved - expected)}, unknown here. "
            "For a warm start pass strict=False to the discriminator's own load_state_dict."
        )
