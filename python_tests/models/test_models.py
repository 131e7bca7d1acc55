"""The networks against the paper's tables: shapes, parameter counts, paddings, and rebuilding by config."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defgan_fast import models
from defgan_fast.models._layers import SameConv2d, same_padding


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_generator_of_the_paper():
    generator = models.Generator()
    shapes = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
        for layer in generator.layers
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d)
    ]
    images = generator(torch.randn(3, 128))
    assert shapes == [(4096,), (128, 7, 7), (64, 14, 14), (1, 28, 28)]
    assert images.shape == (3, 1, 28, 28)
    assert 0 <= images.min() <= images.max() <= 1
    expected = (128 + 1) * 4096 + (256 * 128 + 128 * 64 + 64) * 25 + 128 + 64 + 1
    assert parameters(generator) == expected
    assert len(hooks) == 4


def test_digits_generator_is_as_designed():
    generator = models.Generator(latent_size=64, width=32)
    assert generator.layers[0].weight.shape == (2048, 64)
    assert [m.in_channels for m in generator.layers if isinstance(m, nn.ConvTranspose2d)] == [128, 64, 32]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 25, 31), (1, 9, 8)])
def test_generator_and_critic_take_any_image_shape(shape):
    assert models.Generator(5, 4, shape)(torch.randn(2, 5)).shape == (2, *shape)
    assert models.Critic(4, shape)(torch.rand(2, *shape)).shape == (2,)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_celeba_generator(batch_norm):
    generator = models.CelebaGenerator(16, 8, batch_norm=batch_norm).eval()
    images = generator(torch.randn(2, 16))
    assert images.shape == (2, 3, 64, 64)
    assert -1 <= images.min() < 0 < images.max() <= 1
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == (3 if batch_norm else 0)
    # No activation after the fourth layer, as in the released code.
    assert [type(m).__name__ for m in list(generator.layers)[-3:]] == [
        "ConvTranspose2d",
        "ConvTranspose2d",
        "Tanh",
    ]


def test_critic_of_the_paper():
    critic = models.Critic()
    assert parameters(critic) == (64 + 64 * 128 + 128 * 256) * 25 + 64 + 128 + 256 + 256 * 16 + 1
    assert [m.negative_slope for m in critic.layers if isinstance(m, nn.LeakyReLU)] == [0.2] * 3
    # Every score depends on its own image only.
    images = torch.rand(4, 1, 28, 28)
    assert torch.allclose(critic(images)[2:3], critic(images[2:3]), atol=1e-5)


def test_critic_of_faces():
    """Three halvings of 64x64, as for 28x28: 8x8 maps meet the last layer."""
    critic = models.Critic(64, (3, 64, 64))
    assert critic.layers[-1].in_features == 256 * 8 * 8
    assert critic(torch.zeros(2, 3, 64, 64)).shape == (2,)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (1, 9, 8)])
def test_autoencoder_of_the_paper(shape):
    model = models.Autoencoder(image_shape=shape, width=8)
    assert model(torch.rand(2, *shape)).shape == (2, *shape)
    assert isinstance(model.decoder[-1], nn.Sigmoid)
    assert isinstance(models.Autoencoder(4, 2, shape, signed=True).decoder[-1], nn.Tanh)


def test_autoencoder_has_the_papers_encoder_and_its_mirror():
    model = models.Autoencoder()
    kinds = [type(layer).__name__ for layer in model.encoder]
    assert kinds == ["Conv2d", "LeakyReLU"] * 3 + ["Flatten", "Linear", "Tanh"]
    assert [layer.out_channels for layer in model.encoder if isinstance(layer, nn.Conv2d)] == [64, 128, 256]
    assert model.encoder[-2].out_features == 128
    encoded, decoded = parameters(model.encoder), parameters(model.decoder)
    # The same weights; the biases are of the layers' other sides: 64 + 128 + 256 + 128 and 4096 + 128 + 64 + 1.
    assert encoded - (64 + 128 + 256 + 128) == decoded - (4096 + 128 + 64 + 1)


# Table 5 with the released code's paddings: A's second convolution sees 12x12, C's 13x13, B's last one 1x1.
PARAMETERS = {
    "A": 64 * 25 + 64 + 64 * 64 * 25 + 64 + 64 * 12 * 12 * 128 + 128 + 1290,
    "B": 64 * 64 + 64 + 64 * 128 * 36 + 128 + 128 * 128 * 25 + 128 + 1290,
    "C": 128 * 9 + 128 + 128 * 64 * 9 + 64 + 64 * 13 * 13 * 128 + 128 + 1290,
    "D": 784 * 200 + 200 + 200 * 200 + 200 + 2010,
}
# The released code's C: 5x5 taps, so that its second convolution sees 12x12.
RELEASED_C = 128 * 9 + 128 + 128 * 64 * 25 + 64 + 64 * 12 * 12 * 128 + 128 + 1290
DROPOUTS = {
    "paper": {"A": [0.25, 0.5], "B": [0.2, 0.5], "C": [0.25, 0.5], "D": [0.5, 0.5], "E": [], "F": []},
    "released": {"A": [0.75, 0.5], "B": [0.8, 0.5], "C": [0.75, 0.5], "D": [0.5], "E": [], "F": []},
}


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("arch", "ABCDEF")
def test_classifiers_of_the_paper(arch, variant):
    classifier = models.Classifier(arch, variant=variant)
    assert classifier(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    expected = PARAMETERS[{"E": "D", "F": "B"}.get(arch, arch)]
    assert parameters(classifier) == (RELEASED_C if (arch, variant) == ("C", "released") else expected)
    dropouts = [m.p for m in classifier.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == DROPOUTS[variant][arch]


@pytest.mark.parametrize("arch", "ABCDEF")
def test_classifiers_begin_with_rows_of_unit_norm(arch):
    # As in the released code; PyTorch's default has a third of the variance, He's twice as much.
    layers = [m for m in models.Classifier(arch).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        norms = layer.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        assert not layer.bias.any()
        # Gaussian: its fourth moment is three times the square of the second, a uniform one's 1.8 times.
        if layer.weight.numel() > 10_000:
            second, fourth = layer.weight.square().mean(), layer.weight.pow(4).mean()
            assert 2.7 < fourth / second**2 < 3.3


def test_classifier_refuses():
    with pytest.raises(ValueError, match=r"arch must be one of A, B, C, D, E, F, got 'G'"):
        models.Classifier("G")
    with pytest.raises(ValueError, match=r"variant must be one of paper, released, got 'other'"):
        models.Classifier("A", variant="other")
    with pytest.raises(ValueError, match=r"at least 5x5 pixels for classifier C, got 4x9"):
        models.Classifier("C", (1, 4, 9), variant="released")
    models.Classifier("C", (1, 4, 9))
    with pytest.raises(ValueError, match=r"at least 27x27 pixels for classifier F, got 26x40"):
        models.Classifier("F", (1, 26, 40))
    models.Classifier("F", (1, 27, 27))(torch.rand(1, 1, 27, 27))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (28, 5, 1, (2, 2)),
        (28, 8, 2, (3, 3)),
        (27, 8, 2, (3, 4)),
        (28, 5, 2, (1, 2)),
        (7, 5, 2, (2, 2)),
        (8, 1, 2, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size, kernel, stride, padding):
    assert same_padding(size, kernel, stride) == padding


def test_same_convolution_places_the_odd_zero_last():
    conv = SameConv2d(1, 1, 5, stride=2)
    images = torch.randn(1, 1, 28, 9)
    expected = F.conv2d(F.pad(images, (2, 2, 1, 2)), conv.weight, conv.bias, stride=2)
    assert torch.equal(conv(images), expected)
    assert conv(images).shape == (1, 1, 14, 5)


@pytest.mark.parametrize(
    "model",
    [
        models.Generator(6, 4),
        models.CelebaGenerator(6, 4, batch_norm=True),
        models.Critic(4),
        models.Autoencoder(6, 4, (3, 20, 17), signed=True),
        models.Classifier("C", (3, 20, 20), classes=2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_config_rebuilds_the_model(model):
    import json

    twin = models.build(type(model).__name__, json.loads(json.dumps(model.config)))
    twin.load_state_dict(model.state_dict())
    assert twin.config == model.config


def test_build_refuses():
    with pytest.raises(ValueError, match=r"model must be one of .*, got 'Resnet'"):
        models.build("Resnet", {})
    with pytest.raises(ValueError, match=r"config does not fit model Critic: .*depth"):
        models.build("Critic", {"depth": 3})


def test_activations_keep_their_scale_at_the_start():
    """What the initialisation is for: neither vanishing nor exploding through the layers."""
    torch.manual_seed(0)
    generator = models.Generator()
    before_sigmoid = generator.layers[:-1](torch.randn(64, 128))
    assert 0.3 < before_sigmoid.std() < 3
