"""The unit of the latents: that it is what it says, and that the choice follows the measured errors."""

import pytest
import torch
from torch import nn

from defgan_fast import Projector, commands, data, models, weights
from defgan_fast.evaluation import quality
from defgan_fast.training import calibration


def steep(factor=1.0):
    """A small generator whose images change with the latent as fast as the factor says."""
    torch.manual_seed(0)
    generator = models.Generator(latent_size=6, width=4).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.normal_().mul_(0.3)
    return calibration.in_unit(generator, factor)


@pytest.mark.parametrize(
    "generator",
    [models.Generator(6, 3), models.CelebaGenerator(6, 3, batch_norm=True)],
    ids=["plain", "norm"],
)
def test_the_unit_changes_no_image(generator):
    generator.eval()
    for module in generator.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    latents = torch.randn(4, 6)
    changed = calibration.in_unit(generator, 0.5)
    torch.testing.assert_close(changed(latents), generator(0.5 * latents))
    assert not torch.allclose(changed(latents), generator(latents))
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())


def test_the_descent_is_that_of_a_smaller_rate():
    """On G(c z) at rate r as on G at rate r c^2 from c z0: the same images."""
    generator, factor = steep().double(), 0.5
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    start = 0.4 * torch.randn(2, 6, dtype=torch.float64)
    settings = {"steps": 7, "restarts": 2, "backend": "reference"}
    ours = Projector(calibration.in_unit(generator, factor), lr=10.0, **settings).project(images, z0=start)
    same = Projector(generator, lr=10.0 * factor**2, **settings).project(images, z0=factor * start)
    torch.testing.assert_close(ours.images, same.images)
    torch.testing.assert_close(factor * ours.latents, same.latents)
    other = Projector(generator, lr=10.0, **settings).project(images, z0=factor * start)
    assert not torch.allclose(other.images, same.images, atol=1e-3)


def test_the_least_error_is_chosen():
    """Images that the generator can draw; of one that overshoots, the errors fall before they rise."""
    images = steep()(torch.randn(4, 6)).detach()
    for generator, expected in ((steep(8), True), (steep(0.2), False)):
        chosen, errors = calibration.calibrate(generator, images, 20, 3)
        assert next(iter(errors)) == 1.0
        found = list(errors.values())
        best = min(errors, key=errors.get)
        assert (best < 1) == expected
        assert found[:-1] == sorted(found[:-1], reverse=True)
        torch.testing.assert_close(
            chosen.state_dict(), calibration.in_unit(generator, best).state_dict(), rtol=0, atol=0
        )
        again = quality.reconstruction_error(chosen, images, 20, 3, "again")
        assert again == errors[best]


def test_bad_input(tmp_path, capsys):
    words = ["train", "gan", "--dataset", "digits", "--calibrate", "-1", "--out", str(tmp_path / "out")]
    assert commands.main(words) == 2
    assert "--calibrate must be at least 0, got -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"factor must be above 0, got {factor}"):
            calibration.in_unit(steep(), factor)
    with pytest.raises(ValueError, match=r"generator must begin with an nn\.Linear, got ConvTranspose2d"):
        calibration.in_unit(nn.Sequential(nn.ConvTranspose2d(2, 1, 4)), 0.5)


def test_train_gan_calibrates(tmp_path, capsys):
    words = ["train", "gan", "--dataset", "digits", "--steps", "2", "--width", "2", "--critic-width", "2"]
    words += ["--batch", "8", "--sample-every", "0", "--evaluate-steps", "3", "--evaluate-restarts", "2"]
    assert commands.main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert commands.main([*words, "--calibrate", "3", "--out", str(tmp_path / "unit")]) == 0
    assert "latents times 1: error 0." in capsys.readouterr().out
    card = weights.read_card(tmp_path / "unit" / "generator.safetensors")
    assert card["command"].endswith("--calibrate 3")
    found = weights.load_generator(tmp_path / "unit" / "generator.safetensors")
    plain = weights.load_generator(tmp_path / "plain" / "generator.safetensors")
    expected = calibration.in_unit(plain, card["latent_factor"])
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    images = data.load("digits", split="validation").images[:3]
    again = quality.reconstruction_error(found, images, 3, 2, "again")
    assert card["quality"]["validation"] == {"images": 3, "reconstruction_error": pytest.approx(again)}
