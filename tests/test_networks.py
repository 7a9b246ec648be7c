"""The convolutional networks against Tables 4 and 5, layer by layer."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from support.networks import bounded, make_critic, make_generator


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def shapes_of(network, inputs):
    """The output shape of every layer with weights, without the batch: as the tables print it."""
    shapes = []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            layer.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape[1:])))
    network(inputs)
    return shapes


@pytest.mark.parametrize("channels", [4, 6])
def test_the_generator_is_that_of_table_4(channels):
    generator = make_generator(channels)
    assert shapes_of(generator, torch.zeros(2, 50)) == [
        (1024, 4, 4),
        (512, 8, 8),
        (256, 16, 16),
        (128, 32, 32),
        (64, 64, 64),
        (channels, 64, 64),
    ]
    weights = 16 * (50 * 1024 + 1024 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * channels)
    biases = 1024 + 512 + 256 + 128 + 64 + channels
    assert parameters(generator) == weights + biases


def test_the_generator_makes_images_of_which_every_pixel_is_reached():
    generator = make_generator(4, filters=2)
    noise = torch.rand(3, 50) * 2 - 1
    images = generator(noise)
    assert images.shape == (3, 4, 64, 64)
    assert 0 < images.min() < images.max() < 1
    # the asymmetric padding leaves no border that is the last layer's bias alone
    bias = generator[-2].bias.sigmoid().reshape(4, 1, 1)
    assert ((images - bias).abs().amax((0, 1)) > 0).all()


def test_the_generator_starts_with_noise_that_reaches_its_output():
    torch.manual_seed(0)
    generator = make_generator(4, filters=16)
    signal = torch.rand(64, 50) * 2 - 1
    for layer in generator[:-3]:
        signal = layer(signal)
        if isinstance(layer, nn.ReLU):
            # 1/3 is the variance of the noise; with PyTorch's default it is below 0.001
            assert 0.1 < signal.square().mean() < 1
    spread = generator(torch.rand(64, 50) * 2 - 1).std(0).mean()
    assert 0.05 < spread < 0.3  # between samples, of pixels in [0, 1]


@pytest.mark.parametrize(("c", "w", "h"), [(4, 6, 6), (6, 7, 7), (3, 7, 7), (1, 8, 7), (2, 8, 7)])
def test_the_discriminator_is_that_of_table_5(c, w, h):
    critic = make_critic((c, 2**h, 2**w))
    assert shapes_of(critic, torch.zeros(2, c, 2**h, 2**w)) == [
        (32, 2 ** (h - 1), 2 ** (w - 1)),
        (64, 2 ** (h - 2), 2 ** (w - 2)),
        (128, 2 ** (h - 3), 2 ** (w - 3)),
        (256, 2 ** (h - 4), 2 ** (w - 4)),
        (512, 2 ** (h - 5), 2 ** (w - 5)),
        (1,),
    ]
    weights = 16 * (c * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * 512)
    biases = 32 + 64 + 128 + 256 + 512  # the last layer has none
    last = 2 ** (w - 5) * 2 ** (h - 5) * 512
    assert parameters(critic) == weights + biases + last


def test_the_filters_scale_every_layer():
    big = make_critic((4, 64, 64), filters=64)
    widths = [layer.out_channels for layer in big if isinstance(layer, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1024]
    # four times the weights between hidden layers
    assert 3.9 < parameters(big) / parameters(make_critic((4, 64, 64))) < 4


@pytest.mark.parametrize("normalise", [True, False])
def test_every_layer_of_a_discriminator_is_spectrally_normalised_or_none(normalise):
    critic = make_critic((1, 32, 32), filters=4, normalise=normalise)
    layers = [layer for layer in critic if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 6
    for _ in range(20):
        critic(torch.rand(2, 1, 32, 32))  # each pass in training mode refines the estimate
    for layer in layers:
        assert parametrize.is_parametrized(layer, "weight") == normalise
        if normalise:
            largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            torch.testing.assert_close(largest, torch.tensor(1.0), rtol=0.05, atol=0)


def test_logits_take_either_sign():
    # a LeakyReLU after the last layer would leave 1% of what is below zero
    torch.manual_seed(0)
    critic = make_critic((1, 32, 32), filters=4, normalise=False)
    images = torch.rand(4, 1, 32, 32)
    logits = critic(images)
    critic[-1].weight.data.neg_()
    torch.testing.assert_close(critic(images), -logits)


def test_sizes_that_cannot_be_halved_five_times_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 32.*but got the shape \(3, 48, 64\)"):
        make_critic((3, 48, 64))


def test_bounded_logits_stay_within_their_bound_and_keep_small_ones():
    logits = torch.tensor([[-100.0], [-0.01], [0.0], [0.01], [2.0], [100.0]], requires_grad=True)
    values = bounded(logits, 3.0)
    expected = torch.tensor([-3, -0.01, 0, 0.01, 3 * math.tanh(2 / 3), 3])
    torch.testing.assert_close(values.detach(), expected)
    values.sum().backward()
    assert logits.grad[2] == 1
    assert logits.grad[4] > 0
