"""FactorisedDiscriminator: one network per term, the joint log ratio out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from typing import Any, TypeAlias, cast, overload

import torch
from torch import Tensor, nn

from factordisc.densities import Assumption, Ratio
from factordisc.factorisation import Factorisation
from factordisc.layouts import Batch, Layout, Take, Tensors
from factordisc.names import kind
from factordisc.objectives import Logistic, Objective
from factordisc.partition import Partition, check_input
from factordisc.stacks import Stack, Stacked, alike, gated, unstacked

__all__ = ["FactorisedDiscriminator"]

ToLogit: TypeAlias = Callable[[Any], Tensor]
ToInputs: TypeAlias = Callable[..., "Tensor | tuple[Tensor, ...]"]


_HALF = (torch.float16, torch.bfloat16)
_NO_LOGITS = (nn.Sigmoid, nn.LogSigmoid, nn.Softmax, nn.LogSoftmax)
_OF_SPECTRAL_NORM = ("._u", "._v", "weight_u", "weight_v")


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
        stack: Evaluate networks of one architecture as one where their inputs have one shape:
            far faster for many small networks. Their parameters lie in stacks, which is what an
            optimiser sees; the state dict is that of the networks. They are copied, and
            ``networks[name]`` then stands for a row of the stack.

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
        stack: bool = False,
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
            for name in marginals or ():
                if name in flat:
                    raise ValueError(
                        f"`marginals` names {name!r}, which is no part. Pass {name}=... instead."
                    )
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
        if any(t.given for t in factorisation.terms) and not isinstance(self.objective, Logistic):
            raise TypeError(
                "A term that is given others learns with their sum as an offset of its logit, "
                f"which Logistic() can do, but the objective is {self.objective!r}."
            )
        if not isinstance(logit, Mapping):
            logit = {} if logit is None else dict.fromkeys(self._terms, logit)
        self._logits = self._checked_callables(logit, "logit")
        self._check_networks(networks or {})
        self.networks = nn.ModuleDict({name: (networks or {})[name] for name in self._terms})
        self._inputs = self._checked_callables(inputs or {}, "inputs")
        layout = partition._layout
        # Known from now on: how the parts of every term are taken, and how rows of them lie.
        self._takes: dict[str, Take] = {}
        self._layouts: dict[str, Layout] = {}
        for name, term in self._terms.items():
            parts = layout.ordered(term.parts)
            if name not in self._inputs:
                try:
                    check_input(partition, parts)
                except ValueError as error:
                    raise ValueError(f"For term {name!r}: {error}") from None
            self._takes[name] = layout.taker(parts)
            self._layouts[name] = layout.restrict(parts)
        # A network that works on its input in place would change what others and the user see:
        # it gets a copy where its modules say so, and is watched where they do not say.
        unsafe = {n: net for n, net in self.networks.items() if not _keeps_input(net)}
        self._in_place = {n for n, net in unsafe.items() if _says_in_place(net)}
        self._watched = unsafe.keys() - self._in_place
        self._signs = {name: term.sign for name, term in self._terms.items() if term.sign}
        # By term that is given others: how to take their parts from its own, and their signs.
        self._given = {
            name: [
                (other, self._layouts[name].taker(self._layouts[other].names), self._signs[other])
                for other in term.given
            ]
            for name, term in self._terms.items()
            if term.given
        }
        owners = Counter(id(network) for network in self.networks.values())
        self._shared = {name for name, n in self.networks.items() if owners[id(n)] > 1}
        self._alone = self._terms.keys() - self._shared
        self.stacks = nn.ModuleDict()
        if stack:
            single = {n: net for n, net in self.networks.items() if n not in self._shared}
            for first, names in alike(single).items():
                self.stacks[first] = one = Stack({name: single[name] for name in names})
                self._alone -= set(names)
                for row, name in enumerate(names):
                    self.networks[name] = Stacked(one, first, row, type(single[name]).__name__)

    @overload
    def forward(self, x: Batch) -> Tensor: ...
    @overload
    def forward(self, x: TermBatches) -> dict[str, Tensor]: ...
    def forward(self, x: Batch | TermBatches) -> Tensor | dict[str, Tensor]:
        """Estimates the joint log ratio.

        Args:
            x: A batch of N whole observations.

        Returns:
            The estimate of log p(x) - log q(x), in nats, with shape (N,); float32 or float64.

        Raises:
            ValueError: If the batch does not fit the partition, or a network's output is not
                one logit per observation.
        """
        if isinstance(x, TermBatches):
            return self._outputs(x)
        values = self._log_ratios(x, self._signs)
        added = _sum([values[name] for name, sign in self._signs.items() if sign > 0])
        taken = _sum([values[name] for name, sign in self._signs.items() if sign < 0])
        if added is None or taken is None:
            return cast(Tensor, added if taken is None else -taken)
        return added - taken

    def terms(self, x: Batch) -> dict[str, Tensor]:
        """Estimates the log ratio of every term.

        Args:
            x: A batch of N whole observations.

        Returns:
            By term, its log ratio in nats, without its sign, with shape (N,).
        """
        return self._log_ratios(x, self._terms)

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
        try:
            tensors = self._layouts[name].read(batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"In the rows of term {name!r}: {error}") from None
        return self.objective.log_ratio(self._outputs(TermBatches({name: tensors}))[name])

    def _log_ratios(self, x: Batch, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self.partition._layout.read(x)
        batches = TermBatches({name: self._takes[name](tensors) for name in names})
        outputs = self._outputs(batches)
        return {name: self.objective.log_ratio(outputs[name]) for name in names}

    @torch.no_grad()
    def offset(self, name: str, batch: Tensors) -> Tensor:
        """Sums what a term is given, on rows of the term: constants, with shape (N,).

        The networks' own statistics stay: these rows are not what they learn from.
        """
        given = self._given[name]
        buffers = [b for other, *_ in given for b in _statistics(self.networks[other]).values()]
        before = [buffer.clone() for buffer in buffers]
        outputs = self._outputs(TermBatches({other: take(batch) for other, take, _ in given}))
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        values = [sign * self.objective.log_ratio(outputs[other]) for other, _, sign in given]
        return reduce(add, values)

    # --- evaluation: batches are in canonical form, and nothing is checked again ---

    def _outputs(self, batches: TermBatches) -> dict[str, Tensor]:
        """Evaluates networks, each once if shapes allow it: logits, before `log_ratio`."""
        outputs: dict[str, Tensor] = {}
        networks, weights, apart = self.networks._modules, batches.weights, batches.apart
        watched = self._watched
        if watched and not _counted(batches.values()):
            watched = set()
        calls: dict[object, list[tuple[str, Tensors]]] = {}
        for name, batch in batches.items():
            version = sum([tensor._version for tensor in batch]) if name in watched else 0
            arguments = self._replaced(name, batch) if name in self._inputs else batch
            network = networks[name]
            if name in self._alone or (apart and name in self._shared):
                outputs[name] = self._evaluate(name, network, arguments, weights.get(name))
                if name in watched and version != sum([tensor._version for tensor in batch]):
                    raise ValueError(
                        f"The network of term {name!r} changes its input in place, which others "
                        f"see too. Give it a copy: inputs={{{name!r}: torch.clone}} of the "
                        "FactorisedDiscriminator, or clone in its forward."
                    )
                continue
            key: tuple[object, ...]
            if isinstance(network, Stacked):
                key = (network.stack, *(a.shape for a in arguments))
            else:
                key = (id(network), id(self._logits.get(name)), name in weights)
                key += tuple(a.shape[1:] for a in arguments)
            key += tuple(a.dtype for a in arguments)
            calls.setdefault(key, []).append((name, arguments))
        for call in calls.values():
            outputs.update(self._together(call, weights))
        for name, weight in weights.items():
            if name in outputs:
                outputs[name] = torch.where(weight > 0, outputs[name], 0.0)
        return outputs

    def _together(
        self, call: list[tuple[str, Tensors]], weights: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Evaluates the one network of several terms, or the stack of theirs, once."""
        names = [name for name, _ in call]
        network = self.networks[names[0]]
        columns = list(zip(*(arguments for _, arguments in call), strict=True))
        muted_by = [weights[name] for name in names if name in weights]
        if isinstance(network, Stacked):
            rows = [cast(Stacked, self.networks[name]).row for name in names]
            gate = None
            if muted_by:
                one = torch.ones_like(muted_by[0])
                gate = torch.stack([weights.get(name, one) for name in names])
            joined = tuple(torch.stack(column) for column in columns)
            output, number = self.stacks[network.stack](rows, joined, gate), joined[0].shape[1]
            if isinstance(output, Tensor) and output.shape[1:] == (number, 1):
                output = output.squeeze(2)  # of all at once, not one by one
            outputs = zip(names, unstacked(output, len(rows)), strict=True)
            return [(name, self._logit(name, output, number)) for name, output in outputs]
        sizes = [arguments[0].shape[0] for _, arguments in call]
        weight = torch.stack(muted_by).amax() if muted_by else None
        joined = tuple(torch.cat(column) for column in columns)
        output = self._evaluate(names[0], network, joined, weight)
        return zip(names, torch.split(output, sizes), strict=True)

    def _evaluate(
        self, name: str, network: nn.Module, arguments: Tensors, weight: Tensor | None
    ) -> Tensor:
        """Evaluates a network on a batch, without effect where the weight is 0."""
        if name in self._in_place:
            arguments = tuple([argument.clone() for argument in arguments])
        if torch.compiler.is_compiling():  # where exceptions are the compiler's
            output = self._called(network, arguments, weight)
        else:
            try:
                output = self._called(network, arguments, weight)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise self._told(error, name, arguments) from error
        return self._logit(name, output, arguments[0].shape[0])

    @staticmethod
    def _called(network: nn.Module, arguments: Tensors, weight: Tensor | None) -> Any:
        return network(*arguments) if weight is None else muted(network, arguments, weight)

    def _told(self, error: Exception, name: str, arguments: Tensors) -> Exception:
        """The same kind of exception, with the term that it comes from."""
        given = ", ".join(f"{tuple(a.shape)} {str(a.dtype)[6:]} {a.device}" for a in arguments)
        message = (
            f"In the network of term {name!r}, on {given}: {error} (A criterion gives the sides "
            "of a term in one pass; separate_batches=True takes two.)"
        )
        try:
            return type(error)(message)
        except Exception:  # kinds with constructors of their own
            return RuntimeError(message)

    def _logit(self, name: str, output: Any, rows: int) -> Tensor:
        """Makes one logit per row of what a network returned."""
        if name in self._logits:
            output = self._logits[name](output)
        shapes = ((rows, 1), (rows,), (rows, 1, 1, 1))
        if (
            not isinstance(output, Tensor)
            or output.shape not in shapes
            or not output.is_floating_point()
        ):
            raise self._no_logit(name, output, rows)
        flat = output if output.dim() == 1 else output.reshape(rows)
        return flat.float() if flat.dtype in _HALF else flat

    def _replaced(self, name: str, arguments: Tensors) -> Tensors:
        changed = self._inputs[name](*arguments)
        replaced = changed if isinstance(changed, tuple) else (changed,)
        if not all(isinstance(argument, Tensor) for argument in replaced):
            raise TypeError(
                f"`inputs` of term {name!r} returns a tensor or a tuple of tensors, "
                f"but it returned a {kind(changed)}."
            )
        rows, lengths = arguments[0].shape[0], [argument.shape[:1] for argument in replaced]
        if any(length != (rows,) for length in lengths):
            raise ValueError(
                f"`inputs` of term {name!r} keeps the {rows} rows that it gets, "
                f"but it returned {', '.join(str(tuple(a.shape)) for a in replaced)}."
            )
        return replaced

    def _no_logit(self, name: str, output: object, rows: int) -> Exception:
        converted = " after `logit`" if name in self._logits else ""
        expects = f"The network of term {name!r} expects to return one logit per observation"
        if not isinstance(output, Tensor):
            return TypeError(
                f"{expects}, but returned a {kind(output)}{converted}. Pass logit={{{name!r}: "
                "lambda output: output[0]}, or whatever extracts the logit from it."
            )
        if not output.is_floating_point():
            return ValueError(f"{expects}, a real number, but returned {output.dtype}{converted}.")
        if output.shape == (rows, 2):
            return ValueError(
                f"{expects}, but returned {tuple(output.shape)}{converted}. Of two classes the "
                f"logit is their difference: logit={{{name!r}: lambda y: y[:, 1] - y[:, 0]}}."
            )
        return ValueError(
            f"{expects}, with shape ({rows},) or ({rows}, 1), but returned {tuple(output.shape)}"
            f"{converted}. Pass logit={{{name!r}: lambda y: y.flatten(1).mean(1)}} for the "
            "mean over patches, .sum(1) for steps, or whatever makes one number of it."
        )

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
            last = list(networks[name].modules())[-1]
            if isinstance(last, _NO_LOGITS) and name not in self._logits:
                raise ValueError(
                    f"The network of term {name!r} ends in {last}, so it gives no logit and its "
                    "log ratios would be wrong. Leave that layer out: the losses apply it "
                    f"themselves. Or undo it: logit={{{name!r}: torch.logit}} for a Sigmoid."
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
            tensors = network.own() if isinstance(network, Stacked) else network.parameters()
            count = sum(tensor.numel() for tensor in tensors)
            inner = "\n  ".join(repr(network).splitlines())
            lines.append(f"  ({name}): {count:,} parameters, {inner}")
        total = sum(parameter.numel() for parameter in self.parameters())
        return "\n".join([*lines, f"  {total:,} parameters in all", ")"])


def _keeps_input(network: nn.Module) -> bool:
    """Whether a network begins with a layer whose output is memory of its own."""
    while isinstance(network, nn.Sequential) and len(network):
        network = network[0]
    return isinstance(network, (nn.Linear, nn.modules.conv._ConvNd))


def _says_in_place(network: nn.Module) -> bool:
    return any(getattr(module, "inplace", False) is True for module in network.modules())


def _sum(values: list[Tensor]) -> Tensor | None:
    # One by one is faster for few: a stack costs as much as half a dozen sums.
    return (
        torch.stack(values).sum(0) if len(values) > 6 else reduce(add, values) if values else None
    )


def _counted(batches: Iterable[Tensors]) -> bool:
    """Whether changes of these tensors in place are counted."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return not any([tensor.is_inference() for batch in batches for tensor in batch])


class TermBatches(dict[str, Tensors]):
    """What networks are to be evaluated on, by term: what a criterion calls a discriminator with.

    Args:
        batches: By term, a batch in canonical form.
        weights: The weights, 0 or 1, of terms whose evaluation must have no effect at weight 0.
        apart: Evaluate terms that share a network one by one.
    """

    def __init__(
        self,
        batches: Mapping[str, Tensors],
        weights: Mapping[str, Tensor] | None = None,
        apart: bool = False,
    ) -> None:
        super().__init__(batches)
        self.weights = weights or {}
        self.apart = apart


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    """The buffers of a network that follow what it is called with."""
    # Those of a spectral norm follow the weights alone, and so on every rank alike.
    return {n: b for n, b in network.named_buffers() if not n.endswith(_OF_SPECTRAL_NORM)}


def muted(network: nn.Module, arguments: Tensors, weight: Tensor) -> Any:
    """Evaluates a network; at weight 0 its gradients are exactly zero and its buffers stay.

    In a graph, where every term is evaluated so, gradients are zero because the outputs are
    masked; only a network that is not finite on the generator's rows would tell the difference.
    """
    kept = _statistics(network)
    changed = {name: buffer.clone() for name, buffer in kept.items()}
    own = dict(changed)
    if not torch.compiler.is_compiling():
        own |= {name: gated(p, weight) for name, p in network.named_parameters()}
    output = torch.func.functional_call(network, own, arguments) if own else network(*arguments)
    with torch.no_grad():
        for name, buffer in kept.items():
            buffer.copy_(torch.where(weight > 0, changed[name], buffer))
    return output


def _without(term: Ratio) -> str:
    """Says which assumption would remove a term."""
    if term.given:
        return ""
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
