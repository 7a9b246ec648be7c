"""Boxes: regions of an array as parts. (The other layouts: test_partition.py.)"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close

from factordisc import (
    Density,
    DependencySampler,
    DiscriminatorLoss,
    Factorisation,
    FactorisedDiscriminator,
    ObservationLoader,
    Observations,
    Partition,
    Ratio,
)

many = settings(max_examples=100, deadline=None, derandomize=True)


def tiles(draw, shape, number):
    """Cuts a box again and again: any guillotine tiling of a shape."""
    boxes = [tuple((0, size) for size in shape)]
    for _ in range(number - 1):
        cuttable = [(b, d) for b in boxes for d in range(len(shape)) if b[d][1] - b[d][0] > 1]
        if not cuttable:
            break
        box, d = draw(st.sampled_from(cuttable))
        cut = draw(st.integers(box[d][0] + 1, box[d][1] - 1))
        boxes.remove(box)
        boxes += [(*box[:d], (box[d][0], cut), *box[d + 1 :])]
        boxes += [(*box[:d], (cut, box[d][1]), *box[d + 1 :])]
    order = draw(st.permutations(boxes))
    return {f"part {i}": tuple(slice(a, b) for a, b in box) for i, box in enumerate(order)}


@st.composite
def tiled(draw):
    """A partition into boxes, and a batch whose entries are all different."""
    shape = tuple(draw(st.lists(st.integers(2, 5), min_size=1, max_size=3)))
    boxes = tiles(draw, shape, draw(st.integers(2, 5)))
    channels = draw(st.sampled_from([(), (2,), (2, 1)]))
    full = (3, *channels, *shape)
    x = torch.arange(int(np.prod(full))).reshape(full)
    return Partition.boxes(boxes, shape), boxes, x.numpy() if draw(st.booleans()) else x


def mask(boxes, names, shape):
    covered = np.zeros(shape, dtype=bool)
    for name in names:
        covered[boxes[name]] = True
    return covered


@many
@given(tiled(), st.data())
def test_join_is_the_inverse_of_split_and_take_gives_the_box_around_the_parts(drawn, data):
    partition, boxes, x = drawn
    shape = x.shape[-len(next(iter(boxes.values()))) :]
    parts = partition.split(x)
    for name, part in parts.items():
        assert (part == x[(..., *boxes[name])]).all()
    joined = partition.join(parts)
    assert type(joined) is type(x)
    assert joined.dtype == x.dtype
    assert (joined == x).all()
    assert partition.take(x, partition.names) is x

    names = data.draw(st.sets(st.sampled_from(partition.names), min_size=1))
    restricted = partition.restrict(names)
    covered = mask(boxes, names, shape)
    around = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(covered))
    if covered[around].all():
        cut = partition.take(x, names)
        assert (cut == x[(..., *around)]).all()
    else:
        with pytest.raises(ValueError, match=r"do not fill .* `inputs=`"):
            partition.take(x, names)
        # such boxes are several tensors, in the order of the parts
        cut = tuple(parts[name] for name in restricted.names)
    assert restricted.names == tuple(name for name in partition.names if name in names)
    for name, part in restricted.split(cut).items():
        assert (part == parts[name]).all()
    # what was cut can be cut again, also where a box comes out of parts that were none
    fewer = data.draw(st.sets(st.sampled_from(sorted(names)), min_size=1))
    inner = restricted.restrict(fewer)
    if not isinstance(partition_input(inner, parts), tuple):
        again, direct = restricted.take(cut, fewer), partition.take(x, fewer)
        assert (again == direct).all()


def partition_input(partition, parts):
    return partition.join({name: parts[name] for name in partition.names})


QUARTERS = Partition.boxes(
    {
        "tl": (slice(0, 2), slice(0, 3)),
        "tr": (slice(0, 2), slice(3, 4)),
        "bl": (slice(2, 5), slice(0, 3)),
        "br": (slice(2, 5), slice(3, 4)),
    },
    shape=(5, 4),
)
PARTS = ("tl", "tr", "bl", "br")


def coded(rows):
    """Images whose every pixel is the number of the observation."""
    return torch.arange(rows).reshape(-1, 1, 1, 1).expand(rows, 2, 5, 4).clone()


@pytest.mark.parametrize("kind", ["tensor", "channels_last", "numpy", "gradient", "mapping"])
def test_drawn_rows_have_no_two_parts_of_one_observation(kind):
    x = coded(9)
    if kind == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if kind == "gradient":
        x = x.double().requires_grad_()
    given = {"numpy": x.numpy, "mapping": lambda: QUARTERS.split(x)}.get(kind, lambda: x)()
    drawn = QUARTERS.split(DependencySampler(QUARTERS)(given))
    numbers = []
    for name in PARTS:
        flat = np.asarray(drawn[name].detach() if kind == "gradient" else drawn[name])
        assert flat.shape[1:] == tuple(QUARTERS.take(coded(1), name).shape[1:])
        numbers.append(flat.reshape(9, -1))
        assert (numbers[-1] == numbers[-1][:, :1]).all()
        assert sorted(numbers[-1][:, 0]) == list(range(9))
    table = np.stack([n[:, 0] for n in numbers])
    assert all(len(set(row)) == 4 for row in table.T)
    if kind == "gradient":
        (gradient,) = torch.autograd.grad(sum(p.sum() for p in drawn.values()), x)
        assert (gradient == 1).all()


def corner_ratio():
    p = Density("p", ("tl",)), Density("p", ("br",))
    return Ratio("corners", 0, [Density("p", ("tl", "br"))], p)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *images):
        return sum(image.double().flatten(1).mean(1) for image in images) * self.scale


def with_corners(**options):
    flat = Factorisation.flat(PARTS)
    factorisation = Factorisation(PARTS, [*flat.terms, corner_ratio()])
    networks = {term.name: Mean() for term in factorisation.terms}
    return FactorisedDiscriminator(QUARTERS, factorisation, networks, **options)


def test_a_term_whose_parts_fill_no_box_needs_inputs():
    with pytest.raises(ValueError, match=r"term 'corners'.*\('tl', 'br'\).*`inputs=`.*\(tl, br\)"):
        with_corners()
    d = with_corners(inputs={"corners": lambda tl, br: (tl[..., :1, :1], br[..., :1, :1])})
    x = coded(6)
    assert_close(d.terms(x)["corners"], 2 * torch.arange(6).double())
    assert_close(d.term("corners", (x[..., :2, :3], x[..., 2:, 3:])), 2 * torch.arange(6).double())
    assert_close(d.terms(x)["tl"], torch.arange(6).double())
    # losses: complete images, corners seen together, and a step that lacks them
    criterion = DiscriminatorLoss(d)
    corners = {"tl": x[..., :2, :3], "br": x[..., 2:, 3:]}
    for real in (
        x,
        Observations({("br", "tl"): corners}, joint=x),
        Observations({("tl", "br"): tuple(corners.values())}, tl=x[..., :2, :3]),
        Observations(tr=x[..., :2, 3:]),
    ):
        criterion(real, x).backward()
    assert d.networks["corners"].scale.grad is not None


def test_a_loader_crops_images_to_boxes():
    partition = QUARTERS
    loader = ObservationLoader(
        {"joint": coded(8), ("tl", "tr"): coded(4)[..., :2, :], "br": coded(4)[..., 2:, 3:]},
        partition,
        batch_size=4,
        rng=torch.Generator().manual_seed(0),
    )
    real = next(iter(loader))
    assert real["tl", "tr"].shape == (4, 2, 2, 4)
    assert real["br"].shape == (4, 2, 3, 1)
    assert real["joint"].shape == (4, 2, 5, 4)


def test_integers_and_floats_join_without_loss():
    parts = QUARTERS.split(coded(2))
    parts["br"] = parts["br"].double() + 0.5
    joined = QUARTERS.join(parts)
    assert joined.dtype == torch.float64
    assert (joined[..., 2:, 3:] == parts["br"]).all()


def test_equal_boxes_are_equal_partitions():
    halves = {"l": (slice(None), slice(0, 2)), "r": (slice(0, 5), slice(2, None))}
    written = "{'l': (slice(0, 5), slice(0, 2)), 'r': (slice(0, 5), slice(2, 4))}"
    partition = Partition.boxes(halves, shape=(5, 4))
    assert repr(partition) == f"Partition.boxes({written}, shape=(5, 4))"
    assert eval(repr(partition)) == partition
    assert partition != QUARTERS


FULL = slice(None)


@pytest.mark.parametrize(
    ("boxes", "shape", "error", "message"),
    [
        ([("a", (FULL,))], (4,), TypeError, "expects a mapping, but got list"),
        ({"a": (slice(0, 3),), "b": (slice(2, 4),)}, (4,), ValueError, "'a' and 'b' do"),
        ({"a": (slice(0, 1),), "b": (slice(2, 4),)}, (4,), ValueError, r"\(1,\) belongs to no"),
        ({"a": (FULL,), "b": (FULL,)}, (4, 4), ValueError, "'a' expects 2 slices"),
        ({"a": (slice(0, 4, 2),), "b": (slice(1, 4, 2),)}, (4,), ValueError, "slices of step 1"),
        ({"a": (slice(0, 4),), "b": (slice(4, 8),)}, (4,), ValueError, "that are not empty"),
        ({"a": (slice(0, 2),), "b": (slice(2, 9),)}, (4,), ValueError, r"lie within \(4,\), but"),
        ({"a": (slice(0, 2),), "b": slice(2, 4)}, (4,), TypeError, "'b' expects a tuple of"),
        ({"a": (3,), "b": (slice(2, 4),)}, (4,), TypeError, "'a' expects a tuple of slices"),
        ({"a": (FULL,)}, (4,), ValueError, "at least two parts"),
        ({"a.b": (FULL,)}, (4,), ValueError, "cannot name a part"),
        ({"a": (FULL,)}, (4.0,), TypeError, "A size of `shape` is an integer"),
    ],
)
def test_what_are_no_boxes_is_refused(boxes, shape, error, message):
    with pytest.raises(error, match=message):
        Partition.boxes(boxes, shape)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (
            lambda: QUARTERS.split(torch.zeros(3, 4, 5)),
            ValueError,
            r"last dimensions are \(5, 4\)",
        ),
        (lambda: QUARTERS.split(torch.zeros(5, 4)), ValueError, r"got shape \(5, 4\)"),
        (lambda: QUARTERS.split([1]), TypeError, "a tensor or an array, but got list"),
        (
            lambda: QUARTERS.join(dict.fromkeys(PARTS, torch.zeros(3, 2, 3))),
            ValueError,
            r"Part 'tr' expects .* \(2, 1\), but got shape \(3, 2, 3\)",
        ),
        (
            lambda: QUARTERS.join(QUARTERS.split(coded(2)) | {"br": torch.zeros(3, 2, 3, 1)}),
            ValueError,
            r"one batch size .* 'tl' has shape \(2, 2, 2, 3\) and 'br' \(3, 2, 3, 1\)",
        ),
        (
            lambda: QUARTERS.restrict(["tl", "br"]).split(torch.zeros(3, 5, 4)),
            TypeError,
            r"\('tl', 'br'\) do not fill a box.*a tuple of 2 tensors, but got Tensor",
        ),
        (
            lambda: QUARTERS.join(QUARTERS.split(coded(2)) | {"br": 3}),
            TypeError,
            "Part 'br' expects a tensor or an array, but got int",
        ),
        (lambda: QUARTERS.split({"tl": torch.zeros(1)}), ValueError, "'tr' is missing"),
    ],
)
def test_what_does_not_fit_the_boxes_is_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()
