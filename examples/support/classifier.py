"""The digit classifier whose features and predictions measure generated digits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from support.digits import CLASSES, Digits
from support.results import write_tensors

FEATURES = 50


class DigitClassifier(nn.Module):
    """The network of Table 3; for 8x8 digits with 3x3 filters and padding.

    Args:
        size: The height and width of the images: 28 or 8.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        kernel, padding, flat = (5, 0, 320) if size == 28 else (3, 1, 80)
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 10, kernel, padding=padding),
            nn.AvgPool2d(2),
            nn.LeakyReLU(),
            nn.Conv2d(10, 20, kernel, padding=padding),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.fc1 = nn.Sequential(nn.Linear(flat, FEATURES), nn.LeakyReLU())
        self.fc2 = nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """Returns the activations of FC1, with shape (N, 50), of images (N, S, S)."""
        return self.fc1(self.convolutions(images.unsqueeze(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the classes, with shape (N, 10), of images (N, S, S)."""
        return self.fc2(self.features(images))


def get_classifier(
    path: Path, train: Digits, test: Digits, device: torch.device, epochs: int
) -> tuple[DigitClassifier, float]:
    """Trains the classifier, or loads it where an earlier run has trained it.

    Args:
        path: The file for its weights.
        train: The digits to train on.
        test: The digits that measure its accuracy.
        device: Where to compute.
        epochs: How often it sees every digit.

    Returns:
        The classifier in eval mode, and its accuracy on the test digits.
    """
    classifier = DigitClassifier(train.images.shape[-1])
    if path.exists():
        classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        classifier.to(device)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classifier = DigitClassifier(train.images.shape[-1]).to(device)
            _train(classifier, train, epochs)
        write_tensors(path, classifier.state_dict())
    classifier.eval().requires_grad_(False)
    right = [
        (classifier(images.to(device)).argmax(1).cpu() == labels).double()
        for images, labels in zip(test.images.split(1000), test.labels.split(1000), strict=True)
    ]
    return classifier, torch.cat(right).mean().item()


def _train(classifier: DigitClassifier, train: Digits, epochs: int) -> None:
    device = next(classifier.parameters()).device
    optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in tqdm(range(epochs), desc="classifier", unit="epoch"):
        for batch in torch.randperm(len(train.labels)).split(64):
            images, labels = (t[batch].to(device) for t in train)
            optimiser.zero_grad()
            cross_entropy(classifier(images), labels).backward()
            optimiser.step()
