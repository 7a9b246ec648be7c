"""Palettes, and the scores of predicted label maps."""

import pytest
import torch

from support.labels import (
    CAMVID,
    CITYSCAPES,
    Label,
    Palette,
    mean_squared_error,
    pixel_accuracy,
)

# Two classes that count, one that does not, and one that shares its colour with a class.
SMALL = Palette(
    [
        Label("void", (0, 0, 0), ignored=True),
        Label("road", (100, 0, 0)),
        Label("car", (0, 0, 200)),
        Label("plate", (0, 0, 200), ignored=True),
    ]
)
VOID, ROAD, CAR = (0, 0, 0), (100, 0, 0), (0, 0, 200)


def image(*rows):
    """A batch of one map with these rows of colours."""
    return torch.tensor(rows).movedim(-1, 0).unsqueeze(0) / 255


def test_accuracy_of_a_map_worked_by_hand():
    true = image([ROAD, ROAD, CAR, VOID])
    assert pixel_accuracy(true, true, SMALL) == 100
    # right, wrong, right; the last does not count
    predicted = image([ROAD, CAR, CAR, CAR])
    assert pixel_accuracy(predicted, true, SMALL) == pytest.approx(100 * 2 / 3)
    # without the colour that a plate could have: right, wrong
    assert pixel_accuracy(predicted, true, SMALL, ambiguous=False) == 50


def test_a_prediction_takes_the_nearest_class_that_counts_and_never_an_ignored_one():
    true = image([ROAD, CAR, CAR])
    # nearest to void, but of what counts to road; to car
    predicted = image([(10, 0, 0), (5, 0, 60), (0, 0, 255)])
    assert pixel_accuracy(predicted, true, SMALL) == pytest.approx(100 * 2 / 3)


def test_true_colours_smeared_by_compression_keep_their_class():
    torch.manual_seed(0)
    classes = torch.randint(len(CITYSCAPES), (4, 16, 16))
    clean = CITYSCAPES.paint(classes) / 255
    smeared = (clean + (torch.rand(clean.shape) - 0.5) * 10 / 255).clamp(0, 1)
    # The nearest two colours of the palette are 20 apart, the noise reaches 5 * sqrt(3).
    assert torch.equal(CITYSCAPES.nearest(smeared), CITYSCAPES.nearest(clean))
    predicted = CITYSCAPES.paint(torch.full_like(classes, 7)) / 255
    assert pixel_accuracy(predicted, smeared, CITYSCAPES) == pixel_accuracy(
        predicted, clean, CITYSCAPES
    )


def test_ties_go_to_the_first_label():
    palette = Palette([Label("a", (0, 0, 0)), Label("b", (100, 0, 0)), Label("c", (100, 100, 0))])
    # halfway between a and b, and between b and c
    assert palette.nearest(image([(50, 0, 0), (100, 50, 0)])).tolist() == [[[0, 1]]]
    # among b and c only, numbered as in the whole palette
    among = torch.tensor([False, True, True])
    assert palette.nearest(image([(0, 0, 0), (0, 90, 0)]), among).tolist() == [[[1, 2]]]


def test_every_pixel_weighs_alike_however_many_count_in_its_image():
    # One right of one, and none right of three: a mean over images would be 50.
    true = image([ROAD, VOID, VOID]), image([ROAD, ROAD, ROAD])
    predicted = image([ROAD, ROAD, ROAD]), image([CAR, CAR, CAR])
    assert pixel_accuracy(torch.cat(predicted), torch.cat(true), SMALL) == 25


def test_mean_squared_error_on_the_scale_of_0_to_1():
    zeros = torch.zeros(2, 3, 1, 2)
    ones = torch.cat([torch.ones(1, 3, 1, 2), zeros[:1]])
    assert mean_squared_error(zeros, ones) == 0.5
    assert mean_squared_error(zeros + 0.1, zeros) == pytest.approx(0.01)


@pytest.mark.parametrize("score", [mean_squared_error, lambda a, b: pixel_accuracy(a, b, SMALL)])
def test_maps_of_different_shapes_are_refused(score):
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 4\) and \(2, 3, 4, 1\)"):
        score(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 1))
    with pytest.raises(ValueError, match=r"one shape \(N, 3, H, W\)"):
        score(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4))


def test_maps_without_a_pixel_that_counts_have_no_accuracy():
    void = image([VOID, VOID])
    with pytest.raises(ValueError, match="pixels of evaluated classes, but got none"):
        pixel_accuracy(void, void, SMALL)


def test_the_palettes_are_the_published_ones():
    assert len(CITYSCAPES) == 35
    assert sum(not label.ignored for label in CITYSCAPES.labels) == 19
    assert int(CITYSCAPES.evaluated.sum()) == 19
    shared = [
        CITYSCAPES.colours[i].mul(255).round().tolist() for i in CITYSCAPES.ambiguous.nonzero()
    ]
    assert shared == [[[153, 153, 153]], [[0, 0, 142]]]  # poles and cars
    assert len(CAMVID) == 12
    assert int(CAMVID.evaluated.sum()) == 11
    assert not CAMVID.ambiguous.any()


def test_cityscapes_is_that_of_its_own_package():
    package = pytest.importorskip(
        "cityscapesscripts.helpers.labels", reason="needs cityscapesscripts"
    )
    assert [(e.name, e.color, e.ignoreInEval) for e in package.labels] == list(CITYSCAPES.labels)


def test_numbers_become_colours_and_colours_the_same_numbers():
    classes = torch.arange(12).reshape(1, 3, 4)
    painted = CAMVID.paint(classes)
    assert painted.dtype == torch.uint8
    assert painted[0, :, 0, 3].tolist() == [128, 64, 128]
    assert torch.equal(CAMVID.nearest(painted / 255), classes)
    with pytest.raises(ValueError, match="numbers 0 to 11 of its labels, but got 0 to 12"):
        CAMVID.paint(torch.tensor([[[0, 12]]]))
