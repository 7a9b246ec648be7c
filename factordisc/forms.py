"""From a tree of groups to the terms of its form, under the assumptions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from factordisc.algebra import Algebra, nothing_to_learn
from factordisc.densities import Markov, Ratio, Shared, between, mask_of
from factordisc.names import SOURCES

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


def marginal(algebra: Algebra, name: str, mask: int) -> Ratio:
    return Ratio(name, 1, (algebra.density("p", mask),), (algebra.density("q", mask),))


def target(algebra: Algebra, whole: int) -> int:
    """The parts of a set that are left when those leave that are shared given all others."""
    left = whole
    masks = [
        (mask_of(a.given, algebra.position), mask_of(a.parts, algebra.position))
        for a in algebra.assuming
        if isinstance(a, Shared)
    ]
    while left:
        given = next((b for b, both in masks if b != left and between(b, left, both)), None)
        if given is None:
            return left
        left = given
    raise nothing_to_learn(algebra.assuming)


def form(algebra: Algebra, top: Group, windows: bool = False) -> list[Ratio]:
    """Builds the terms of a tree from the top down, under the assumptions.

    Args:
        algebra: The parts, and what is assumed of them.
        top: The group of all parts.
        windows: In every dependency of a group, restrict the past to the last steps of a
            Markov assumption; the group is then the past and one step.
    """
    terms: list[Ratio] = []
    queue = deque([top])
    masks = group_masks(top, algebra.position)
    while queue:
        group = queue.popleft()
        left = target(algebra, masks[group])
        units = [unit for unit in group.units if masks[unit] & left]
        for unit in units:
            masks[unit] &= left
            p, q = ("p", masks[unit]), ("q", masks[unit])
            if not masks[unit] & ~algebra.agreed and algebra.is_zero({p: 1, q: -1}):
                continue
            if unit.units:
                queue.append(unit)
            else:
                terms.append(marginal(algebra, unit.name, masks[unit]))
        unit_masks = [masks[unit] for unit in units]
        for source in SOURCES:
            whole = window(algebra, source, unit_masks) if windows else left
            sets = Counter([whole])
            if group.cliques and source == "p":
                sets = junctions(mask_of(c, algebra.position) & left for c in group.cliques)
            terms += dependencies(algebra, source, whole, sets, unit_masks, group.name)
    return terms


def window(algebra: Algebra, source: str, units: Sequence[int]) -> int:
    """The last step and those before it on which it depends under a Markov assumption."""
    whole = sum(units)
    last = units[-1].bit_length() - 1
    for assumption in algebra.assuming:
        if isinstance(assumption, Markov) and assumption.under == source:
            first = last - assumption.order
            steps = (1 << (last + 1)) - (1 << first) if first >= 0 else 0
            if steps and whole & steps == steps:
                return steps
    return whole


def dependencies(
    algebra: Algebra,
    source: str,
    whole: int,
    sets: Mapping[int, int],
    units: Sequence[int],
    group: str,
) -> list[Ratio]:
    """The dependencies between units in some sets, or in those into which they split.

    Args:
        algebra: The parts, and what is assumed of them.
        source: The source.
        whole: The set whose dependency is called by the group alone.
        sets: How often the dependency of each set counts.
        units: The units of the group.
        group: The name of the group.
    """
    sign = 1 if source == "p" else -1
    counts: Counter[int] = Counter()
    for mask, count in sets.items():
        for part, times in _split_dependency(algebra, source, mask, units).items():
            counts[part] += count * times
    terms = []
    for mask, count in counts.items():
        path = [group] if group else []
        path += [algebra.name_of(mask)] if mask != whole else []
        name = "/".join([*path, f"{source}_dependency"])
        numerator = (algebra.density(source, mask),)
        denominator = tuple(algebra.density(source, u & mask) for u in units if u & mask)
        # A sign is one unit: what counts twice is two terms (nested conditional
        # independence given two or more parts).
        for i in range(abs(count)):
            unit = sign if count > 0 else -sign
            terms.append(Ratio(name + (f"_{i + 1}" if i else ""), unit, numerator, denominator))
    return terms


def _split_dependency(
    algebra: Algebra, source: str, mask: int, units: Sequence[int]
) -> Counter[int]:
    pieces = [unit & mask for unit in units if unit & mask]
    if len(pieces) < 2:  # one unit depends on nothing
        return Counter()
    for meets in algebra.meetings:
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
            counts.update(_split_dependency(algebra, source, block | given, units))
        for part, count in _split_dependency(algebra, source, given, units).items():
            counts[part] -= count * (len(blocks) - 1)
        return counts
    return Counter({mask: 1})


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
