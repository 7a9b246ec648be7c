"""Families of patterns: the tree of groups that learns from all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from factordisc.algebra import Algebra
from factordisc.densities import Ratio, expression_of, mask_of
from factordisc.forms import Group
from factordisc.names import Pattern, maximal, pattern_names, quoted

__all__: list[str] = []


class Family:
    """The sets of parts that are observed together.

    Args:
        algebra: The parts, and what is assumed of them.
        patterns: The patterns, as the keys of `Observations`.

    Raises:
        ValueError: If there is none, or one names an unknown part.
    """

    def __init__(self, algebra: Algebra, patterns: Iterable[Pattern]) -> None:
        if isinstance(patterns, str):
            raise TypeError(f"`patterns` expects a list of patterns, such as [{patterns!r}].")
        self.algebra = algebra
        masks = []
        for pattern in patterns:
            names = algebra.parts if pattern == "joint" else pattern_names(pattern)
            for name in names:
                if name not in algebra.position:
                    raise ValueError(
                        f"Pattern {pattern!r} names {name!r}, but the parts are {algebra.parts}."
                    )
            masks.append(mask_of(names, algebra.position))
        if not masks:
            raise ValueError("`patterns` expects at least one pattern, but got none.")
        self.masks = tuple(dict.fromkeys(masks))

    def tree(self) -> Group:
        """Returns the group of all parts, in which every pattern is a group or a clique.

        Raises:
            ValueError: If patterns overlap in a way that the assumptions do not resolve.
        """
        inner = [m for m in self.masks if m.bit_count() > 1 and m != self.algebra.everything]
        return self._group("", self.algebra.everything, inner)

    def check_observed(self, terms: Iterable[Ratio]) -> None:
        """Refuses terms that no pattern can train, with what would."""
        for term in terms:
            for density in (*term.numerator, *term.denominator):
                mask = mask_of(density.parts, self.algebra.position)
                if density.source == "p" and not any(mask & ~m == 0 for m in self.masks):
                    raise ValueError(self._unobserved(term, density.parts))

    def _group(self, name: str, whole: int, within: Sequence[int]) -> Group:
        """Makes a group of the largest patterns within a set and of the parts in none of them."""
        units: dict[int, Group] = {}
        for cluster in _clusters(maximal(within, _within)):
            union = _union(cluster)
            inner = [m for m in within if not m & ~union and m not in cluster]
            if len(cluster) == 1:
                units[union] = self._group(self._name(union), union, inner)
                continue
            cliques = self._cliques(cluster)
            for one in inner:
                crossed = next((m for m in (*cluster, *inner) if _overlap(one, m)), None)
                if crossed is not None:
                    raise ValueError(self._clash(one, crossed, crossed))
            if union == whole:
                return Group(name, self._group(name, whole, inner).units, cliques)
            unit = self._group(self._name(union), union, inner)
            units[union] = Group(unit.name, unit.units, cliques)
        rest = whole & ~_union(units)
        for part in self.algebra.names(rest):
            units[1 << self.algebra.position[part]] = Group(part)
        # in the order of the parts
        return Group(name, tuple(units[mask] for mask in sorted(units, key=_first)))

    def _cliques(self, cluster: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """Orders overlapping patterns so that each meets those before it within one of them.

        Raises:
            ValueError: If there is no such order, or the assumptions do not say that what a
                pattern adds depends on the others only through what it shares with them.
        """
        ordered, rest = [cluster[0]], list(cluster[1:])
        neighbours: dict[int, int] = {}
        while rest:
            # the largest overlap first: this finds an order if there is any (Prim's algorithm)
            size, chosen, neighbour = max(
                ((one & other).bit_count(), one, other) for one in rest for other in ordered
            )
            if size < (chosen & _union(ordered)).bit_count():
                raise ValueError(
                    f"The patterns {', '.join(str(self.algebra.names(m)) for m in cluster)} "
                    "overlap in a circle, so no assumption makes the whole of them. Observe "
                    f"{self.algebra.names(_union(cluster))} together, and leave a pattern out: "
                    "its samples still train its marginals."
                )
            ordered.append(chosen)
            neighbours[chosen] = neighbour
            rest.remove(chosen)
        seen = ordered[0]
        for chosen in ordered[1:]:
            through = chosen & seen
            p = [(1, "p", chosen | seen), (-1, "p", chosen), (-1, "p", seen), (1, "p", through)]
            if not self.algebra.is_zero(expression_of(p)):
                raise ValueError(self._clash(chosen, neighbours[chosen], seen))
            seen |= chosen
        return tuple(self.algebra.names(mask) for mask in ordered)

    def _clash(self, one: int, other: int, seen: int) -> str:
        names = self.algebra.names
        left, right, given = names(one & ~seen), names(seen & ~one), list(names(one & seen))
        return (
            f"The patterns {names(one)} and {names(other)} overlap, but neither holds the other, "
            "so their dependency cannot learn from both. If it is true, pass assuming="
            f"[independent({quoted(left)}, {quoted(right)}, given={given}, under='p')]; or leave "
            "one of the patterns out: its samples still train its marginals."
        )

    def _unobserved(self, term: Ratio, parts: tuple[str, ...]) -> str:
        if len(parts) == 1:
            return (
                f"No pattern holds {parts[0]!r}, which term {term.name!r} needs. Observe it, "
                f"or pass assuming=[shared({parts[0]!r})] if p and q agree there."
            )
        sides = (term.numerator, term.denominator)
        blocks = ", ".join(quoted(density.parts) for density in max(sides, key=len))
        return (
            f"No pattern holds {parts} together, which term {term.name!r} needs. Observe some "
            f"samples of them, or pass assuming=[independent({blocks}, under='p')] if that is "
            "true."
        )

    def _name(self, mask: int) -> str:
        return self.algebra.name_of(mask)


def _overlap(one: int, other: int) -> bool:
    """Whether two sets meet, and neither holds the other."""
    return bool(one & other) and bool(one & ~other) and bool(other & ~one)


def _clusters(masks: Iterable[int]) -> list[list[int]]:
    """Groups sets that meet, directly or through others."""
    clusters: list[list[int]] = []
    for mask in masks:
        met = [cluster for cluster in clusters if _union(cluster) & mask]
        clusters = [cluster for cluster in clusters if cluster not in met]
        clusters.append([*(m for cluster in met for m in cluster), mask])
    return clusters


def _union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _within(one: int, other: int) -> bool:
    return not one & ~other


def _first(mask: int) -> int:
    return mask & -mask
