"""The U-Net that turns scenes into label maps and mixtures into masks (Tables 6 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NOISE_CHANNELS = 2


class UNet(nn.Module):
    """The network of Table 6: an encoder, noise at its end, and a decoder that sees its features.

    With F filters the encoder has F, 2F, 4F, 8F and 8F channels, at 1 to 1/16 of the resolution. A
    linear layer turns the noise into two more channels of the coarsest features. The decoder
    doubles the resolution four times, each time beside the encoder's features of that size.

    Note:
        Where the tables contradict themselves, their output shapes count. DoubleConv3 has 128
        outputs (not the 64 of its column "Outputs"); the first UpConv keeps its 258 channels
        (not 256), since 258 + 256 of DoubleConv4 are the 514 that follow; the C/2 of Table 7
        are the outputs of the block in which it stands, whatever its inputs. Not said are
        the filters of UpConv, 2x2 here, which with stride 2 double the size exactly; the
        last convolution's, 1x1 as in the original U-Net; and what follows the decoder's 3x3
        convolutions: batch normalisation and ReLU, as in Table 7.

    References:
        | Training Generative Adversarial Networks from Incomplete Observations using
          Factorised Discriminators (Stoller et al., 2020), Tables 6 and 7
        | U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger et al.,
          2015)

    Args:
        channels: The channels C of the input.
        outputs: The channels of the output; as many as the input's in Table 6.
        height: The height H of the input, a multiple of 16.
        width: The width W of the input, a multiple of 16.
        filters: The outputs F of the first block; 32 in Table 6.
        noise: The number of noise variables.

    Raises:
        ValueError: If the height or the width is not a positive multiple of 16.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        height: int,
        width: int,
        filters: int = 32,
        noise: int = 50,
    ) -> None:
        super().__init__()
        if height < 16 or width < 16 or height % 16 or width % 16:
            raise ValueError(
                "UNet halves its input four times, so it expects a height and a width that are "
                f"multiples of 16, but got {height} x {width}."
            )
        f, bottom = filters, 8 * filters + NOISE_CHANNELS
        self.double_conv1 = double_conv(channels, f)
        self.double_conv2 = double_conv(f, 2 * f)
        self.double_conv3 = double_conv(2 * f, 4 * f)
        self.double_conv4 = double_conv(4 * f, 8 * f)
        self.double_conv5 = double_conv(8 * f, 8 * f)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Sequential(
            nn.Linear(noise, NOISE_CHANNELS * (height // 16) * (width // 16)),
            nn.Unflatten(1, (NOISE_CHANNELS, height // 16, width // 16)),
        )
        self.up_conv4, self.conv4 = up_conv(bottom), conv(8 * f + bottom, 4 * f)
        self.up_conv3, self.conv3 = up_conv(4 * f), conv(8 * f, 2 * f)
        self.up_conv2, self.conv2 = up_conv(2 * f), conv(4 * f, f)
        self.up_conv1, self.conv1 = up_conv(f), conv(2 * f, f)
        self.output = nn.Conv2d(f, outputs, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Computes the output before the activation, which depends on the task.

        Args:
            x: The input, with shape (N, C, H, W).
            noise: Noise, with shape (N, `noise`).

        Returns:
            Real numbers, with shape (N, `outputs`, H, W).
        """
        one = self.double_conv1(x)
        two = self.double_conv2(self.pool(one))
        three = self.double_conv3(self.pool(two))
        four = self.double_conv4(self.pool(three))
        five = self.double_conv5(self.pool(four))
        y = torch.cat([five, self.fc(noise)], dim=1)
        y = self.conv4(torch.cat([four, self.up_conv4(y)], dim=1))
        y = self.conv3(torch.cat([three, self.up_conv3(y)], dim=1))
        y = self.conv2(torch.cat([two, self.up_conv2(y)], dim=1))
        y = self.conv1(torch.cat([one, self.up_conv1(y)], dim=1))
        return self.output(y)


def conv(channels: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution that keeps the size, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def double_conv(channels: int, outputs: int) -> nn.Sequential:
    """The block of Table 7: twice convolution, batch normalisation and ReLU."""
    return nn.Sequential(*conv(channels, outputs), *conv(outputs, outputs))


def up_conv(channels: int) -> nn.ConvTranspose2d:
    """A transposed convolution that doubles height and width and keeps the channels."""
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)
