"""Label maps as colours: the palettes of Cityscapes and CamVid, accuracy and error of a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Label(NamedTuple):
    """A label: its name, its colour in RGB (0 to 255), and whether evaluation ignores it."""

    name: str
    colour: tuple[int, int, int]
    ignored: bool = False


class Palette:
    """The labels of a data set, and which class a colour stands for.

    Maps are images, as in the paper (Section 4.3): a pixel is of the class whose colour is
    nearest in RGB space, by Euclidean distance; of the first one on a tie.

    Attributes:
        labels: All labels.
        colours: Their different colours in the order of the labels, in [0, 1], with shape (K, 3).
        evaluated: Which of these colours have a label that counts, with shape (K,), bool.
        ambiguous: Which of these have also a label that is ignored, with shape (K,), bool.

    Args:
        labels: All labels; several may have one colour.
    """

    def __init__(self, labels: Sequence[Label]) -> None:
        self.labels = tuple(labels)
        different = list(dict.fromkeys(label.colour for label in labels))
        counted = {label.colour for label in labels if not label.ignored}
        ignored = {label.colour for label in labels if label.ignored}
        self.colours = torch.tensor(different) / 255
        self.evaluated = torch.tensor([colour in counted for colour in different])
        self.ambiguous = torch.tensor([colour in counted & ignored for colour in different])

    def paint(self, classes: Tensor) -> Tensor:
        """Turns the numbers of labels (N, H, W) into colours (N, 3, H, W), uint8.

        Raises:
            ValueError: If a number is not that of a label.
        """
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < len(self):
            raise ValueError(
                f"Palette.paint expects the numbers 0 to {len(self) - 1} of its labels, "
                f"but got {int(classes.min())} to {int(classes.max())}."
            )
        table = torch.tensor([label.colour for label in self.labels], dtype=torch.uint8)
        return table[classes.long()].movedim(-1, 1)

    def nearest(self, maps: Tensor, among: Tensor | None = None) -> Tensor:
        """Returns the number of the nearest colour of every pixel, with shape (N, H, W), int64.

        Args:
            maps: Colours in [0, 1], with shape (N, 3, H, W).
            among: Which of the K colours to choose from, with shape (K,), bool. By default all.
        """
        numbers = torch.arange(len(self.colours)) if among is None else among.nonzero().flatten()
        numbers, colours = numbers.to(maps.device), self.colours.to(maps)[numbers.to("cpu")]
        # The fast way, by a matrix product, rounds so that ties fall anyhow.
        mode = "donot_use_mm_for_euclid_dist"
        nearest = [
            torch.cdist(one.flatten(1).T, colours, compute_mode=mode).argmin(1) for one in maps
        ]
        return numbers[torch.stack(nearest)].unflatten(1, maps.shape[2:])

    def __len__(self) -> int:
        return len(self.labels)


def pixel_accuracy(
    predicted: Tensor, true: Tensor, palette: Palette, *, ambiguous: bool = True
) -> float:
    """Returns the share of pixels whose class is right, in per cent.

    A predicted pixel is of the nearest class that is evaluated. A true pixel is of the nearest of
    all labels, since compression smears the colours of maps; it does not count where that
    label is ignored.

    Note:
        In Cityscapes' palette an ignored label has the colour of an evaluated one twice:
        licence plates that of cars, groups of poles that of poles. Such pixels are cars and poles
        almost always, so they count as these. The authors' code leaves them out, and so do
        the published numbers: ``ambiguous=False``. (It also takes the mean over images of
        each image's share, where this is the share of all pixels.)

    References:
        Stoller et al. (2020), Section 4.3.

    Args:
        predicted: Predicted colours in [0, 1], with shape (N, 3, H, W).
        true: True colours in [0, 1], with shape (N, 3, H, W).
        palette: The labels.
        ambiguous: Count pixels whose colour also is that of an ignored label.

    Raises:
        ValueError: If the shapes differ, or no pixel counts.
    """
    _check_shapes("pixel_accuracy", predicted, true)
    classes = palette.nearest(true)
    counted = palette.evaluated if ambiguous else palette.evaluated & ~palette.ambiguous
    counts = counted.to(true.device)[classes]
    if not counts.any():
        raise ValueError("pixel_accuracy expects pixels of evaluated classes, but got none.")
    right = palette.nearest(predicted, palette.evaluated) == classes
    return 100 * (right & counts).sum().item() / counts.sum().item()


def mean_squared_error(predicted: Tensor, true: Tensor) -> float:
    """Returns the mean squared difference of all colour values in [0, 1].

    References:
        Stoller et al. (2020), Section 4.3.

    Args:
        predicted: Predicted colours in [0, 1], with shape (N, 3, H, W).
        true: True colours in [0, 1], with shape (N, 3, H, W).

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes("mean_squared_error", predicted, true)
    return (predicted.double() - true.double()).square().mean().item()


def _check_shapes(who: str, predicted: Tensor, true: Tensor) -> None:
    if predicted.shape != true.shape or predicted.dim() != 4 or predicted.shape[1] != 3:
        raise ValueError(
            f"{who} expects two batches of maps with one shape (N, 3, H, W), "
            f"but got {tuple(predicted.shape)} and {tuple(true.shape)}."
        )


# The public definition of Cityscapes' labels: cityscapesscripts/helpers/labels.py in
# https://github.com/mcordts/cityscapesScripts (MIT licence), whose flag is "ignoreInEval".
CITYSCAPES = Palette(
    [
        Label("unlabeled", (0, 0, 0), ignored=True),
        Label("ego vehicle", (0, 0, 0), ignored=True),
        Label("rectification border", (0, 0, 0), ignored=True),
        Label("out of roi", (0, 0, 0), ignored=True),
        Label("static", (0, 0, 0), ignored=True),
        Label("dynamic", (111, 74, 0), ignored=True),
        Label("ground", (81, 0, 81), ignored=True),
        Label("road", (128, 64, 128)),
        Label("sidewalk", (244, 35, 232)),
        Label("parking", (250, 170, 160), ignored=True),
        Label("rail track", (230, 150, 140), ignored=True),
        Label("building", (70, 70, 70)),
        Label("wall", (102, 102, 156)),
        Label("fence", (190, 153, 153)),
        Label("guard rail", (180, 165, 180), ignored=True),
        Label("bridge", (150, 100, 100), ignored=True),
        Label("tunnel", (150, 120, 90), ignored=True),
        Label("pole", (153, 153, 153)),
        Label("polegroup", (153, 153, 153), ignored=True),
        Label("traffic light", (250, 170, 30)),
        Label("traffic sign", (220, 220, 0)),
        Label("vegetation", (107, 142, 35)),
        Label("terrain", (152, 251, 152)),
        Label("sky", (70, 130, 180)),
        Label("person", (220, 20, 60)),
        Label("rider", (255, 0, 0)),
        Label("car", (0, 0, 142)),
        Label("truck", (0, 0, 70)),
        Label("bus", (0, 60, 100)),
        Label("caravan", (0, 0, 90), ignored=True),
        Label("trailer", (0, 0, 110), ignored=True),
        Label("train", (0, 80, 100)),
        Label("motorcycle", (0, 0, 230)),
        Label("bicycle", (119, 11, 32)),
        Label("license plate", (0, 0, 142), ignored=True),
    ]
)

# The 11 classes of CamVid in the order and the colours of SegNet (Badrinarayanan et al., 2017):
# https://github.com/alexgkendall/SegNet-Tutorial, Scripts/test_segmentation_camvid.py.
CAMVID = Palette(
    [
        Label("sky", (128, 128, 128)),
        Label("building", (128, 0, 0)),
        Label("pole", (192, 192, 128)),
        Label("road", (128, 64, 128)),
        Label("pavement", (60, 40, 222)),
        Label("tree", (128, 128, 0)),
        Label("sign", (192, 128, 128)),
        Label("fence", (64, 64, 128)),
        Label("car", (64, 0, 128)),
        Label("pedestrian", (64, 64, 0)),
        Label("cyclist", (0, 128, 192)),
        Label("unlabelled", (0, 0, 0), ignored=True),
    ]
)
