"""The digit classifier whose features and predictions measure generated digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from support.digits import CLASSES, Digits


class DigitClassifier(nn.Module):
    """The network of Table 3; for 8x8 digits with 3x3 filters and padding.

    Args:
        size: The height and width of the images: 28 or 8.
    """

    num_features = 50  # torchmetrics' FID asks its feature extractor for this

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
        self.fc1 = nn.Sequential(nn.Linear(flat, self.num_features), nn.LeakyReLU())
        self.fc2 = nn.Sequential(nn.Dropout(0.5), nn.Linear(self.num_features, CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """Returns the activations of FC1, with shape (N, 50), of images (N, S, S)."""
        return self.fc1(self.convolutions(images.unsqueeze(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of the classes, with shape (N, 10), of images (N, S, S)."""
        return self.fc2(self.features(images))


def train_classifier(
    train: Digits, test: Digits, device: torch.device, epochs: int = 20
) -> tuple[DigitClassifier, float]:
    """Trains the classifier, from the same seed always, so that scores can be compared.

    Returns:
        The classifier in eval mode, and its accuracy on the test digits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = DigitClassifier(train.images.shape[-1]).to(device)
        optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(train.labels)).split(64):
                images, labels = (t[batch].to(device) for t in train)
                optimiser.zero_grad()
                cross_entropy(classifier(images), labels).backward()
                optimiser.step()
    classifier.eval().requires_grad_(False)
    predicted = classify(classifier, test.images.to(device))
    return classifier, (predicted.cpu() == test.labels).double().mean().item()


@torch.no_grad()
def classify(classifier: DigitClassifier, images: Tensor) -> Tensor:
    """Returns the most probable class of every image, with shape (N,), int64."""
    return torch.cat([classifier(batch).argmax(1) for batch in images.split(1000)])
