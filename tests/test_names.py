"""What parts, terms, sources and patterns may be called."""

import pytest

from factordisc.names import (
    check_key,
    check_part_name,
    check_source,
    maximal,
    pattern_names,
    quoted,
)


@pytest.mark.parametrize("name", ["a", "left eye", "x+y", "1", "ä"])
def test_ordinary_names_are_allowed(name):
    check_part_name(name)
    check_key(f"{name}/p_dependency", "term")


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("", ValueError, "A part name is a non-empty string"),
        (3, TypeError, "A part name is a string, but got 3 of type int"),
        ("a.b", ValueError, r"'\.' separates the levels of a state dict"),
        ("a/b", ValueError, "'/' separates a group from its dependency"),
        ("joint", ValueError, "it is the name of a term"),
        ("keys", ValueError, "it is an attribute of nn.ModuleDict"),
    ],
)
def test_other_names_are_refused_with_the_reason(name, error, says):
    with pytest.raises(error, match=says):
        check_part_name(name)


def test_patterns_are_names_tuples_or_joint():
    assert pattern_names("a") == ("a",)
    assert pattern_names(("b", "a")) == ("b", "a")
    assert pattern_names("joint") == ("joint",)
    for pattern in (["a"], ("a", "joint"), ("a", "a"), ()):
        with pytest.raises((TypeError, ValueError), match="pattern"):
            pattern_names(pattern)


def test_sources_are_p_and_q():
    check_source("p", "It")
    with pytest.raises(ValueError, match=r"It expects a source, one of \('p', 'q'\), but got 'r'"):
        check_source("r", "It")


def test_the_maximal_sets_lie_within_no_other():
    sets = [("a",), ("a", "b"), ("c",), ("a", "b"), ("b",)]
    assert maximal(sets, lambda x, y: set(x) < set(y)) == [("a", "b"), ("c",)]
    assert maximal([0b01, 0b11, 0b100, 0b11], lambda x, y: not x & ~y) == [0b11, 0b100]
    assert maximal([], lambda x, y: True) == []


def test_one_part_is_quoted_as_its_name():
    assert quoted(("a",)) == "'a'"
    assert quoted(("a", "b")) == "('a', 'b')"
