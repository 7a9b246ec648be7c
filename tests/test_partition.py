"""A sample and its named parts, in four kinds of partition. (Boxes: test_layouts.py.)"""

from collections.abc import Mapping
from itertools import starmap
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from factordisc import Partition

# The same examples in every run: a failure here is never a matter of luck.
many = settings(max_examples=100, deadline=None, derandomize=True)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]


def numbered(*shape, dtype=torch.float64):
    """A tensor whose entries are all different, so that none can stand in for another."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def same(one, other):
    """Exactly equal, of one kind and dtype."""
    if isinstance(one, tuple):
        return type(other) is tuple and all(starmap(same, zip(one, other, strict=True)))
    equal = np.array_equal(one, other) if isinstance(one, np.ndarray) else torch.equal(one, other)
    return type(one) is type(other) and one.dtype == other.dtype and equal


def is_view(one, other):
    if isinstance(other, np.ndarray):
        return np.shares_memory(one, other)
    memory = other.untyped_storage()
    return memory.data_ptr() <= one.data_ptr() < memory.data_ptr() + memory.nbytes()


@st.composite
def along_a_dimension(draw):
    """A partition along one dimension, and a batch that it divides."""
    kind = draw(st.sampled_from(["slices", "indices", "steps"]))
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    sizes = [1] * len(sizes) if kind == "steps" else sizes
    ndim = draw(st.integers(2, 4))
    axis = draw(st.integers(1, ndim - 1))
    dim = draw(st.sampled_from([axis, axis - ndim]))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[axis] = sum(sizes)
    if kind == "steps":
        partition = Partition.steps(len(sizes), dim)
    elif kind == "slices":
        partition = Partition({f"part {i}": size for i, size in enumerate(sizes)}, dim)
    else:
        entries = iter(draw(st.permutations(range(sum(sizes)))))
        parts = {f"part {i}": [next(entries) for _ in range(n)] for i, n in enumerate(sizes)}
        partition = Partition.indices(parts, dim)
    x = numbered(*shape, dtype=draw(st.sampled_from(DTYPES)))
    return partition, x.numpy() if draw(st.booleans()) else x, axis


@many
@given(along_a_dimension())
def test_join_is_the_inverse_of_split(drawn):
    partition, x, axis = drawn
    before = x.copy() if isinstance(x, np.ndarray) else x.clone()
    parts = partition.split(x)
    assert tuple(parts) == partition.names
    assert all(part.ndim == x.ndim and part.dtype == x.dtype for part in parts.values())
    assert sum(part.shape[axis] for part in parts.values()) == x.shape[axis]
    assert same(partition.join(parts), x)
    assert same(partition.join(dict(reversed(parts.items()))), x)
    assert same(partition.take(parts, partition.names), x)
    assert same(x, before)


@many
@given(along_a_dimension(), st.data())
def test_restrict_divides_what_take_gives(drawn, data):
    partition, x, _ = drawn
    names = data.draw(st.sets(st.sampled_from(partition.names), min_size=1))
    taken, restricted = partition.take(x, names), partition.restrict(names)
    assert restricted.names == tuple(name for name in partition.names if name in names)
    for name, part in restricted.split(taken).items():
        assert same(part, partition.take(x, name))
    assert same(restricted.join(restricted.split(taken)), taken)


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("form", [tuple, list, dict])
def test_fields_are_taken_apart_and_joined(form, as_array):
    partition = Partition.fields("image", "label")
    fields = (numbered(4, 3, 2), numbered(4, dtype=torch.int64))
    fields = tuple(field.numpy() for field in fields) if as_array else fields
    x = {"label": fields[1], "image": fields[0]} if form is dict else form(fields)
    parts = partition.split(x)
    assert tuple(parts) == ("image", "label")
    assert same(parts["image"], fields[0])
    assert is_view(parts["image"], fields[0])
    assert same(partition.join(parts), fields)
    assert is_view(partition.take(x, "label"), fields[1])
    assert same(partition.take(x, ["label", "image"]), fields)


def test_a_restriction_to_one_field_divides_a_tensor():
    restricted = Partition.fields("image", "label").restrict("label")
    label = numbered(4, dtype=torch.int64)
    assert restricted.names == ("label",)
    for x in (label, (label,), {"label": label}):
        assert restricted.split(x)["label"] is label
    assert restricted.join({"label": label}) is label


# --- what a network receives ---


@pytest.mark.parametrize("numpy", [False, True])
def test_neighbours_are_a_view_and_all_parts_are_the_batch_itself(numpy):
    x = numbered(4, 6).numpy() if numpy else numbered(4, 6)
    slices = Partition({"a": 1, "b": 2, "c": 3})
    indices = Partition.indices({"a": [2, 1], "b": [3], "c": [0, 4, 5]})
    for partition in (slices, indices):
        assert partition.take(x, ["c", "a", "b"]) is x
        taken = partition.take(x, ["b", "a"])
        assert is_view(taken, x)
    assert same(slices.take(x, ["b", "a"]), x[:, :3])
    assert same(indices.take(x, ["b", "a"]), x[:, 1:4])


@pytest.mark.parametrize("numpy", [False, True])
def test_slices_come_in_the_order_of_the_parts(numpy):
    x = numbered(4, 6).numpy() if numpy else numbered(4, 6)
    taken = Partition({"a": 1, "b": 2, "c": 3}).take(x, ["c", "a"])
    assert same(taken, x[:, [0, 3, 4, 5]])


@pytest.mark.parametrize("numpy", [False, True])
def test_indices_come_in_their_original_order(numpy):
    x = numbered(4, 6).numpy() if numpy else numbered(4, 6)
    partition = Partition.indices({"a": [5, 1], "b": [3, 2], "c": [4, 0]})
    assert same(partition.take(x, "a"), x[:, [1, 5]])
    assert same(partition.take(x, ["c", "a"]), x[:, [0, 1, 4, 5]])


def test_indices_are_kept_for_every_device():
    partition = Partition.indices({"a": [5, 1], "b": [3, 2], "c": [4, 0]})
    take = partition._layout.taker(("a",))
    for device in ("cpu", "meta", "cpu"):
        (taken,) = take((numbered(4, 6).to(device),))
        assert taken.device.type == device
    assert {str(device): index.device.type for device, index in take.tensors.items()} == {
        "cpu": "cpu",
        "meta": "meta",
    }
    assert partition.take(numbered(4, 6).to("meta"), "a").device.type == "meta"


def test_a_step_keeps_its_dimension():
    x = numbered(4, 3, 2)
    partition = Partition.steps(3)
    assert partition.names == ("1", "2", "3")
    assert same(partition.take(x, "2"), x[:, 1:2])
    assert same(partition.take(x, ["3", "2"]), x[:, 1:])
    assert same(partition.take(x, ["3", "1"]), x[:, [0, 2]])
    assert Partition.steps(2, names=["now", "then"]).names == ("now", "then")


def test_a_negative_dim_counts_from_the_end():
    x = numbered(2, 5, 3)
    assert same(Partition({"a": 1, "b": 2}, dim=-1).take(x, "b"), x[..., 1:])
    assert same(
        Partition.indices({"a": [0, 4], "b": [1, 2, 3]}, dim=-2).take(x, "a"), x[:, [0, 4]]
    )
    assert same(Partition.steps(3, dim=-1).take(x, "3"), x[..., 2:])


def test_gradients_pass_through():
    x = numbered(2, 4).requires_grad_()
    partition = Partition.indices({"a": [0, 3], "b": [1, 2]})
    (gradient,) = torch.autograd.grad(partition.take(x, "a").sum(), x)
    assert gradient.tolist() == [[1, 0, 0, 1]] * 2
    (gradient,) = torch.autograd.grad(partition.join(partition.split(x)).sum(), x)
    assert gradient.tolist() == [[1, 1, 1, 1]] * 2


def test_an_empty_batch_has_parts():
    partition = Partition.indices({"a": [0, 3], "b": [1, 2]})
    assert partition.take(torch.zeros(0, 4), "a").shape == (0, 2)


# --- names, equality, repr ---

PARTITIONS = [
    (Partition({"a": 1, "b": 2}), "Partition({'a': 1, 'b': 2}, dim=1)"),
    (Partition({"a": 1, "b": 2}, dim=-1), "Partition({'a': 1, 'b': 2}, dim=-1)"),
    (Partition({"b": 1, "a": 2}), "Partition({'b': 1, 'a': 2}, dim=1)"),
    (
        Partition.indices({"a": [2, 0], "b": [1]}),
        "Partition.indices({'a': [0, 2], 'b': [1]}, dim=1)",
    ),
    (Partition.fields("a", "b"), "Partition.fields('a', 'b')"),
    (Partition.steps(2, dim=2), "Partition({'1': 1, '2': 1}, dim=2)"),
]


@pytest.mark.parametrize(("partition", "text"), PARTITIONS, ids=str)
def test_repr_makes_an_equal_partition(partition, text):
    assert repr(partition) == text
    again = eval(text)
    assert again == partition
    assert hash(again) == hash(partition)
    assert [other == partition for other, _ in PARTITIONS].count(True) == 1
    assert partition != text
    assert len(partition) == 2


def test_steps_are_slices_of_one():
    assert Partition.steps(2) == Partition({"1": 1, "2": 1})


def test_names_are_ordered_as_the_parts():
    partition = Partition({"b": 1, "a": 2, "c": 3})
    assert partition.restrict(["c", "b"]).names == ("b", "c")
    assert partition.restrict("c").names == ("c",)
    assert partition.restrict(("a", "c", "b")) is partition
    assert partition.restrict(["c", "b"]) == Partition({"b": 1, "c": 3})
    assert Partition.fields("x", "y", "z").restrict(["z", "x"]) == Partition.fields("x", "z")


# --- errors ---

SLICES = Partition({"a": 3, "b": 2})
INDICES = Partition.indices({"a": [0, 3], "b": [1, 2]})
FIELDS = Partition.fields("a", "b")
X = torch.zeros(8, 2)


@pytest.mark.parametrize(
    ("match", "make"),
    [
        (r"at least two parts, but got 1: \('a',\)", lambda: Partition({"a": 1})),
        (r"at least two parts, but got 0: \(\)", lambda: Partition.fields()),
        ("at least two parts, but got 1", lambda: Partition.indices({"a": [0]})),
        ("at least two parts, but got 1", lambda: Partition.steps(1)),
        ("'a' expects a size of at least 1, but got 0", lambda: Partition({"a": 0, "b": 1})),
        ("`dim` 0 is the batch", lambda: Partition({"a": 1, "b": 1}, dim=0)),
        ("`dim` 0 is the batch", lambda: Partition.indices({"a": [0], "b": [1]}, dim=0)),
        ("`dim` 0 is the batch", lambda: Partition.steps(2, dim=0)),
        ("index 0 stands in part 'a' and again in part 'b'", lambda: indices([0, 1], [0])),
        ("index 0 stands in part 'a' and again in part 'a'", lambda: indices([0, 0], [1])),
        ("cover 0 to 5, each index once, but index 1 belongs to no", lambda: indices([0], [5])),
        ("index 1 belongs to no part", lambda: indices([-1], [0])),
        ("'b' expects at least one index, but got none", lambda: indices([0], [])),
        (r"every name once, but got \('a', 'b', 'a'\)", lambda: Partition.fields("a", "b", "a")),
        (
            r"expects 3 different names, but got \['a', 'b'\]",
            lambda: Partition.steps(3, names=["a", "b"]),
        ),
        (
            r"2 different names, but got \['a', 'b', 'b'\]",
            lambda: Partition.steps(2, names=["a", "b", "b"]),
        ),
        ("non-empty string, but got ''", lambda: Partition({"": 1, "b": 1})),
        (r"'a\.b' cannot name a part: '\.' separates", lambda: Partition.fields("a.b", "c")),
        ("'a/b' cannot name a part: '/' separates", lambda: Partition.fields("a/b", "c")),
        ("'joint' cannot name a part: it is the name", lambda: Partition.fields("joint", "c")),
        ("'keys' cannot name a part: it is an attr", lambda: Partition({"keys": 1, "c": 1})),
        ("'type' cannot name a part", lambda: Partition.indices({"type": [0], "c": [1]})),
        ("'train' cannot name a part", lambda: Partition.steps(2, names=["train", "a"])),
    ],
)
def test_what_makes_no_partition_is_refused(match, make):
    with pytest.raises(ValueError, match=match):
        make()


def indices(a, b):
    return Partition.indices({"a": a, "b": b})


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("expects a mapping from part names to sizes, .* but got list", lambda: Partition(["a"])),
        ("Partition.indices expects a mapping, but got list", lambda: Partition.indices([0])),
        ("A part name is a string, but got 1 of type int", lambda: Partition({1: 1, "b": 1})),
        ("The size of part 'a' is an integer, but got 1.5", lambda: Partition({"a": 1.5})),
        ("The size of part 'a' is an integer, but got True", lambda: Partition({"a": True})),
        ("`dim` is an integer, but got '1' of type str", lambda: Partition.steps(2, dim="1")),
        ("An index of part 'a' is an integer, but got 0.5", lambda: indices([0.5], [1])),
        ("The number of steps is an integer, but got 2.0", lambda: Partition.steps(2.0)),
        ("A part name is a string, but got 3", lambda: Partition.fields("a", 3)),
    ],
)
def test_what_is_of_another_kind_is_refused(match, make):
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize(
    ("error", "match", "partition", "x"),
    [
        (ValueError, r"5 entries along dim 1, but got x with shape \(8, 6\)", SLICES, [8, 6]),
        (ValueError, r"4 entries along dim 1, but got x with shape \(8, 6\)", INDICES, [8, 6]),
        (ValueError, r"dim 1 behind the batch, but got x with shape \(8,\)", SLICES, [8]),
        (
            ValueError,
            r"dim -2 behind the batch, but got x with shape \(4, 8\)",
            Partition({"a": 3, "b": 1}, dim=-2),
            [4, 8],
        ),
        (TypeError, "expects a tensor or an array, but got tuple", SLICES, (X, X)),
        (ValueError, r"expects the parts \('a', 'b'\), .*: 'b' is missing", SLICES, {"a": X}),
        (TypeError, r"a tuple or a mapping of 2 arrays, but got Tensor", FIELDS, [8, 2]),
        (
            ValueError,
            r"Partition.fields\('a', 'b'\) expects 2 fields, but got 3",
            FIELDS,
            (X,) * 3,
        ),
        (TypeError, "Part 'b' expects a tensor or an array, but got list", FIELDS, (X, [0] * 8)),
        (ValueError, "Part 'b' expects a batch dimension", FIELDS, (X, torch.tensor(1.0))),
        (
            ValueError,
            r"one length, but got \{'a': 8, 'b': 4\}.*Observations\(scene=",
            FIELDS,
            {"a": X, "b": X[:4]},
        ),
        (ValueError, r"got \('a', 'b', 'c'\): 'c' is unknown", FIELDS, {"a": X, "b": X, "c": X}),
    ],
)
@pytest.mark.parametrize("method", ["split", "take"])
def test_a_batch_that_does_not_fit_is_refused(method, error, match, partition, x):
    x = torch.zeros(x) if isinstance(x, list) else x
    with pytest.raises(error, match=match):
        partition.take(x, "a") if method == "take" else getattr(partition, method)(x)


@pytest.mark.parametrize(
    ("error", "match", "parts"),
    [
        (ValueError, r"expects the parts \('a', 'b'\), but got \('a',\): 'b' is m", {"a": X}),
        (ValueError, "'c' is unknown", {"a": X, "b": X, "c": X}),
        (
            ValueError,
            r"Part 'a' of .* expects 8 observations with 3 entries along dim 1, "
            r"but got shape \(8, 2\)",
            {"a": X, "b": X},
        ),
        (
            ValueError,
            r"Part 'b' of .* expects 4 observations with 2 entries .* got shape \(8, 2\)",
            {"a": torch.zeros(4, 3), "b": X},
        ),
        (TypeError, "Part 'b' expects a tensor or an array, but got list", {"a": X, "b": []}),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(error, match, parts):
    if error is TypeError:
        parts["a"] = torch.zeros(8, 3)
    with pytest.raises(error, match=match):
        SLICES.join(parts)


@pytest.mark.parametrize(
    ("match", "names"),
    [
        (r"has no part 'z'\. Its parts are \('a', 'b'\)", ["z"]),
        (r"at least one part and each once, but got \(\)", []),
        (r"at least one part and each once, but got \('a', 'a'\)", ["a", "a"]),
    ],
)
def test_names_that_do_not_fit_are_refused(match, names):
    for call in (SLICES.restrict, lambda n: SLICES.take(torch.zeros(8, 5), n)):
        with pytest.raises(ValueError, match=match):
            call(names)


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_rows_are_recombined_from_the_observations_that_are_named(kind):
    orders = {"a": torch.tensor([2, 0, 0, 1]), "b": torch.tensor([1, 1, 2, 0])}
    a, b = torch.arange(3.0).reshape(3, 1), torch.arange(10.0, 16).reshape(3, 2)
    expected = torch.cat([a[orders["a"]], b[orders["b"]]], dim=1)
    x = torch.cat([a, b], dim=1)
    give = (lambda t: t) if kind is torch.Tensor else (lambda t: t.numpy())
    slices = Partition({"a": 1, "b": 2})
    assert torch.equal(torch.as_tensor(slices.recombine(give(x), orders)), expected)
    indices = Partition.indices({"a": [1], "b": [0, 2]})
    mixed = indices.recombine(give(x[:, [1, 0, 2]]), orders)
    assert torch.equal(torch.as_tensor(mixed), expected[:, [1, 0, 2]])
    fields = Partition.fields("a", "b").recombine((give(a), give(b)), orders)
    assert torch.equal(torch.cat([torch.as_tensor(f) for f in fields], dim=1), expected)
    with pytest.raises(ValueError, match="'b' is missing"):
        slices.recombine(give(x), {"a": orders["a"]})


@pytest.mark.parametrize(
    ("error", "match", "order"),
    [
        (
            ValueError,
            r"one length .* part 'b' has shape \(2,\), where \(3,\)",
            torch.tensor([0, 1]),
        ),
        (ValueError, r"part 'b' has shape \(1, 3\)", torch.tensor([[0, 1, 2]])),
        (
            ValueError,
            r"'b' names observations from 0 to 8, but there are 8",
            torch.tensor([0, 8, 1]),
        ),
        (ValueError, r"'b' names observations from -1 to 1", torch.tensor([0, -1, 1])),
        (
            TypeError,
            r"'b' is a tensor of int64, but got a tensor of torch.float32",
            torch.zeros(3),
        ),
        (TypeError, r"'b' is a tensor of int64, but got list", [0, 1, 2]),
    ],
)
def test_orders_that_name_no_rows_are_refused(error, match, order):
    for partition, x in ((SLICES, torch.zeros(8, 5)), (FIELDS, (X, X))):
        with pytest.raises(error, match=match):
            partition.recombine(x, {"a": torch.tensor([2, 1, 0]), "b": order})


class Swapped(NamedTuple):
    b: torch.Tensor
    a: torch.Tensor


class Keyed(Mapping):
    """A mapping that yields rows when it is iterated over, as a TensorDict does."""

    def __init__(self, entries):
        self.entries = entries

    def __getitem__(self, name):
        return self.entries[name]

    def __iter__(self):
        return iter(range(2))  # rows, not names

    def __len__(self):
        return 2

    def keys(self):
        return self.entries.keys()


@pytest.mark.parametrize(
    "make", [lambda a, b: Swapped(b, a), lambda a, b: Keyed({"b": b, "a": a})]
)
def test_what_has_names_is_read_by_name(make):
    a, b = numbered(4, 3), 100 + numbered(4, 2)
    for partition in (FIELDS, SLICES):
        parts = partition.split(make(a, b))
        assert same(parts["a"], a)
        assert same(parts["b"], b)
    with pytest.raises(ValueError, match=r"expects the parts \('a', 'c'\).*'c' is missing"):
        Partition.fields("a", "c").split(make(a, b))


def test_the_public_surface_is_what_is_documented():
    public = {name for name in dir(Partition) if not name.startswith("_")}
    kinds = {"indices", "boxes", "fields", "steps"}
    assert public == kinds | {"names", "split", "join", "take", "restrict", "recombine"}


def test_arrays_that_torch_cannot_share_are_copied():
    backwards = np.arange(20.0).reshape(4, 5)[::-1]
    fixed = np.arange(20.0).reshape(4, 5)
    fixed.flags.writeable = False
    for x in (backwards, fixed):
        assert np.array_equal(SLICES.split(x)["b"], x[:, 3:])
