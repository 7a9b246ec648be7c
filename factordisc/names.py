"""What a part, a term, a source and a pattern may be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar, cast

from torch import nn

__all__: list[str] = []

Pattern: TypeAlias = "str | tuple[str, ...]"

SOURCES = ("p", "q")

# Names that nn.ModuleDict would refuse (or worse, shadow) as the key of a network.
_MODULE_DICT = nn.ModuleDict()
_TERM_NAMES = ("joint", "p_dependency", "q_dependency")

T = TypeVar("T")


def check_part_name(name: object) -> None:
    """Refuses what cannot name a part, with the reason."""
    check_key(name, "part")
    if name in _TERM_NAMES:
        raise ValueError(
            f"{name!r} cannot name a part: it is the name of a term. Rename the part."
        )
    if "/" in cast(str, name):
        raise ValueError(
            f"{name!r} cannot name a part: '/' separates a group from its dependency "
            "in the names of terms. Rename the part."
        )


def check_key(name: object, what: str) -> None:
    """Refuses what cannot be a key of `nn.ModuleDict`; `what` is "part" or "term"."""
    if not isinstance(name, str):
        raise TypeError(f"A {what} name is a string, but got {name!r} of type {kind(name)}.")
    if not name:
        raise ValueError(f"A {what} name is a non-empty string, but got ''.")
    if "." in name:
        raise ValueError(
            f"{name!r} cannot name a {what}: '.' separates the levels of a state dict. "
            f"Rename the {what}."
        )
    if hasattr(_MODULE_DICT, name):
        raise ValueError(
            f"{name!r} cannot name a {what}: it is an attribute of nn.ModuleDict, "
            f"which holds the networks. Rename the {what}."
        )


def check_source(source: object, what: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"{what} expects a source, one of {SOURCES}, but got {source!r}.")


def pattern_names(pattern: object) -> tuple[str, ...]:
    """Returns the names in a pattern, which is a name, a tuple of names, or "joint"."""
    names = (pattern,) if isinstance(pattern, str) else pattern
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"A pattern is the name of a part, a tuple of names or 'joint', but got {pattern!r}."
        )
    if not names or len(set(names)) < len(names) or ("joint" in names and len(names) > 1):
        raise ValueError(
            f"A pattern names at least one part and each once, or is 'joint', but got {pattern!r}."
        )
    return names


def quoted(names: tuple[str, ...]) -> str:
    """Writes a part as its name and several as a tuple of names."""
    return repr(names[0]) if len(names) == 1 else repr(names)


def maximal(sets: Iterable[T], within: Callable[[T, T], bool]) -> list[T]:
    """Returns the sets, each once, that lie within no other."""
    different = list(dict.fromkeys(sets))
    return [a for a in different if not any(a != b and within(a, b) for b in different)]


def kind(x: object) -> str:
    return type(x).__name__
