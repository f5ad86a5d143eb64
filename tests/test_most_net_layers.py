"""MOST-Net: the layers in their order, against PyTorch's own put together as the specification lists them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from most_net.model import Architecture, Decoder, Discriminator, Encoder, KeyHead, MostNet

ARCH = Architecture(base=4, slots=6)
"""The full size's layers, with a sixteenth of its channels."""


def conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel)]


def normed(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(channels), nn.ReLU()]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*conv(16, 16, 3), *normed(16), *conv(16, 16, 3), nn.InstanceNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def encoder(inputs: int) -> nn.Sequential:
    down = [nn.Conv2d(4, 8, 4, 2, 1), *normed(8), nn.Conv2d(8, 16, 4, 2, 1), *normed(16)]
    blocks = [Block() for _ in range(4)]
    return nn.Sequential(*conv(inputs, 4, 7), *normed(4), *down, *blocks, nn.GroupNorm(1, 16))


def decoder() -> nn.Sequential:
    up = [nn.ConvTranspose2d(16, 8, 4, 2, 1), *normed(8), nn.ConvTranspose2d(8, 4, 4, 2, 1), *normed(4)]
    return nn.Sequential(*(Block() for _ in range(4)), *up, *conv(4, 1, 7))


@pytest.mark.parametrize(
    "ours, plain, inputs",
    [
        (Encoder(3, ARCH), encoder(3), 3),
        (Encoder(1, ARCH), encoder(1), 1),
        (Decoder(ARCH), decoder(), 16),
    ],
)
def test_encoders_and_decoder_are_the_listed_layers(ours, plain, inputs):
    plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, inputs, 32, 24, generator=torch.Generator().manual_seed(0))
    expected = plain(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_queries_are_centred_and_of_unit_length():
    head, f = KeyHead(16), torch.randn(2, 16, 8, 6) + 5
    expected = F.normalize(nn.InstanceNorm2d(16)(head.project(f)), dim=1)
    torch.testing.assert_close(head(f), expected, rtol=1e-4, atol=1e-5)


def test_a_sketch_is_decoded_from_statistics_and_strokes():
    net, f, v = MostNet(ARCH), torch.randn(2, 16, 8, 6), 2 * torch.randn(2, 16, 8, 6) + 1
    moments = [x.var((2, 3), keepdim=True, correction=0).add(1e-5).sqrt() for x in (f, v)]
    styled = (f - f.mean((2, 3), keepdim=True)) / moments[0] * moments[1] + v.mean((2, 3), keepdim=True)
    expected = net.decoder(net.fuse(torch.cat([styled, v], 1)))
    torch.testing.assert_close(net.decode(f, v), expected, rtol=1e-3, atol=1e-4)


def test_without_a_memory_a_convolution_takes_its_place():
    net, photo = MostNet(ARCH, "none"), torch.rand(1, 3, 32, 24)
    f = net.photo_encoder(photo)
    expected = net.decoder(net.fuse(torch.cat([f, net.substitute(f)], 1)))
    torch.testing.assert_close(net(photo)["sketch"], expected)
    torch.testing.assert_close(net.sketch(photo), expected.clamp(-1, 1))


def test_odd_sides_are_padded_with_their_border_and_cropped():
    net, photo = MostNet(ARCH).eval(), torch.rand(1, 3, 37, 50) * 2 - 1
    whole = net.sketch(F.pad(photo, (0, 2, 0, 3), mode="replicate"))
    torch.testing.assert_close(net.sketch(photo), whole[..., :37, :50])


def test_every_layer_of_the_discriminator_has_the_spectral_norm():
    disc, photo, sketch = Discriminator(4), torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32)
    for _ in range(60):  # each pass goes on with the power iteration
        got = disc(photo, sketch)
    convs = [layer for layer in disc.body if isinstance(layer, nn.Conv2d)]
    assert [layer.stride[0] for layer in convs] == [2, 2, 2, 1, 1]
    weights = [layer.weight.detach() for layer in convs]
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, rel=0.02)
    x = torch.cat([photo, sketch], 1)
    for weight, stride in zip(weights, (2, 2, 2, 1, 1), strict=True):
        x = F.conv2d(x, weight, stride=stride, padding=1)
        x = F.leaky_relu(x, 0.2) if len(weight) > 1 else x
    torch.testing.assert_close(got, x, rtol=1e-2, atol=1e-3)


def test_the_memory_stays_in_float32_under_autocast():
    net, photo, sketch = MostNet(ARCH), torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(photo, sketch)
        assert out["features"].dtype == torch.bfloat16
        assert out["queries"].dtype == out["scores"].dtype == out["retrieved"].dtype == torch.float32
        before = net.memories[0].keys.clone()
        net.write(out)
    torch.testing.assert_close(out["scores"], out["queries"] @ before.T)  # bf16 keeps two or three digits
    assert net.memories[0].keys.dtype == net.memories[0].values.dtype == torch.float32
    assert (net.memories[0].keys.norm(dim=1) - 1).abs().max() < 1e-5
