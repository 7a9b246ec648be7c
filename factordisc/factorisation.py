"""Which signed sums of log density ratios are log p(x) - log q(x): the algebra, and the forms."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol, TypeAlias

from factordisc.partition import check_key, check_part_name

__all__ = ["Density", "Factorisation", "Ratio", "independent", "markov", "shared"]

SOURCES = ("p", "q")

# A log density is a source and a set of parts: bit i of the mask is part i. The empty set has
# density one, so its symbol never occurs.
Symbol: TypeAlias = tuple[str, int]
Expression: TypeAlias = dict[Symbol, int]
Rule: TypeAlias = Callable[[Symbol], "Expression | None"]
Tree: TypeAlias = "Mapping[str, Tree] | Sequence[str]"


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
        object.__setattr__(self, "parts", _names(self.parts, "The parts of a Density"))
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

    def __post_init__(self) -> None:
        check_key(self.name, "term")
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
        return above + "".join(f" − log {density}" for density in self.denominator)


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
        agreed, given = _mask(self.agreed, position), _mask(self.given, position)

        def rewrite(symbol: Symbol) -> Expression | None:
            source, parts = symbol
            if source != "q" or not _between(given, parts, agreed | given) or parts == given:
                return None
            return _expression([(1, "p", parts), (-1, "p", given), (1, "q", given)])

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

    def met(self, symbol: Symbol, position: Mapping[str, int]) -> tuple[int, list[int]] | None:
        """Returns the given parts and the blocks into which a set falls, if it falls apart."""
        source, parts = symbol
        given, covered = _mask(self.given, position), _mask(self.parts, position)
        if source != self.under or not _between(given, parts, covered):
            return None
        blocks = [parts & _mask(block, position) for block in self.blocks]
        blocks = [block for block in blocks if block]
        return (given, blocks) if len(blocks) > 1 else None

    def rule(self, position: Mapping[str, int]) -> Rule:
        def rewrite(symbol: Symbol) -> Expression | None:
            met = self.met(symbol, position)
            if met is None:
                return None
            given, blocks = met
            pieces = [(1, self.under, block | given) for block in blocks]
            return _expression([*pieces, (1 - len(blocks), self.under, given)])

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
                    return _expression(
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
    agreed, given = _names(parts, "shared"), _names(given, "`given` of shared")
    if not agreed:
        raise ValueError("shared expects the name of at least one part, but got none.")
    _check_disjoint([agreed, given], "shared")
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
    tuples = tuple(_names(block, "A block of independent") for block in blocks)
    given = _names(given, "`given` of independent")
    if len(tuples) < 2 or not all(tuples):
        raise ValueError(f"independent expects at least two blocks of parts, but got {blocks}.")
    _check_disjoint([*tuples, given], "independent")
    _check_source(under, "`under` of independent")
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
    _check_source(under, "`under` of markov")
    return Markov(order, under)


class Factorisation:
    r"""A signed sum of log density ratios that is proved to be log p(x) - log q(x).

    `joint` and `flat` build the standard forms; the constructor takes any terms. In all cases
    the sum is checked, exactly, when the object is made: every log density is rewritten
    under the assumptions, and what is left must be nothing. The proof is sound: a sum that it
    accepts is right wherever the assumptions hold.

    References:
        | Training Generative Adversarial Networks from Incomplete Observations using
          Factorised Discriminators (Stoller et al., 2020), Equations 1, 3, 4 and 6
        | https://arxiv.org/abs/1905.12660

    Args:
        parts: The names of the parts, in order; at least two.
        terms: The ratios. Their signed sum is log p(x) - log q(x).
        assuming: What is known about p and q: `shared` and `independent`.

    Attributes:
        parts: The names of the parts.
        terms: The `Ratio` of every term, with densities in the order of the parts.
        assuming: The assumptions.

    Raises:
        ValueError: If the sum is not log p(x) - log q(x), with what is missing and what would
            supply it; if names are unknown, repeated or not allowed.
        TypeError: If something is not of the kind described.

    Example:
        >>> print(Factorisation.flat(["top", "bottom"]))
        log p(top, bottom) − log q(top, bottom) =
          + top           log p(top) − log q(top)                          from (top)
          + bottom        log p(bottom) − log q(bottom)                    from (bottom)
          + p_dependency  log p(top, bottom) − log p(top) − log p(bottom)  from (top, bottom)
          − q_dependency  log q(top, bottom) − log q(top) − log q(bottom)  from the generator
    """

    def __init__(
        self,
        parts: Sequence[str],
        terms: Iterable[Ratio],
        assuming: Iterable[Assumption] = (),
    ) -> None:
        algebra = _Algebra(parts, assuming)
        self.parts = algebra.parts
        self.assuming = algebra.assuming
        self.terms = tuple(algebra.canonical(term) for term in terms)
        names = Counter(term.name for term in self.terms)
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"{count} terms are called {name!r}. Give each its own name.")
        algebra.prove(self.terms)

    @classmethod
    def joint(cls, parts: Sequence[str], assuming: Iterable[Assumption] = ()) -> Factorisation:
        """Builds the form of a plain GAN: one term, of whole observations.

        References:
            Stoller et al. (2020), Eq. 1; with `shared(..., given=...)` the right side of Eq. 6
            before it is factorised.

        Args:
            parts: The names of the parts.
            assuming: What is known about p and q.

        Example:
            >>> [str(term) for term in Factorisation.joint(["a", "b"]).terms]
            ['log p(a, b) − log q(a, b)']
        """
        algebra = _Algebra(parts, assuming)
        left = algebra.target(algebra.everything)
        return cls(algebra.parts, [algebra.marginal("joint", left)], algebra.assuming)

    @classmethod
    def flat(cls, parts: Sequence[str], assuming: Iterable[Assumption] = ()) -> Factorisation:
        """Builds the form of the paper: a marginal per part, a p- and a q-dependency.

        Assumptions remove terms, from the top down: parts that are `shared` given all others
        leave the problem; marginals that are equal under p and q are left out; a dependency
        whose blocks are `independent` becomes the sum of their dependencies.

        References:
            Stoller et al. (2020), Eq. 3 and Theorem 1; Eq. 4, Section 2.4 and Eq. 6 with
            assumptions.

        Args:
            parts: The names of the parts.
            assuming: What is known about p and q. Of several that apply, the first counts.

        Example:
            >>> eq4 = Factorisation.flat(["scene", "map"], assuming=[shared("scene")])
            >>> [term.name for term in eq4.terms]
            ['map', 'p_dependency', 'q_dependency']
        """
        return cls._grown(parts, [_Group(name) for name in parts], assuming)

    @classmethod
    def hierarchical(cls, tree: Tree, assuming: Iterable[Assumption] = ()) -> Factorisation:
        """Builds flat forms within flat forms: the marginal of a group is factorised again.

        Its dependencies combine groups, not parts, so they need complete observations of few
        blocks; observations of a group train what is within it.

        References:
            Stoller et al. (2020), Eq. 7.

        Args:
            tree: A mapping from group names to trees or to sequences of part names, of any depth.
                A group of one part is that part. `parts` is its order from left to right.
            assuming: What is known about p and q; it removes terms as in `flat`, from the top
                down.

        Raises:
            ValueError: If a group is empty or has the name of a part.

        Example:
            >>> tree = {"left": ["eye_l", "brow_l"], "right": ["eye_r", "brow_r"]}
            >>> [term.name for term in Factorisation.hierarchical(tree).terms if "/" in term.name]
            ['left/p_dependency', 'left/q_dependency', 'right/p_dependency', 'right/q_dependency']
        """
        groups = _read_tree(tree, "")
        names = [name for group in groups for name in group.leaves()]
        return cls._grown(names, groups, assuming)

    @classmethod
    def autoregressive(
        cls, parts: Sequence[str], assuming: Iterable[Assumption] = ()
    ) -> Factorisation:
        """Builds the form in which every step has a dependency on all steps before it.

        It is the flat form over the past and the last step, whose first marginal is replaced by
        the same again. The group of the first i parts is called "x1:xi". With `markov` under a
        source, the past in its dependencies is the last `order` steps.

        References:
            Stoller et al. (2020), Eq. 8.

        Args:
            parts: The names of the steps, in order.
            assuming: What is known about p and q.

        Example:
            >>> chain = Factorisation.autoregressive(["x1", "x2", "x3"])
            >>> [term.name for term in chain.terms if term.name.endswith("p_dependency")]
            ['p_dependency', 'x1:x2/p_dependency']
            >>> pair = ["x1", "x2"]
            >>> Factorisation.autoregressive(pair) == Factorisation.flat(pair)
            True
        """
        algebra = _Algebra(parts, assuming)
        steps = algebra.names(algebra.target(algebra.everything))
        past = _Group(steps[0])
        for step in steps[1:-1]:
            past = _Group(f"{steps[0]}:{step}", (past, _Group(step)))
        groups = [past, _Group(steps[-1])] if len(steps) > 1 else [past]
        return cls(algebra.parts, algebra.form(groups, windows=True), algebra.assuming)

    @classmethod
    def causal(cls, parts: Sequence[str], prefixes: Iterable[int] = ()) -> Factorisation:
        """Builds the joint form of a sequence, whose network gives a logit per step.

        The network's `logit` sums over the steps. Sequences that were cut train it through
        terms of sign 0, which the same network serves: they are not summed, and each averages
        its two classes by itself, so lengths never enter the ratio.

        References:
            Stoller et al. (2020), Eq. 9.

        Args:
            parts: The names of the steps, in order.
            prefixes: The numbers of steps of the observations that were cut.

        Example:
            >>> chain = Factorisation.causal(["x1", "x2", "x3"], prefixes=[2])
            >>> [(term.name, term.sign) for term in chain.terms]
            [('joint', 1), ('x1:x2', 0)]
        """
        algebra = _Algebra(parts, ())
        terms = [algebra.marginal("joint", algebra.everything)]
        for number in prefixes:
            if type(number) is not int or not 0 < number < len(algebra.parts):
                raise ValueError(
                    f"`prefixes` are numbers of steps from 1 to {len(algebra.parts) - 1}, "
                    f"but got {number!r}."
                )
            first, last = algebra.parts[0], algebra.parts[number - 1]
            name = first if number == 1 else f"{first}:{last}"
            marginal = algebra.marginal(name, (1 << number) - 1)
            terms.append(replace(marginal, sign=0))
        return cls(algebra.parts, terms)

    @classmethod
    def _grown(
        cls, parts: Sequence[str], groups: Sequence[_Group], assuming: Iterable[Assumption]
    ) -> Factorisation:
        algebra = _Algebra(parts, assuming)
        return cls(algebra.parts, algebra.form(groups), algebra.assuming)

    def refine(self, group: str, other: Factorisation) -> Factorisation:
        """Replaces the marginal of a group by a factorisation over the group's parts.

        Args:
            group: A part, which then stands for all parts of `other`; or the name of a term
                that is the marginal of exactly these parts.
            other: The factorisation of the group. Its assumptions are added.

        Returns:
            The refined factorisation. The dependencies of `other` are called
            "group/p_dependency" and so on.

        Raises:
            ValueError: If there is no such marginal, or a part would have two meanings.

        Example:
            >>> top = Factorisation.flat(["left", "right"])
            >>> left = Factorisation.flat(["eye", "brow"])
            >>> tree = {"left": ["eye", "brow"], "right": ["right"]}
            >>> top.refine("left", left) == Factorisation.hierarchical(tree)
            True
        """
        expands: dict[str, tuple[str, ...]] = {name: (name,) for name in self.parts}
        if group in self.parts:
            expands[group] = other.parts
        refined = [
            term
            for term in self.terms
            if len(term.numerator) == len(term.denominator) == 1
            and (term.numerator[0].source, term.denominator[0].source) == ("p", "q")
            and (term.parts == (group,) if group in self.parts else term.name == group)
        ]
        if not refined or (group not in self.parts and set(refined[0].parts) != set(other.parts)):
            raise ValueError(
                f"There is no marginal of {group!r} over {other.parts} to refine; "
                f"the terms are {tuple(term.name for term in self.terms)}."
            )
        prefix = "" if group == "joint" else f"{group}/"
        terms: list[Ratio] = []
        for term in self.terms:
            if term is not refined[0]:
                terms.append(
                    replace(
                        term,
                        numerator=tuple(_expanded(d, expands) for d in term.numerator),
                        denominator=tuple(_expanded(d, expands) for d in term.denominator),
                    )
                )
                continue
            for inner in other.terms:
                name = group if inner.name == "joint" else inner.name
                if name.endswith("_dependency") or "/" in name:
                    name = prefix + name
                terms.append(replace(inner, name=name, sign=inner.sign * term.sign))
        parts = [inner for name in self.parts for inner in expands[name]]
        assuming = [_bound(a, self.parts, expands) for a in self.assuming]
        own: dict[str, tuple[str, ...]] = {name: (name,) for name in other.parts}
        assuming += [_bound(a, other.parts, own) for a in other.assuming]
        return Factorisation(parts, terms, assuming)

    def required_observations(self) -> tuple[tuple[str, ...], ...]:
        """Returns the sets of parts that p must provide together: the largest, in order.

        Example:
            >>> Factorisation.flat(["a", "b"]).required_observations()
            (('a', 'b'),)
            >>> independence = independent("a", "b", under="p")
            >>> Factorisation.flat(["a", "b"], assuming=[independence]).required_observations()
            (('a',), ('b',))
        """
        seen = {
            density.parts
            for term in self.terms
            for density in (*term.numerator, *term.denominator)
            if density.source == "p"
        }
        largest = [a for a in seen if not any(set(a) < set(b) for b in seen)]
        position = {name: i for i, name in enumerate(self.parts)}
        return tuple(sorted(largest, key=lambda parts: [position[name] for name in parts]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factorisation):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[object, ...]:
        terms = frozenset((term.sign, term.numerator, term.denominator) for term in self.terms)
        return (self.parts, terms)

    def __repr__(self) -> str:
        terms = ", ".join(term.name for term in self.terms)
        return f"<Factorisation of {', '.join(self.parts)} into {terms}>"

    def __str__(self) -> str:
        everything = ", ".join(self.parts)
        name_width = max(len(term.name) for term in self.terms)
        ratio_width = max(len(str(term)) for term in self.terms)
        lines = [f"log p({everything}) − log q({everything}) ="]
        for term in self.terms:
            sign = {1: "+", -1: "−", 0: "0"}[term.sign]
            lines.append(
                f"  {sign} {term.name:<{name_width}}  {term!s:<{ratio_width}}  {_data(term)}"
            )
        lines += [f"assuming {assumption}" for assumption in self.assuming]
        return "\n".join(lines)


def _data(term: Ratio) -> str:
    """Says which data train a term."""
    groups = [d.parts for d in (*term.numerator, *term.denominator) if d.source == "p"]
    largest = [a for a in dict.fromkeys(groups) if not any(set(a) < set(b) for b in groups)]
    if not largest:
        return "from the generator"
    return "from " + " and ".join(f"({', '.join(parts)})" for parts in largest)


@dataclass(frozen=True, eq=False)
class _Group:
    """A node of the tree of a form: a group of units, or a part if it has none."""

    name: str
    units: tuple[_Group, ...] = ()

    def leaves(self) -> list[str]:
        if not self.units:
            return [self.name]
        return [leaf for unit in self.units for leaf in unit.leaves()]


def _read_tree(tree: Tree, path: str) -> list[_Group]:
    """Makes groups of a mapping or a sequence; a group of one part is that part."""
    if isinstance(tree, str) or not isinstance(tree, (Mapping, Sequence)):
        raise TypeError(
            "A tree is a mapping from group names to trees, or a sequence of part names, "
            f"but got {tree!r}."
        )
    if not isinstance(tree, Mapping):
        for name in tree:
            check_part_name(name)
        return [_Group(name) for name in tree]
    groups = []
    for name, inner in tree.items():
        check_part_name(name)
        units = _read_tree(inner, f"{path}{name}/")
        if not units:
            raise ValueError(f"Group {path + name!r} expects at least one part, but got none.")
        groups.append(units[0] if len(units) == 1 else _Group(path + name, tuple(units)))
    parts = [leaf for group in groups for leaf in group.leaves()]
    for group in groups:
        if group.units and group.name.split("/")[-1] in parts:
            raise ValueError(
                f"Group {group.name!r} has the name of a part. Give the group another one."
            )
    return groups


def _group_masks(top: _Group, position: Mapping[str, int]) -> dict[_Group, int]:
    """The set of parts of every group, units before the groups they are in."""
    order = [top]
    masks: dict[_Group, int] = {}
    for group in order:
        order += group.units
    for group in reversed(order):
        if group.units:
            masks[group] = sum(masks[unit] for unit in group.units)
        else:
            masks[group] = 1 << position[group.name]
    return masks


def _expanded(density: Density, expands: Mapping[str, tuple[str, ...]]) -> Density:
    return Density(density.source, tuple(new for old in density.parts for new in expands[old]))


def _bound(
    assumption: Assumption, parts: tuple[str, ...], expands: Mapping[str, tuple[str, ...]]
) -> Assumption:
    """Says an assumption about the parts of a refined factorisation."""

    def expanded(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new for old in names for new in expands[old])

    if isinstance(assumption, Shared):
        return Shared(expanded(assumption.agreed), expanded(assumption.given))
    if isinstance(assumption, Independent):
        blocks = tuple(expanded(block) for block in assumption.blocks)
        return Independent(blocks, expanded(assumption.given), assumption.under)
    if isinstance(assumption, Markov):
        among = assumption.among or parts
        for name in among:
            if len(expands[name]) > 1:
                raise ValueError(
                    f"Step {name!r} cannot be refined under {assumption}: the steps within it "
                    "would count as steps of the chain. State the independence of the blocks."
                )
        return Markov(assumption.order, assumption.under, expanded(among))
    return assumption


class _Algebra:
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
        self.rules = [a.rule(self.position) for a in (*splits, *shares)]
        # A marginal over any other part cannot be zero: let that part be independent under p,
        # and its distribution under q is free.
        self.agreed = 0
        for share in shares:
            self.agreed |= _mask(share.agreed, self.position)
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
                _check_source(density.source, f"Term {term.name!r}")
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
            (_mask(a.given, self.position), _mask(a.parts, self.position))
            for a in self.assuming
            if isinstance(a, Shared)
        ]
        while left:
            given = next((b for b, both in masks if b != left and _between(b, left, both)), None)
            if given is None:
                return left
            left = given
        raise _nothing_to_learn(self.assuming)

    def form(self, groups: Sequence[_Group], windows: bool = False) -> list[Ratio]:
        """Builds the terms of a tree from the top down, under the assumptions.

        Args:
            groups: The groups (or parts) at the top.
            windows: In every dependency of a group, restrict the past to the last steps of a
                Markov assumption; the group is then the past and one step.
        """
        terms: list[Ratio] = []
        queue = deque([_Group("", tuple(groups))])
        masks = _group_masks(queue[0], self.position)
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
                window = self.window(source, unit_masks) if windows else left
                terms += self.dependencies(source, window, unit_masks, group.name)
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
        self, source: str, whole: int, units: Sequence[int], group: str
    ) -> list[Ratio]:
        """The dependency between units, or those of the sets into which independence splits it."""
        sign = 1 if source == "p" else -1
        terms = []
        for mask, count in self._split_dependency(source, whole, units).items():
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
        for assumption in self.assuming:
            if not isinstance(assumption, Independent):
                continue
            met = assumption.met((source, mask), self.position)
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
        above = [(1, d.source, _mask(d.parts, self.position)) for d in term.numerator]
        below = [(-1, d.source, _mask(d.parts, self.position)) for d in term.denominator]
        return _expression(above + below)

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
            _add(total, self.normal(symbol), count)
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

        # Breadth first: the relations of the largest sets are those that the forms apply.
        queue, seen = deque(expression), set(expression)
        for _ in range(self.MOST_SYMBOLS):
            if not queue:
                break
            symbol = queue.popleft()
            for rule in self.rules:
                rewritten = rule(symbol)
                if rewritten is None:
                    continue
                queue += [s for s in rewritten if s not in seen]
                seen.update(rewritten)
                relation = dict(self.normal(symbol))
                _add(relation, self.normalised(rewritten), -1)
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
            _add(missing, self.expression(term), -term.sign)
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
                    _add(rest, {("p", mask): 1, ("q", mask): -1}, -1)
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
                _add(rest, whole, -1)
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


def _names(value: str | Iterable[str], what: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{what} expects the names of parts, but got {name!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{what} expects every part once, but got {names}.")
    return names


def _check_disjoint(groups: Sequence[tuple[str, ...]], what: str) -> None:
    counts = Counter(name for group in groups for name in group)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"{what} expects disjoint groups of parts, but {name!r} is in two.")


def _check_source(source: object, what: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"{what} expects a source, one of {SOURCES}, but got {source!r}.")


def _quoted(names: tuple[str, ...]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(names)


def _mask(names: Iterable[str], position: Mapping[str, int]) -> int:
    return sum(1 << position[name] for name in names)


def _between(smaller: int, mask: int, larger: int) -> bool:
    return mask & smaller == smaller and mask & ~larger == 0


def _expression(pieces: Iterable[tuple[int, str, int]]) -> Expression:
    total: Expression = {}
    for count, source, mask in pieces:
        if mask:
            _add(total, {(source, mask): 1}, count)
    return total


def _add(total: Expression, other: Expression, factor: int) -> None:
    for symbol, count in other.items():
        value = total.get(symbol, 0) + factor * count
        if value:
            total[symbol] = value
        else:
            total.pop(symbol, None)
