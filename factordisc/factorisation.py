"""Factorisation: a signed sum of log density ratios that is log p(x) - log q(x); the forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from factordisc import drawing, forms
from factordisc.algebra import Algebra
from factordisc.densities import (
    Assumption,
    Density,
    Independent,
    Markov,
    Ratio,
    Shared,
    independent,
    markov,
    shared,
)
from factordisc.forms import Group
from factordisc.names import Pattern, check_part_name
from factordisc.patterns import Family

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Density", "Factorisation", "Ratio", "independent", "markov", "shared"]

Tree: TypeAlias = "Mapping[str, Tree] | Sequence[str]"


class Factorisation:
    r"""A signed sum of log density ratios that is proved to be log p(x) - log q(x).

    `joint`, `flat`, `hierarchical`, `autoregressive` and `causal` build the standard forms,
    `from_patterns` the one that uses all that is observed together; the constructor takes any
    terms. In all cases the sum is checked, exactly, when the object is made: every log density is
    rewritten under the assumptions, and what is left must be nothing. The proof is sound: a sum
    that it accepts is right wherever the assumptions hold.

    References:
        | Training Generative Adversarial Networks from Incomplete Observations using
          Factorised Discriminators (Stoller et al., 2020), Equations 1, 3, 4 and 6 to 9
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
        algebra = Algebra(parts, assuming)
        self.parts = algebra.parts
        self.assuming = algebra.assuming
        self.terms = tuple(algebra.canonical(term) for term in terms)
        names = Counter(term.name for term in self.terms)
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"{count} terms are called {name!r}. Give each its own name.")
        for term in self.terms:
            _check_given(term, self.terms)
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
        algebra = Algebra(parts, assuming)
        left = forms.target(algebra, algebra.everything)
        return cls(algebra.parts, [forms.marginal(algebra, "joint", left)], algebra.assuming)

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
        return cls._grown(Algebra(parts, assuming), tuple(Group(name) for name in parts))

    @classmethod
    def remainder(cls, parts: Sequence[str], assuming: Iterable[Assumption] = ()) -> Factorisation:
        """Builds the form of a marginal per part and one term for what they leave.

        The term, "remainder", is the joint ratio given the marginals: its network learns from
        complete observations against the generator's, with the sum of the marginals as an
        offset, and so is never asked where it was not trained. At its optimum it is the
        difference of the two dependencies of `flat`.

        Args:
            parts: The names of the parts.
            assuming: What is known about p and q: it removes marginals as in `flat`.

        Example:
            >>> print(Factorisation.remainder(["a", "b"]))
            log p(a, b) − log q(a, b) =
              + a          log p(a) − log q(a)                 from (a)
              + b          log p(b) − log q(b)                 from (b)
              + remainder  log p(a, b) − log q(a, b) − (a, b)  from (a, b)
        """
        flat = cls.flat(parts, assuming)
        marginals = [term for term in flat.terms if len(term.parts) == 1]
        left = tuple(dict.fromkeys(name for term in flat.terms for name in term.parts))
        p, q = Density("p", left), Density("q", left)
        given = tuple(term.name for term in marginals)
        rest = Ratio("remainder" if given else "joint", 1, (p,), (q,), given)
        return cls(flat.parts, [*marginals, rest], flat.assuming)

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
        return cls._grown(Algebra(names, assuming), tuple(groups))

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
        algebra = Algebra(parts, assuming)
        steps = algebra.names(forms.target(algebra, algebra.everything))
        past = Group(steps[0])
        for step in steps[1:-1]:
            past = Group(f"{steps[0]}:{step}", (past, Group(step)))
        groups = (past, Group(steps[-1])) if len(steps) > 1 else (past,)
        return cls._grown(algebra, groups, windows=True)

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
        algebra = Algebra(parts, ())
        terms = [forms.marginal(algebra, "joint", algebra.everything)]
        for number in prefixes:
            if type(number) is not int or not 0 < number < len(algebra.parts):
                raise ValueError(
                    f"`prefixes` are numbers of steps from 1 to {len(algebra.parts) - 1}, "
                    f"but got {number!r}."
                )
            first, last = algebra.parts[0], algebra.parts[number - 1]
            name = first if number == 1 else f"{first}:{last}"
            marginal = forms.marginal(algebra, name, (1 << number) - 1)
            terms.append(replace(marginal, sign=0))
        return cls(algebra.parts, terms)

    @classmethod
    def from_patterns(
        cls,
        parts: Sequence[str],
        patterns: Iterable[Pattern],
        assuming: Iterable[Assumption] = (),
    ) -> Factorisation:
        """Builds the form that learns from every pattern, the parts that are observed together.

        Where any two patterns are nested or disjoint it is the hierarchy of the patterns. Patterns
        that overlap are accepted if the assumptions say how what only one of them holds
        depends on what only the other holds, so that their p-dependency falls into those of
        the patterns (they are the cliques of a decomposable model). Groups are
        called by their parts.

        Args:
            parts: The names of the parts.
            patterns: Parts that are observed together: the keys of `Observations`. Part names,
                tuples of them, or "joint" for all parts.
            assuming: What is known about p and q.

        Raises:
            ValueError: If patterns clash, with the assumption that would mend it; or if a term
                needs parts together that no pattern holds.

        Example:
            >>> patterns = ["joint", ("eye_l", "brow_l"), ("eye_r", "brow_r"), "brow_l"]
            >>> parts = ["eye_l", "brow_l", "eye_r", "brow_r"]
            >>> tree = {"left": parts[:2], "right": parts[2:]}
            >>> Factorisation.from_patterns(parts, patterns) == Factorisation.hierarchical(tree)
            True
            >>> markets = independent("berlin", "tokyo", given="london", under="p")
            >>> patterns = [("berlin", "london"), ("london", "tokyo")]
            >>> Factorisation.from_patterns(
            ...     ["berlin", "london", "tokyo"], patterns, assuming=[markets]
            ... ).required_observations()
            (('berlin', 'london'), ('london', 'tokyo'))
        """
        algebra = Algebra(parts, assuming)
        family = Family(algebra, patterns)
        factorisation = cls(algebra.parts, forms.form(algebra, family.tree()), algebra.assuming)
        family.check_observed(factorisation.terms)
        return factorisation

    @classmethod
    def _grown(
        cls, algebra: Algebra, groups: tuple[Group, ...], windows: bool = False
    ) -> Factorisation:
        return cls(
            algebra.parts, forms.form(algebra, Group("", groups), windows), algebra.assuming
        )

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
        names = {}
        for inner in other.terms:
            name = group if inner.name == "joint" else inner.name
            inside_only = name.endswith("_dependency") or "/" in name or inner.given
            names[inner.name] = prefix + name if inside_only else name
        inside = tuple(names[inner.name] for inner in other.terms if inner.sign)
        terms: list[Ratio] = []
        for term in self.terms:
            if term is refined[0]:
                for inner in other.terms:
                    given = tuple(names[name] for name in inner.given)
                    sign = inner.sign * term.sign
                    terms.append(replace(inner, name=names[inner.name], sign=sign, given=given))
                continue
            given = tuple(
                new for old in term.given for new in (inside if old == refined[0].name else (old,))
            )
            terms.append(
                replace(
                    term,
                    numerator=tuple(_expanded(d, expands) for d in term.numerator),
                    denominator=tuple(_expanded(d, expands) for d in term.denominator),
                    given=given,
                )
            )
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
        largest = drawing.observed_together(self.terms)
        position = {name: i for i, name in enumerate(self.parts)}
        return tuple(sorted(largest, key=lambda parts: [position[name] for name in parts]))

    def to_latex(self) -> str:
        r"""Returns the equation as LaTeX: an ``aligned`` block, to stand in a displayed formula.

        Terms of sign 0 are not part of the sum, so they are left out.

        Example:
            >>> independence = independent("a", "b", under="p")
            >>> print(Factorisation.flat(["a", "b"], assuming=[independence]).to_latex())
            \begin{aligned}
            \log \frac{p(\mathrm{a},\mathrm{b})}{q(\mathrm{a},\mathrm{b})}
            ={}& \log \frac{p(\mathrm{a})}{q(\mathrm{a})} \\
            +{}& \log \frac{p(\mathrm{b})}{q(\mathrm{b})} \\
            -{}& \log \frac{q(\mathrm{a},\mathrm{b})}{q(\mathrm{a}) \, q(\mathrm{b})}
            \end{aligned}
        """
        return drawing.latex(self.parts, self.terms)

    def draw(self, ax: Axes | None = None) -> Axes:
        """Draws the tree of the parts, and for every term what it compares and what trains it.

        A row is a term. Green compares data with the generator's samples; a frame around blocks
        is a dependency: complete rows inside the frame against rows whose blocks come from
        different ones. Pale terms have sign 0: they are trained, but not summed.

        Args:
            ax: Axes to draw into. If ``None``, those of a new figure of fitting size.

        Returns:
            The axes; ``.figure.savefig(...)`` writes the picture.

        Raises:
            ImportError: If matplotlib is not installed, which factordisc does not require.
        """
        return drawing.draw(self.parts, self.terms, ax)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factorisation):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[object, ...]:
        def content(term: Ratio) -> tuple[object, ...]:
            given = frozenset(content(known[name]) for name in term.given)
            return (term.sign, term.numerator, term.denominator, given)

        known = {term.name: term for term in self.terms}
        return (self.parts, frozenset(map(content, self.terms)))

    def __repr__(self) -> str:
        terms = ", ".join(term.name for term in self.terms)
        return f"<Factorisation of {', '.join(self.parts)} into {terms}>"

    def __str__(self) -> str:
        everything = ", ".join(self.parts)
        name_width = max(len(term.name) for term in self.terms)
        ratio_width = max(len(str(term)) for term in self.terms)
        lines = [f"log p({everything}) − log q({everything}) ="]
        for term in self.terms:
            named = f"{drawing.SIGNS[term.sign]} {term.name:<{name_width}}"
            data = drawing.trained_by(term)
            lines.append(f"  {named}  {term!s:<{ratio_width}}  from {data}")
        lines += [f"assuming {assumption}" for assumption in self.assuming]
        return "\n".join(lines)


