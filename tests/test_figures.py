"""Figures that the experiments share."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from support import figures


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5)])
def test_a_grid_has_every_image_at_its_place(shape):
    images = torch.rand(6, *shape)
    laid = figures.grid(images, columns=3)
    assert laid.shape == ((12, 21, 3) if shape[0] == 3 else (12, 21))
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        placed = laid[6 * row + 1 : 6 * row + 5, 7 * column + 1 : 7 * column + 6]
        expected = image.permute(1, 2, 0).squeeze(2) if image.dim() == 3 else image
        np.testing.assert_array_equal(placed, expected.numpy())


def test_a_grid_with_a_row_that_is_not_full_is_refused():
    with pytest.raises(ValueError, match="a multiple of 4 images, but got 6"):
        figures.grid(torch.rand(6, 4, 5), columns=4)


def test_samples_in_grey_and_in_colour_are_drawn(tmp_path):
    samples = {"grey": torch.rand(12, 8, 8), "colour": torch.rand(12, 3, 8, 8)}
    figures.draw_samples(samples, tmp_path / "new" / "samples.png")
    assert (tmp_path / "new" / "samples.png").stat().st_size > 5000
    assert not plt.get_fignums()


def test_scores_against_pairs_are_means_with_their_range(axis):
    rows = [{"n": n, "score": n + s} for n in (100, 10) for s in (0, 1, 5)]
    figures.draw_against(axis, rows, "n", "score", "model", figures.COLOURS["gan"])
    (drawn,) = axis.containers
    line, _, (bars,) = drawn
    np.testing.assert_allclose(line.get_xydata(), [[10, 12], [100, 102]])
    np.testing.assert_allclose(
        bars.get_segments(), [[[10, 10], [10, 15]], [[100, 100], [100, 105]]]
    )
    assert line.get_color() == "#D55E00"


def test_a_model_that_sees_no_pairs_is_a_level_line_over_all_seeds(axis):
    rows = [{"n": 10, "score": s} for s in (1.0, 2.0, 6.0)]
    figures.draw_against(axis, rows, "n", "score", "model", "k", level=True)
    (line,) = axis.lines
    assert set(line.get_ydata()) == {3.0}


def test_published_points_are_marked_as_such_and_nothing_is_drawn_without_any(axis):
    figures.draw_published(axis, [(10, 1.0), (100, 2.0)], "gan", "k", bars=[0.5, 0.25])
    (drawn,) = axis.containers
    np.testing.assert_allclose(drawn[0].get_xydata(), [[10, 1], [100, 2]])
    assert drawn.get_label() == "gan, published"
    figures.draw_published(axis, [], "factorgan", "k")
    figures.draw_against(axis, [], "n", "score", "factorgan", "k")
    assert len(axis.containers) == 1


def test_published_figures_can_be_read():
    rows = figures.read_published("paired_mnist.csv")
    assert {(r["paired"], r["gan"]) for r in rows} >= {("10", "154.45")}
