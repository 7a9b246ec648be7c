"""The vocabulary of a factorisation: densities, ratios of them, and what is assumed of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from factordisc.names import check_key, check_source

__all__ = ["Density", "Ratio", "independent", "markov", "shared"]

# A log density is a source and a set of parts: bit i of the mask is part i. The empty set has
# density one, so its symbol never occurs.
Symbol: TypeAlias = tuple[str, int]
Expression: TypeAlias = dict[Symbol, int]
Rule: TypeAlias = Callable[[Symbol], "Expression | None"]


@dataclass(frozen=True)
class Density:
    """The density of some parts of an observation under one source.

    Args:
        source: "p", the data, or "q", the generator.
        parts: The names of the parts. A `Factorisation` puts them into the order of its parts.

    Example:
        >>> str(Density("p", ("top", "bottom")))
        'p(top, bottom)'
    """

    source: str
    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", part_names(self.parts, "The parts of a Density"))
        if not self.parts:
            raise ValueError("A Density expects at least one part, but got none.")

    def __str__(self) -> str:
        return f"{self.source}({', '.join(self.parts)})"


@dataclass(frozen=True)
class Ratio:
    """A term: a density ratio, which a classifier learns from draws of its two sides.

    Each side is a product of densities, and so the law of one row whose parts come from
    independent draws. Both sides cover the same parts, each exactly once.

    Args:
        name: What the term and its network are called.
        sign: +1 or -1, with which its logarithm enters the sum; or 0 for a term that is trained
            and reported, but not summed.
        numerator: The densities whose product is the numerator.
        denominator: The densities whose product is the denominator.
        given: The names of other terms of the factorisation, over some of the same parts. Their
            signed sum is an offset of this term's logit in training, which moves none of them,
            so that the term itself is what they leave of the ratio.

    Raises:
        ValueError: If a side covers a part twice, or the sides cover different parts, or the
            name cannot be the key of a network.

    Example:
        >>> edges = Ratio("edges", 1, [Density("p", ("edges",))], [Density("q", ("edges",))])
        >>> str(edges)
        'log p(edges) − log q(edges)'
    """

    name: str
    sign: int
    numerator: tuple[Density, ...]
    denominator: tuple[Density, ...]
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_key(self.name, "term")
        given = (self.given,) if isinstance(self.given, str) else tuple(self.given)
        for name in given:
            check_key(name, "term")
        if len(set(given)) < len(given):
            raise ValueError(f"Term {self.name!r} is given each term once, but got {given}.")
        object.__setattr__(self, "given", given)
        if type(self.sign) is not int or self.sign not in (-1, 0, 1):
            raise ValueError(
                f"Term {self.name!r} expects a sign of 1, -1 or 0, got {self.sign!r}."
            )
        for side in ("numerator", "denominator"):
            densities = getattr(self, side)
            densities = (densities,) if isinstance(densities, Density) else tuple(densities)
            for density in densities:
                if not isinstance(density, Density):
                    raise TypeError(
                        f"The {side} of term {self.name!r} expects Densities, but got {density!r}."
                    )
            object.__setattr__(self, side, densities)
            parts = [part for density in densities for part in density.parts]
            repeated = [part for part, count in Counter(parts).items() if count > 1]
            if repeated:
                raise ValueError(
                    f"The {side} of term {self.name!r} covers {repeated[0]!r} more than once, "
                    "but a side is a density of one row. Write a conditional dependency "
                    "as a difference of two terms."
                )
        below = {part for density in self.denominator for part in density.parts}
        if not self.parts or set(self.parts) != below:
            raise ValueError(
                f"The two sides of term {self.name!r} expect the same parts, but the numerator "
                f"covers {self.parts} and the denominator {tuple(sorted(below))}."
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the term is about: what its network receives."""
        return tuple(part for density in self.numerator for part in density.parts)

    def __str__(self) -> str:
        above = " + ".join(f"log {density}" for density in self.numerator)
        below = "".join(f" − log {density}" for density in self.denominator)
        return above + below + (f" − ({', '.join(self.given)})" if self.given else "")


def is_dependency(term: Ratio) -> bool:
    """Whether a term compares rows of one source with its blocks apart."""
    densities = (*term.numerator, *term.denominator)
    return len(densities) > 2 and len({density.source for density in densities}) == 1