def _check_given(term: Ratio, terms: Sequence[Ratio]) -> None:
    """Refuses what a term cannot be given, with the reason."""
    known = {other.name: other for other in terms}
    for name in term.given:
        if name not in known:
            reason = f"there is no such term; the terms are {tuple(known)}"
        elif known[name].given:
            reason = "it is given terms itself"
        elif not known[name].sign:
            reason = "it is not part of the sum, since its sign is 0"
        elif not set(known[name].parts) <= set(term.parts):
            reason = f"it is about {known[name].parts}, but {term.name!r} about {term.parts}"
        else:
            continue
        raise ValueError(f"Term {term.name!r} cannot be given {name!r}: {reason}.")


def _read_tree(tree: Tree, path: str) -> list[Group]:
    """Makes groups of a mapping or a sequence; a group of one part is that part."""
    if isinstance(tree, str) or not isinstance(tree, (Mapping, Sequence)):
        raise TypeError(
            "A tree is a mapping from group names to trees, or a sequence of part names, "
            f"but got {tree!r}."
        )
    if not isinstance(tree, Mapping):
        for name in tree:
            check_part_name(name)
        return [Group(name) for name in tree]
    groups = []
    for name, inner in tree.items():
        check_part_name(name)
        units = _read_tree(inner, f"{path}{name}/")
        if not units:
            raise ValueError(f"Group {path + name!r} expects at least one part, but got none.")
        groups.append(units[0] if len(units) == 1 else Group(path + name, tuple(units)))
    parts = [leaf for group in groups for leaf in group.leaves()]
    for group in groups:
        if group.units and group.name.split("/")[-1] in parts:
            raise ValueError(
                f"Group {group.name!r} has the name of a part. Give the group another one."
            )
    return groups


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
