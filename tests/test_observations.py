"""What a step has of real data, by the parts that were seen together."""

import numpy as np
import pytest
import torch

from factordisc import Observations


def test_observations_are_a_read_only_mapping_over_patterns():
    pairs, lone = torch.zeros(4, 2), torch.ones(9, 1)
    real = Observations({("b", "a"): pairs}, c=lone, d=None)
    assert real["a", "b"] is real["b", "a"] is pairs
    assert real["c"] is real[("c",)] is lone
    assert ("a", "b") in real
    assert "c" in real
    assert not any(key in real for key in ("a", "d", ("a", "c"), 3, ("a", 3), ()))
    assert list(real) == [("b", "a"), "c"]
    assert len(real) == 2
    assert real.get("a") is None
    assert not isinstance(real, dict)
    assert not hasattr(real, "__setitem__")
    assert repr(real) == "Observations({('b', 'a'): (4, 2), 'c': (9, 1)})"
    with pytest.raises(KeyError, match="'a' was not observed; there are"):
        real["a"]


def test_observations_move_and_convert_their_tensors():
    label = np.zeros(4)
    real = Observations({("a", "b"): (torch.zeros(4), label), "c": torch.zeros(2)})
    mapping = Observations({("a", "b"): {"a": torch.zeros(4), "b": torch.ones(4)}})
    moved = real.to(torch.float64)
    assert isinstance(moved, Observations)
    assert list(moved) == list(real)
    assert moved["c"].dtype == moved["a", "b"][0].dtype == torch.float64
    assert moved["a", "b"][1] is label
    assert real["c"].dtype == torch.float32
    assert mapping.to(dtype=torch.float16)["a", "b"]["b"].dtype == torch.float16
    assert real.to("meta")["c"].device.type == "meta"


def test_samples_with_holes_are_grouped_by_what_they_have():
    samples = [
        {"a": 1, "b": torch.ones(2)},
        {"a": 2, "b": None},
        {"b": torch.zeros(2), "a": 3},
        {"c": 4.0},
        {"a": 5},
    ]
    real = Observations.collate(samples)
    assert len(real) == 3
    assert real["a", "b"]["a"].tolist() == [1, 3]
    assert real["a", "b"]["b"].tolist() == [[1, 1], [0, 0]]
    assert real["a"].tolist() == [2, 5]
    assert real["c"].tolist() == [4]


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (
            ValueError,
            r"every pattern once, but got \('b', 'a'\) twice",
            lambda: Observations({("a", "b"): 0, ("b", "a"): 0}),
        ),
        (ValueError, "once, but got 'a' twice", lambda: Observations({("a",): 0}, a=0)),
        (ValueError, "once, but got 'a' twice", lambda: Observations({"a": None}, a=0)),
        (TypeError, "A pattern is the name of a part, .* got 3", lambda: Observations({3: 0})),
        (TypeError, r"but got \('a', 3\)", lambda: Observations({("a", 3): 0})),
        (ValueError, r"at least one part and each once", lambda: Observations({("a", "a"): 0})),
        (ValueError, r"or is 'joint', but got \(\)", lambda: Observations({(): 0})),
        (ValueError, "or is 'joint'", lambda: Observations({("a", "joint"): 0})),
        (
            TypeError,
            "expects mappings from part names to values, but sample 1 is of type tuple",
            lambda: Observations.collate([{"a": 1}, (1, 2)]),
        ),
        (
            ValueError,
            "Sample 1 has no observed parts. Leave it out",
            lambda: Observations.collate([{"a": 1}, {"a": None}]),
        ),
    ],
)
def test_what_makes_no_observations_is_refused(error, match, make):
    with pytest.raises(error, match=match):
        make()
