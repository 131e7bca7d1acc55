"""One step of each trainer against its definition, and that training makes things better."""

import pytest
import torch
from torch import nn

from defgan_fast import data, models
from defgan_fast.training.augment import random_affine, random_corruption
from defgan_fast.training.batches import Batches
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer, accuracy
from defgan_fast.training.cli import command
from defgan_fast.training.wgan_gp import GanSettings, WganGp, gradient_penalty


def test_gradient_penalty_takes_the_norm_over_all_axes():
    """A linear critic has the same gradient everywhere; its norm is known."""

    class Linear(nn.Module):
        def forward(self, images):
            return images.flatten(1).sum(1) * 0.5

    real, fake = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    penalty = gradient_penalty(Linear(), real, fake, torch.rand(3))
    # 32 entries of 0.5: norm 0.5 * sqrt(32). Over one axis only it would be 0.5 * sqrt(4) or sqrt(2).
    assert penalty.item() == pytest.approx((0.5 * 32**0.5 - 1) ** 2, rel=1e-5)


def test_gradient_penalty_is_evaluated_between_the_images():
    class Square(nn.Module):
        def forward(self, images):
            return images.flatten(1).square().sum(1) / 2  # gradient: the image itself

    real, fake = torch.full((2, 1, 1, 4), 2.0), torch.full((2, 1, 1, 4), 1.0)
    penalty = gradient_penalty(Square(), real, fake, torch.tensor([1.0, 0.25]))
    # Norms 2 * 2 and 2 * 1.25.
    assert penalty.item() == pytest.approx(((4 - 1) ** 2 + (2.5 - 1) ** 2) / 2)


def test_gradient_penalty_reaches_the_critics_weights():
    critic = models.Critic(2).double()
    real, fake = (torch.rand(2, 1, 28, 28, dtype=torch.float64) for _ in range(2))
    mix = torch.rand(2, dtype=torch.float64)
    weight = critic.layers[0].weight
    penalty = gradient_penalty(critic, real, fake, mix)
    (gradient,) = torch.autograd.grad(penalty, weight)
    step = 1e-6
    with torch.no_grad():
        weight[0, 0, 2, 2] += step
    higher = gradient_penalty(critic, real, fake, mix)
    assert ((higher - penalty) / step).item() == pytest.approx(gradient[0, 0, 2, 2].item(), rel=1e-3)


def gan(**changes):
    images = data.load("digits", split="validation").images
    small = {"latent_size": 8, "width": 4, "critic_width": 4, "batch": 16, **changes}
    return WganGp(GanSettings(**small), images, "hash")


def test_average_follows_the_generator():
    trainer = gan(ema=0.5)
    before = [p.clone() for p in trainer.average.parameters()]
    trainer.advance()
    decay = 1 / 10  # the short memory of the first step
    for old, new, average in zip(
        before, trainer.generator.parameters(), trainer.average.parameters(), strict=True
    ):
        assert torch.allclose(average, decay * old + (1 - decay) * new, atol=1e-6)


