"""The algebra of log densities: which signed sums are log p - log q, and the terms of a form."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from factordisc.densities import (
    SOURCES,
    Assumption,
    Density,
    Expression,
    Independent,
    Markov,
    Ratio,
    Shared,
    Symbol,
    add_to,
    agreement,
    between,
    check_source,
    expression_of,
    mask_of,
)
from factordisc.partition import check_part_name

__all__: list[str] = []


@dataclass(frozen=True, eq=False)
class Group:
    """A node of the tree of a form: a group of units, or a part if it has none.

    Args:
        name: The name of the group or the part; "" at the top.
        units: The groups and parts within it.
        cliques: Sets of parts into which its p-dependency falls, in an order in which each set
            meets those before it within one of them (a junction tree).
    """

    name: str
    units: tuple[Group, ...] = ()
    cliques: tuple[tuple[str, ...], ...] = ()

    def leaves(self) -> list[str]:
        if not self.units:
            return [self.name]
        return [leaf for unit in self.units for leaf in unit.leaves()]


class Algebra:
    """Log densities of the subsets of the parts, under the assumptions."""

    # How many sets a proof looks at for relations that rewriting alone does not see.
    MOST_SYMBOLS = 1000

    def __init__(self, parts: Sequence[str], assuming: Iterable[Assumption]) -> None:
        if isinstance(parts, str):
            raise TypeError(f"A factorisation expects a sequence of part names, got {parts!r}.")
        self.parts = tuple(parts)
        for name in self.parts:
            check_part_name(name)
        if len(self.parts) < 2 or len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"A factorisation expects at least two parts with different names, "
                f"but got {self.parts}."
            )
        self.position = {name: i for i, name in enumerate(self.parts)}
        self.everything = (1 << len(self.parts)) - 1
        if not isinstance(assuming, Iterable):
            raise TypeError(f"`assuming` expects a list of assumptions, such as [{assuming}].")
        self.assuming = tuple(assuming)
        for assumption in self.assuming:
            if not hasattr(assumption, "rule"):
                raise TypeError(
                    "`assuming` expects shared(...), independent(...) or markov(...), "
                    f"but got {assumption!r}."
                )
            for name in assumption.parts:
                if name not in self.position:
                    raise ValueError(
                        f"{assumption} names {name!r}, but the parts are {self.parts}."
                    )
        # Splitting a set comes before q -> p: the order in which the forms apply them.
        splits = [a for a in self.assuming if not isinstance(a, Shared)]
        shares = [a for a in self.assuming if isinstance(a, Shared)]
        given = [a for a in shares if a.given]
        self.rules = [a.rule(self.position) for a in (*splits, *given)]
        if len(given) < len(shares):
            simple = (a for a in shares if not a.given)
            self.rules.append(agreement(simple, self.position))
        self.meetings = [a.meets(self.position) for a in splits if isinstance(a, Independent)]
        # A marginal over any other part cannot be zero: let that part be independent under p,
        # and its distribution under q is free.
        self.agreed = 0
        for share in shares:
            self.agreed |= mask_of(share.agreed, self.position)
        self.givens = {mask_of(getattr(a, "given", ()), self.position) for a in self.assuming}
        self.memo: dict[Symbol, Expression] = {}

    # --- names and masks ---

    def names(self, mask: int) -> tuple[str, ...]:
        return tuple(name for i, name in enumerate(self.parts) if mask >> i & 1)

    def name_of(self, mask: int) -> str:
        """The name of a group without one: its parts."""
        return "+".join(self.names(mask))

    def canonical(self, term: Ratio) -> Ratio:
        """Checks the names in a term and puts them into the order of the parts."""
        if not isinstance(term, Ratio):
            raise TypeError(f"`terms` expects Ratios, but got {term!r}.")

        def ordered(side: tuple[Density, ...]) -> tuple[Density, ...]:
            for density in side:
                check_source(density.source, f"Term {term.name!r}")
                for name in density.parts:
                    if name not in self.position:
                        raise ValueError(
                            f"Term {term.name!r} names part {name!r}, "
                            f"but the parts are {self.parts}."
                        )
            sorted_densities = (
                Density(d.source, tuple(sorted(d.parts, key=self.position.__getitem__)))
                for d in side
            )
            return tuple(sorted(sorted_densities, key=lambda d: self.position[d.parts[0]]))

        return Ratio(term.name, term.sign, ordered(term.numerator), ordered(term.denominator))

    # --- terms ---

    def density(self, source: str, mask: int) -> Density:
        return Density(source, self.names(mask))

    def marginal(self, name: str, mask: int) -> Ratio:
        return Ratio(name, 1, (self.density("p", mask),), (self.density("q", mask),))

    def target(self, whole: int) -> int:
        """The parts of a set that are left when those leave that are shared given all others."""
        left = whole
        masks = [
            (mask_of(a.given, self.position), mask_of(a.parts, self.position))
            for a in self.assuming
            if isinstance(a, Shared)
        ]
        while left:
            given = next((b for b, both in masks if b != left and between(b, left, both)), None)
            if given is None:
                return left
            left = given
        raise _nothing_to_learn(self.assuming)

    def form(self, top: Group, windows: bool = False) -> list[Ratio]:
        """Builds the terms of a tree from the top down, under the assumptions.

        Args:
            top: The group of all parts.
            windows: In every dependency of a group, restrict the past to the last steps of a
                Markov assumption; the group is then the past and one step.
        """
        terms: list[Ratio] = []
        queue = deque([top])
        masks = group_masks(top, self.position)
        while queue:
            group = queue.popleft()
            left = self.target(masks[group])
            units = [unit for unit in group.units if masks[unit] & left]
            for unit in units:
                masks[unit] &= left
                p, q = ("p", masks[unit]), ("q", masks[unit])
                if not masks[unit] & ~self.agreed and self.is_zero({p: 1, q: -1}):
                    continue
                if unit.units:
                    queue.append(unit)
                else:
                    terms.append(self.marginal(unit.name, masks[unit]))
            unit_masks = [masks[unit] for unit in units]
            for source in SOURCES:
                whole = self.window(source, unit_masks) if windows else left
                sets = Counter([whole])
                if group.cliques and source == "p":
                    sets = junctions(mask_of(c, self.position) & left for c in group.cliques)
                terms += self.dependencies(source, whole, sets, unit_masks, group.name)
        return terms

    def window(self, source: str, units: Sequence[int]) -> int:
        """The last step and those before it on which it depends under a Markov assumption."""
        whole = sum(units)
        last = units[-1].bit_length() - 1
        for assumption in self.assuming:
            if isinstance(assumption, Markov) and assumption.under == source:
                first = last - assumption.order
                window = (1 << (last + 1)) - (1 << first) if first >= 0 else 0
                if window and whole & window == window:
                    return window
        return whole

    def dependencies(
        self,
        source: str,
        whole: int,
        sets: Mapping[int, int],
        units: Sequence[int],
        group: str,
    ) -> list[Ratio]:
        """The dependencies between units in some sets, or in those into which they split.

        Args:
            source: The source.
            whole: The set whose dependency is called by the group alone.
            sets: How often the dependency of each set counts.
            units: The units of the group.
            group: The name of the group.
        """
        sign = 1 if source == "p" else -1
        counts: Counter[int] = Counter()
        for mask, count in sets.items():
            for part, times in self._split_dependency(source, mask, units).items():
                counts[part] += count * times
        terms = []
        for mask, count in counts.items():
            path = [group] if group else []
            path += [self.name_of(mask)] if mask != whole else []
            name = "/".join([*path, f"{source}_dependency"])
            numerator = (self.density(source, mask),)
            denominator = tuple(self.density(source, u & mask) for u in units if u & mask)
            # A sign is one unit: what counts twice is two terms (nested conditional
            # independence given two or more parts).
            for i in range(abs(count)):
                unit = sign if count > 0 else -sign
                terms.append(
                    Ratio(name + (f"_{i + 1}" if i else ""), unit, numerator, denominator)
                )
        return terms

    def _split_dependency(self, source: str, mask: int, units: Sequence[int]) -> Counter[int]:
        pieces = [unit & mask for unit in units if unit & mask]
        if len(pieces) < 2:  # one unit depends on nothing
            return Counter()
        for meets in self.meetings:
            met = meets((source, mask))
            if met is None:
                continue
            given, blocks = met
            # A unit that lies in several blocks must split with them.
            if not all(
                unit & given == given or any(not unit & ~(block | given) for block in blocks)
                for unit in pieces
            ):
                continue
            counts: Counter[int] = Counter()
            for block in blocks:
                counts.update(self._split_dependency(source, block | given, units))
            for part, count in self._split_dependency(source, given, units).items():
                counts[part] -= count * (len(blocks) - 1)
            return counts
        return Counter({mask: 1})

    # --- proof ---

    def expression(self, term: Ratio) -> Expression:
        above = [(1, d.source, mask_of(d.parts, self.position)) for d in term.numerator]
        below = [(-1, d.source, mask_of(d.parts, self.position)) for d in term.denominator]
        return expression_of(above + below)

    def normal(self, symbol: Symbol) -> Expression:
        """Rewrites one log density until no rule applies; the first rule that does counts."""
        if symbol not in self.memo:
            rewritten = next((e for rule in self.rules if (e := rule(symbol)) is not None), None)
            if rewritten is None:
                self.memo[symbol] = {symbol: 1}
            else:
                self.memo[symbol] = self.normalised(rewritten)
        return self.memo[symbol]

    def normalised(self, expression: Expression) -> Expression:
        total: Expression = {}
        for symbol, count in expression.items():
            add_to(total, self.normal(symbol), count)
        return total

    def is_zero(self, expression: Expression) -> bool:
        """Whether an expression is zero under the assumptions, as far as can be proved."""
        residual = self.normalised(expression)
        return not residual or self._follows(residual, expression)

    def _follows(self, residual: Expression, expression: Expression) -> bool:
        """Decides what rewriting by the first rule cannot, where two rules apply to one symbol.

        Their results are equal, which is a relation of its own: if p(a, b) = q(a, b) and a, b are
        independent under q, so they are under p. The residual follows if it is a combination of
        such relations between normal forms, which Gaussian elimination decides.
        """
        pivots: dict[Symbol, dict[Symbol, Fraction]] = {}

        def reduce(row: dict[Symbol, Fraction]) -> Symbol | None:
            """Eliminates in place from the largest symbol down; returns what has no pivot."""
            while row:
                largest = max(row, key=lambda symbol: (symbol[1].bit_count(), symbol))
                if largest not in pivots:
                    return largest
                factor = row[largest]
                for symbol, value in pivots[largest].items():
                    row[symbol] = row.get(symbol, Fraction(0)) - factor * value
                    if not row[symbol]:
                        del row[symbol]
            return None

        # Breadth first: the relations of the largest sets are those that the forms apply. Then
        # what is left, together with what an assumption is given: p(a, b, c) = p(a, b) p(c) and
        # p(a, b, c) = p(a, c) p(b, c) / p(c) say that a and b are independent without c too.
        seen = dict.fromkeys(expression)
        above = list(residual)
        for source, mask in above:
            if len(above) > self.MOST_SYMBOLS:
                break
            higher = {(source, mask | given): None for given in self.givens}
            above += [symbol for symbol in higher if symbol not in above]
        queue = deque(seen := seen | dict.fromkeys(above))
        for _ in range(self.MOST_SYMBOLS):
            if not queue:
                break
            symbol = queue.popleft()
            for rule in self.rules:
                rewritten = rule(symbol)
                if rewritten is None:
                    continue
                queue += [s for s in rewritten if s not in seen]
                seen |= dict.fromkeys(rewritten)
                relation = dict(self.normal(symbol))
                add_to(relation, self.normalised(rewritten), -1)
                row = {s: Fraction(count) for s, count in relation.items()}
                pivot = reduce(row)
                if pivot is not None:
                    pivots[pivot] = {s: value / row[pivot] for s, value in row.items()}
        return reduce({s: Fraction(count) for s, count in residual.items()}) is None

    def prove(self, terms: Iterable[Ratio]) -> None:
        """Raises unless the signed sum of the terms is log p - log q of all parts."""
        missing: Expression = {("p", self.everything): 1, ("q", self.everything): -1}
        summed = [term for term in terms if term.sign]
        if not summed and self.is_zero(missing):
            raise _nothing_to_learn(self.assuming)
        for term in summed:
            add_to(missing, self.expression(term), -term.sign)
        residual = self.normalised(missing)
        if residual and not self._follows(residual, missing):
            raise ValueError(self._explain(residual))

    def _explain(self, residual: Expression) -> str:
        everything = ", ".join(self.parts)
        message = (
            f"The signed sum of the terms is not log p({everything}) − log q({everything}); "
            f"missing: {self._write(residual)}."
        )
        for dependencies_first in (False, True):
            remedies = self._remedies(dict(residual), dependencies_first)
            if remedies is not None:
                return " ".join([message, *remedies])
        return (
            f"{message} Add or remove terms until nothing is missing, "
            "or state in `assuming` the relation that makes it zero."
        )

    def _remedies(self, rest: Expression, dependencies_first: bool) -> list[str] | None:
        """Reads marginals and dependencies from what is missing; None if something is left."""
        remedies: list[str] = []

        def marginals() -> None:
            for source, mask in sorted(rest, key=lambda symbol: (symbol[1].bit_count(), symbol)):
                if source == "p" and rest.get(("p", mask), 0) > 0 > rest.get(("q", mask), 0):
                    add_to(rest, {("p", mask): 1, ("q", mask): -1}, -1)
                    names = self.names(mask)
                    remedies.append(
                        f"Add a marginal discriminator for {_quoted(names)}, "
                        f"or pass assuming=[shared({', '.join(map(repr, names))})]."
                    )

        def dependencies() -> None:
            for source, mask in sorted(rest, key=lambda s: (-s[1].bit_count(), s)):
                sign = 1 if source == "p" else -1
                count = rest.get((source, mask), 0)
                if mask.bit_count() < 2 or count * sign <= 0:
                    continue
                single = [1 << i for i in range(len(self.parts)) if mask >> i & 1]
                whole = {(source, mask): sign, **{(source, part): -sign for part in single}}
                add_to(rest, whole, -1)
                names = self.names(mask)
                remedies.append(
                    f"Add the {source}-dependency of {_quoted(names)}, or pass "
                    f"assuming=[independent({', '.join(map(repr, names))}, under={source!r})]."
                )

        for step in (dependencies, marginals) if dependencies_first else (marginals, dependencies):
            step()
        return remedies if remedies and not rest else None

    def _write(self, expression: Expression) -> str:
        def size(item: tuple[Symbol, int]) -> tuple[bool, int, Symbol]:
            symbol, count = item
            return (count < 0, -symbol[1].bit_count(), symbol)

        text = ""
        for (source, mask), count in sorted(expression.items(), key=size):
            factor = f"{abs(count)} " if abs(count) > 1 else ""
            sign = ("" if count > 0 else "−") if not text else (" + " if count > 0 else " − ")
            text += f"{sign}{factor}log {self.density(source, mask)}"
        return text


def _nothing_to_learn(assuming: Iterable[Assumption]) -> ValueError:
    return ValueError(
        f"Under {', '.join(map(str, assuming)) or 'no assumption'} p equals q: "
        "nothing is left to discriminate. Drop an assumption."
    )


def junctions(cliques: Iterable[int]) -> Counter[int]:
    """Counts each clique once, less what each shares with those before it."""
    counts: Counter[int] = Counter()
    seen = 0
    for clique in cliques:
        counts[clique] += 1
        counts[clique & seen] -= 1
        seen |= clique
    return counts


def group_masks(top: Group, position: Mapping[str, int]) -> dict[Group, int]:
    """The set of parts of every group, units before the groups they are in."""
    order = [top]
    masks: dict[Group, int] = {}
    for group in order:
        order += group.units
    for group in reversed(order):
        if group.units:
            masks[group] = sum(masks[unit] for unit in group.units)
        else:
            masks[group] = 1 << position[group.name]
    return masks


def _quoted(names: tuple[str, ...]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(names)
