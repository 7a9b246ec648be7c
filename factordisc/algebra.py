"""The algebra of log densities: normal forms, the proof of a sum, and what is missing in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from fractions import Fraction

from factordisc.densities import (
    Assumption,
    Density,
    Expression,
    Independent,
    Ratio,
    Shared,
    Symbol,
    add_to,
    agreement,
    expression_of,
    mask_of,
)
from factordisc.names import check_part_name, check_source, quoted

__all__: list[str] = []


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

        sides = (ordered(term.numerator), ordered(term.denominator))
        return Ratio(term.name, term.sign, *sides, term.given)

    def density(self, source: str, mask: int) -> Density:
        return Density(source, self.names(mask))

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
        known = {term.name: term for term in terms}
        summed = [term for term in known.values() if term.sign]
        if not summed and self.is_zero(missing):
            raise nothing_to_learn(self.assuming)
        for term in summed:
            add_to(missing, self.expression(term), -term.sign)
            for name in term.given:
                other = known[name]
                add_to(missing, self.expression(other), term.sign * other.sign)
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
                        f"Add a marginal discriminator for {quoted(names)}, "
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
                    f"Add the {source}-dependency of {quoted(names)}, or pass "
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


def nothing_to_learn(assuming: Iterable[Assumption]) -> ValueError:
    return ValueError(
        f"Under {', '.join(map(str, assuming)) or 'no assumption'} p equals q: "
        "nothing is left to discriminate. Drop an assumption."
    )