def test_linear_schedule_ends_at_zero():
    trainer = gan(lr=1e-3, lr_schedule="linear", steps=4, critic_steps=1)
    rates = []
    for _ in range(4):
        trainer.advance()
        rates.append(trainer.generator_optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_step_trains_both_networks_and_counts_critic_steps():
    trainer = gan(critic_steps=3)
    critic = [p.clone() for p in trainer.critic.parameters()]
    generator = [p.clone() for p in trainer.generator.parameters()]
    metrics = trainer.advance()
    assert set(metrics) == {"critic_distance", "penalty", "generator_loss"}
    # The critic's last bias gets no gradient: it cancels in the distance.
    after = list(trainer.critic.parameters())
    assert [torch.equal(a, b) for a, b in zip(critic, after, strict=True)] == [False] * 7 + [True]
    assert all(not torch.equal(a, b) for a, b in zip(generator, trainer.generator.parameters(), strict=True))
    assert all(p.requires_grad for p in trainer.critic.parameters())
    assert trainer.critic_optimiser.state_dict()["state"][0]["step"] == 3
    assert trainer.generator_optimiser.state_dict()["state"][0]["step"] == 1


def test_gan_learns_the_mean_image():
    """A few steps of a small network already move its samples towards the data."""
    trainer = gan(lr=2e-3, critic_steps=2, batch=32, ema=0.8, width=8, critic_width=8)
    mean = trainer.images.mean(0)
    before = (trainer.samples().mean(0) - mean).square().mean()
    for _ in range(40):
        trainer.advance()
    assert (trainer.samples().mean(0) - mean).square().mean() < before / 3


def test_classifier_learns_the_digits():
    train, held_out = data.load("digits"), data.load("digits", split="validation")
    settings = ClassifierSettings(arch="E", epochs=8)
    trainer = ClassifierTrainer(settings, train.images, train.labels, "hash")
    for _ in range(settings.steps(len(train.images))):
        trainer.advance()
    assert trainer.step == 8 * 10
    assert accuracy(trainer.model, held_out.images, held_out.labels) > 0.9
    assert not trainer.model.training


def test_batches_visit_every_image_once_a_pass():
    batches = Batches(10, 5, torch.Generator().manual_seed(0))
    first = torch.cat([batches.next(), batches.next()])
    second = torch.cat([batches.next(), batches.next()])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    with pytest.raises(ValueError, match=r"batch must lie between 1 and the number of images 10, got 11"):
        Batches(10, 11, torch.Generator())


def test_augmentation():
    images = data.load("digits", split="validation").images[:20]
    random = torch.Generator().manual_seed(0)
    assert random_affine(images, 0.0, random) is images
    moved = random_affine(images, 1.0, random)
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    # Small: the digit stays what it is, and its ink stays about the same.
    assert 0.001 < (moved - images).square().mean() < 0.05
    assert moved.sum() == pytest.approx(images.sum().item(), rel=0.1)
    # Each image gets its own map, and the map does not depend on the image.
    blank = torch.zeros(2, 1, 28, 28)
    blank[:, :, 10:18, 10:18] = 1
    pair = random_affine(blank, 1.0, random)
    assert not torch.equal(pair[0], pair[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: GanSettings(steps=0), r"steps must be at least 1, got 0"),
        (lambda: GanSettings(lr=0.0), r"lr must be above 0, got 0.0"),
        (lambda: GanSettings(ema=1.0), r"ema must lie in \[0, 1\), got 1.0"),
        (lambda: GanSettings(lr_schedule="cosine"), r"lr_schedule must be constant or linear, got 'cosine'"),
        (lambda: ClassifierSettings(epochs=0), r"epochs must be at least 1, got 0"),
        (lambda: ClassifierSettings(augment=-1.0), r"augment must be at least 0, got -1.0"),
        (lambda: ClassifierSettings(corrupt=-1.0), r"corrupt must be at least 0, got -1.0"),
        (lambda: GanSettings(latent_floor=2.0), r"latent_floor must lie in \[0, 1\], got 2.0"),
    ],
)
def test_settings_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        settings()


def test_recorded_command_gives_the_same_settings():
    from defgan_fast.cli import build_parser
    from defgan_fast.training import cli

    settings = GanSettings(steps=70, lr=3e-4, lr_schedule="linear", augment=0.5, seed=9, width=8, ema=0.9)
    words = command("gan", "digits", settings).split()[1:]
    args = build_parser().parse_args(words)
    assert cli._settings(GanSettings, cli.GAN_DEFAULTS["digits"], args) == settings


def test_corruption():
    images = data.load("digits", split="validation").images[:30]
    random = torch.Generator().manual_seed(0)
    assert random_corruption(images, 0.0, random) is images
    corrupted = random_corruption(images, 1.0, random)
    assert corrupted.shape == images.shape
    assert corrupted.min() >= 0
    assert corrupted.max() <= 1
    change = (corrupted - images).square().mean((1, 2, 3))
    assert change.min() < 0.02 < change.max(), "every image has its own amount"
    # The digits stay what they are: bright where they were bright.
    assert all(c[i > 0.9].mean() > c[i < 0.1].mean() + 0.1 for c, i in zip(corrupted, images, strict=True))
    assert torch.equal(
        random_corruption(images, 1.0, torch.Generator().manual_seed(3)),
        random_corruption(images, 1.0, torch.Generator().manual_seed(3)),
    )


def test_latents_reach_inwards_to_the_floor():
    trainer = gan(latent_size=400, latent_floor=0.25)
    norms = trainer.latents(500).norm(dim=1) / 400**0.5
    assert 0.23 < norms.min() < 0.32
    assert 0.9 < norms.max() < 1.1
    assert norms.mean() == pytest.approx(0.625, abs=0.03)
    plain = gan(latent_size=400).latents(500).norm(dim=1) / 400**0.5
    assert plain.min() > 0.85
