"""The U-Net against Tables 6 and 7 of the paper, layer by layer."""

import pytest
import torch
from torch import nn

from support.unet import UNet

# Table 6 at height 2^W = 128 (W = 7) and C = 3: the shape (channels, height, width) that every
# row gives. Where "Outputs" and "Output shape" differ, the shape counts.
TABLE_6 = {
    "double_conv1": (32, 128, 128),
    "double_conv2": (64, 64, 64),
    "double_conv3": (128, 32, 32),
    "double_conv4": (256, 16, 16),
    "double_conv5": (256, 8, 8),
    "fc": (2, 8, 8),
    "up_conv4": (258, 16, 16),
    "conv4": (128, 16, 16),
    "up_conv3": (128, 32, 32),
    "conv3": (64, 32, 32),
    "up_conv2": (64, 64, 64),
    "conv2": (32, 64, 64),
    "up_conv1": (32, 128, 128),
    "conv1": (32, 128, 128),
    "output": (3, 128, 128),
}
# The channels that enter a row: in the decoder what "Concat" makes of two.
INPUTS = {
    "double_conv1": 3,
    "double_conv2": 32,
    "double_conv3": 64,
    "double_conv4": 128,
    "double_conv5": 256,
    "up_conv4": 258,
    "conv4": 514,
    "up_conv3": 128,
    "conv3": 256,
    "up_conv2": 64,
    "conv2": 128,
    "up_conv1": 32,
    "conv1": 64,
    "output": 32,
}


def traced(unet, *inputs):
    """Runs the network and returns what entered and left its named layers."""
    seen = {}
    for name in TABLE_6:
        unet.get_submodule(name).register_forward_hook(
            lambda _, arguments, out, name=name: seen.update(
                {name: (tuple(arguments[0].shape[1:]), tuple(out.shape[1:]))}
            )
        )
    return unet(*inputs), seen


def test_every_layer_has_the_shapes_of_table_6():
    _, seen = traced(UNet(3, 3, 128, 128), torch.rand(2, 3, 128, 128), torch.rand(2, 50))
    assert {name: out for name, (_, out) in seen.items()} == TABLE_6
    assert {name: shape[0] for name, (shape, _) in seen.items() if name != "fc"} == INPUTS
    assert seen["fc"][0] == (50,)
    # max pooling with stride 2 before every encoder block but the first
    for level, size in enumerate((128, 64, 32, 16, 8), 1):
        assert seen[f"double_conv{level}"][0][1:] == (size, size)


def test_parameters_are_those_that_table_6_adds_up_to():
    def conv(inputs, outputs):
        return 9 * inputs * outputs + outputs + 2 * outputs  # filters, biases, batch norm

    def double(inputs, outputs):
        return conv(inputs, outputs) + conv(outputs, outputs)

    def up(channels):
        return 4 * channels * channels + channels

    encoder = double(3, 32) + double(32, 64) + double(64, 128) + double(128, 256)
    encoder += double(256, 256) + 50 * 128 + 128
    decoder = up(258) + conv(514, 128) + up(128) + conv(256, 64)
    decoder += up(64) + conv(128, 32) + up(32) + conv(64, 32) + 32 * 3 + 3
    count = sum(p.numel() for p in UNet(3, 3, 128, 128).parameters())
    assert count == encoder + decoder == 3_510_389


def test_a_block_is_that_of_table_7():
    block = UNet(3, 3, 128, 128).double_conv2
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in block] == kinds
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in (block[0], block[3])] == [
        (32, 64, (3, 3)),
        (64, 64, (3, 3)),
    ]


def test_spectrograms_take_table_6_with_w_8():
    _, seen = traced(UNet(1, 1, 256, 128), torch.rand(1, 1, 256, 128), torch.rand(1, 50))
    assert seen["double_conv5"][1] == (256, 16, 8)
    assert seen["fc"][1] == (2, 16, 8)
    assert seen["output"][1] == (1, 256, 128)


def test_input_and_noise_reach_the_output_and_every_parameter_learns():
    torch.manual_seed(0)
    unet = UNet(1, 2, 16, 32, filters=4, noise=5).double().eval()
    x = torch.rand(3, 1, 16, 32, dtype=torch.float64)
    noise = torch.rand(3, 5, dtype=torch.float64)
    out = unet(x, noise)
    assert out.shape == (3, 2, 16, 32)
    assert not torch.allclose(unet(x, noise + 0.5), out)
    assert not torch.allclose(unet(x.flip(0), noise), out)
    # rows do not see each other out of training
    torch.testing.assert_close(unet(x[:1], noise[:1]), out[:1])
    # the output is not squashed: a task's own activation follows
    unet.output.bias.data.fill_(-7)
    assert unet(x, noise).max() < 0
    unet.train()(x, noise).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    assert unet.fc[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("height", "width"), [(128, 100), (8, 16), (0, 16)])
def test_sizes_that_cannot_be_halved_four_times_are_refused(height, width):
    with pytest.raises(ValueError, match=f"multiples of 16, but got {height} x {width}"):
        UNet(3, 3, height, width)