class Assumption(Protocol):
    """What is known about p and q; a relation between log densities, as a rewriting rule."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    def rule(self, position: Mapping[str, int]) -> Rule: ...


@dataclass(frozen=True)
class Shared:
    """p and q agree on some parts, given others. Made by `shared`."""

    agreed: tuple[str, ...]
    given: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.agreed + self.given

    def rule(self, position: Mapping[str, int]) -> Rule:
        agreed, given = mask_of(self.agreed, position), mask_of(self.given, position)

        def rewrite(symbol: Symbol) -> Expression | None:
            source, parts = symbol
            if source != "q" or not between(given, parts, agreed | given) or parts == given:
                return None
            return expression_of([(1, "p", parts), (-1, "p", given), (1, "q", given)])

        return rewrite

    def __str__(self) -> str:
        given = f", given={list(self.given)}" if self.given else ""
        return f"shared({', '.join(map(repr, self.agreed))}{given})"


@dataclass(frozen=True)
class Independent:
    """Blocks of parts are independent under one source, given others. Made by `independent`."""

    blocks: tuple[tuple[str, ...], ...]
    given: tuple[str, ...]
    under: str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for block in self.blocks for part in block) + self.given

    def meets(
        self, position: Mapping[str, int]
    ) -> Callable[[Symbol], tuple[int, list[int]] | None]:
        """Returns what says of a set whether it falls apart: the given parts, and its blocks."""
        given, covered = mask_of(self.given, position), mask_of(self.parts, position)
        block_of = {
            1 << position[name]: mask_of(block, position)
            for block in self.blocks
            for name in block
        }

        def met(symbol: Symbol) -> tuple[int, list[int]] | None:
            source, parts = symbol
            if source != self.under or not between(given, parts, covered):
                return None
            blocks = []
            rest = parts & ~given
            while rest:
                block = block_of[rest & -rest]
                blocks.append(parts & block)
                rest &= ~block
            return (given, blocks) if len(blocks) > 1 else None

        return met

    def rule(self, position: Mapping[str, int]) -> Rule:
        meets = self.meets(position)

        def rewrite(symbol: Symbol) -> Expression | None:
            met = meets(symbol)
            if met is None:
                return None
            given, blocks = met
            pieces = [(1, self.under, block | given) for block in blocks]
            return expression_of([*pieces, (1 - len(blocks), self.under, given)])

        return rewrite

    def __str__(self) -> str:
        blocks = ", ".join(repr(b[0]) if len(b) == 1 else repr(b) for b in self.blocks)
        given = f", given={list(self.given)}" if self.given else ""
        return f"independent({blocks}{given}, under={self.under!r})"


@dataclass(frozen=True)
class Markov:
    """Under one source the future depends on the past only through some steps. By `markov`."""

    order: int
    under: str
    among: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return self.among

    def rule(self, position: Mapping[str, int]) -> Rule:
        steps = sorted(position[name] for name in self.among or position)
        everything = sum(1 << step for step in steps)

        def rewrite(symbol: Symbol) -> Expression | None:
            source, parts = symbol
            if source != self.under or parts & ~everything:
                return None
            # The last window that has a past and a future: what it leaves is known by then.
            for i in range(len(steps) - self.order - 1, 0, -1):
                window = sum(1 << step for step in steps[i : i + self.order])
                past = parts & ((1 << steps[i]) - 1)
                future = parts & ~window & ~past
                if parts & window == window and past and future:
                    return expression_of(
                        [
                            (1, source, past | window),
                            (1, source, window | future),
                            (-1, source, window),
                        ]
                    )
            return None

        return rewrite

    def __str__(self) -> str:
        return f"markov(order={self.order}, under={self.under!r})"


def shared(*parts: str, given: str | Iterable[str] = ()) -> Shared:
    r"""Assumes that p and q agree on some parts: :math:`p(A'|B) = q(A'|B)` for every A' in A.

    Without `given` it says that the generator receives these parts from the data, as a
    conditional generator does with its input: their marginals need no discriminator.

    References:
        Stoller et al. (2020), Section 2.3 (Eq. 4) and Section A.2 (Eq. 6).

    Args:
        *parts: The names of the parts A.
        given: The names of the parts B on which they depend in the same way under p and q.

    Example:
        >>> print(shared("scene"))
        shared('scene')
        >>> print(shared("mix", given=["voice", "band"]))
        shared('mix', given=['voice', 'band'])
    """
    agreed, given = part_names(parts, "shared"), part_names(given, "`given` of shared")
    if not agreed:
        raise ValueError("shared expects the name of at least one part, but got none.")
    check_disjoint([agreed, given], "shared")
    return Shared(agreed, given)


def independent(
    *blocks: str | Sequence[str], given: str | Iterable[str] = (), under: str
) -> Independent:
    r"""Assumes that blocks of parts are independent of each other under one source.

    For every set S that contains C and lies in C and the n blocks that it meets,
    :math:`\log s(S) = \sum_i \log s((B_i \cap S) \cup C) - (n - 1) \log s(C)`.

    References:
        Stoller et al. (2020), Section 2.4.

    Args:
        *blocks: The blocks, at least two: each the name of a part, or a tuple of names.
        given: The names of the parts C on which the independence is conditional.
        under: The source s of which it is assumed: "p", the data, or "q", the generator.

    Example:
        >>> print(independent("voice", ("drums", "bass"), under="p"))
        independent('voice', ('drums', 'bass'), under='p')
    """
    tuples = tuple(part_names(block, "A block of independent") for block in blocks)
    given = part_names(given, "`given` of independent")
    if len(tuples) < 2 or not all(tuples):
        raise ValueError(f"independent expects at least two blocks of parts, but got {blocks}.")
    check_disjoint([*tuples, given], "independent")
    check_source(under, "`under` of independent")
    return Independent(tuples, given, under)


def markov(order: int, under: str) -> Markov:
    r"""Assumes that the steps of a sequence form a Markov chain of some order under one source.

    In the order of the parts, any `order` consecutive steps W separate the steps before them
    from those after: for any sets P of steps before and F of steps after,
    :math:`\log s(P, W, F) = \log s(P, W) + \log s(W, F) - \log s(W)`.

    Args:
        order: How many steps the future depends on; at least 1.
        under: The source s of which it is assumed: "p", the data, or "q", the generator.

    Example:
        >>> print(markov(order=2, under="p"))
        markov(order=2, under='p')
    """
    if type(order) is not int or order < 1:
        raise ValueError(f"`order` of markov is an integer of at least 1, but got {order!r}.")
    check_source(under, "`under` of markov")
    return Markov(order, under)


def agreement(shares: Iterable[Shared], position: Mapping[str, int]) -> Rule:
    """One rule for all parts that are shared without conditions, however many."""
    containing: dict[int, list[int]] = {}
    for share in shares:
        agreed = mask_of(share.agreed, position)
        for name in share.agreed:
            containing.setdefault(1 << position[name], []).append(agreed)

    def rewrite(symbol: Symbol) -> Expression | None:
        source, parts = symbol
        if source == "q" and any(not parts & ~m for m in containing.get(parts & -parts, ())):
            return {("p", parts): 1}
        return None

    return rewrite


def part_names(value: str | Iterable[str], what: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{what} expects the names of parts, but got {name!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{what} expects every part once, but got {names}.")
    return names


def check_disjoint(groups: Sequence[tuple[str, ...]], what: str) -> None:
    counts = Counter(name for group in groups for name in group)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"{what} expects disjoint groups of parts, but {name!r} is in two.")


def mask_of(names: Iterable[str], position: Mapping[str, int]) -> int:
    return sum(1 << position[name] for name in names)


def between(smaller: int, mask: int, larger: int) -> bool:
    return mask & smaller == smaller and mask & ~larger == 0


def expression_of(pieces: Iterable[tuple[int, str, int]]) -> Expression:
    total: Expression = {}
    for count, source, mask in pieces:
        if mask:
            add_to(total, {(source, mask): 1}, count)
    return total


def add_to(total: Expression, other: Expression, factor: int) -> None:
    for symbol, count in other.items():
        value = total.get(symbol, 0) + factor * count
        if value:
            total[symbol] = value
        else:
            total.pop(symbol, None)
