"""One step of each trainer against its definition, and that training makes things better."""

import pytest
import torch
from torch import nn

from defgan_fast import data, models
from defgan_fast.attacks import fgsm, pgd
from defgan_fast.evaluation.metrics import accuracy
from defgan_fast.training.augment import random_affine, random_corruption
from defgan_fast.training.batches import Batches
from defgan_fast.training.cards import command
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer
from defgan_fast.training.critic_gradients import critic_gradients
from defgan_fast.training.magnet import MagnetSettings, MagnetTrainer
from defgan_fast.training.wgan_gp import GanSettings, WganGp


def penalty_and_gradients(critic, real, fake, between, weight):
    """The definition, by differentiating twice: penalty, distance, and the gradients of the critic's loss."""
    distance = critic(real).mean() - critic(fake).mean()
    points = between.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    loss = weight * penalty - distance
    return penalty, distance, torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 13)])
@pytest.mark.parametrize("points", [5, 3])
def test_critic_gradients_are_those_of_two_backward_passes(shape, points):
    critic = models.Critic(3, shape).double()
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases, too
    real, fake, between = (torch.rand(n, *shape, dtype=torch.float64) for n in (5, 5, points))
    penalty, distance, expected = penalty_and_gradients(critic, real, fake, between, 10.0)
    found = critic_gradients(critic, real, fake, between, 10.0)
    assert found.penalty.item() == pytest.approx(penalty.item(), rel=1e-12)
    assert found.distance.item() == pytest.approx(distance.item(), rel=1e-12)
    for mine, theirs in zip(found.gradients[:-1], expected[:-1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13)
    # The last bias cancels in the distance.
    assert found.gradients[-1].abs().item() < 1e-15
    assert min(gradient.abs().max() for gradient in found.gradients[:-1]) > 1e-3


def test_critic_gradients_in_bfloat16():
    """Rounding to 8 bits in a dozen places: a few parts in a hundred, in the same direction."""
    critic = models.Critic(8)
    real, fake, between = torch.rand(3, 6, 1, 28, 28)
    exact = critic_gradients(critic, real, fake, between, 10.0)
    rounded = critic_gradients(critic, real, fake, between, 10.0, torch.bfloat16)
    assert rounded.penalty.item() == pytest.approx(exact.penalty.item(), rel=0.05)
    for one, other in zip(exact.gradients[:-1], rounded.gradients[:-1], strict=True):
        assert other.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98
        assert 0 < (one - other).norm() < 0.2 * one.norm()


def test_the_penalty_is_the_norm_over_all_axes():
    """A critic that is linear where it is evaluated: its gradient's norm is known."""
    critic = models.Critic(1, (1, 1, 1))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.fill_(1.0)
    # One pixel: only the middle tap of each kernel meets it, and the last layer's four inputs see 1, 2 and 8.
    images = torch.ones(2, 1, 1, 1)
    found = critic_gradients(critic, images, images, images, 10.0)
    # 1 map -> 2 -> 4, all weights 1: the derivative is the number of paths, 8.
    assert found.penalty.item() == pytest.approx((8 - 1) ** 2, rel=1e-5)


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


def test_average_follows_the_classifier():
    """Over four steps, written out; and it goes on where a checkpoint left it."""
    train = data.load("digits", split="validation")
    settings = ClassifierSettings(arch="E", batch=32, ema=0.2)
    trainer = ClassifierTrainer(settings, train, "hash")
    expected = [p.clone() for p in trainer.model.parameters()]
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):
        trainer.advance()
        expected = [
            decay * old + (1 - decay) * new
            for old, new in zip(expected, trainer.model.parameters(), strict=True)
        ]
        resumed = ClassifierTrainer(settings, train, "hash")
        resumed.restore(trainer.state())
        resumed.step = trainer.step
        trainer = resumed
    for average, mine, last in zip(
        trainer.result.parameters(), expected, trainer.model.parameters(), strict=True
    ):
        assert torch.allclose(average, mine, atol=1e-6)
        assert not torch.allclose(last, mine, atol=1e-4)
    assert not trainer.result.training


def test_linear_schedule_ends_at_zero():
    trainer = gan(lr=1e-3, lr_schedule="linear", steps=4, critic_steps=1)
    rates = []
    for _ in range(4):
        trainer.advance()
        rates.append(trainer.generator_optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_hold_schedule_falls_from_half_way():
    settings = GanSettings(lr=1e-3, lr_schedule="hold", steps=8)
    rates = [settings.rate(step) for step in range(8)]
    assert rates == pytest.approx([1e-3] * 5 + [7.5e-4, 5e-4, 2.5e-4])


def test_hold_schedule_may_be_prolonged_until_half_way():
    short, long, late = (gan(lr_schedule="hold", steps=steps, critic_steps=1) for steps in (4, 40, 40))
    for trainer in (short, long):
        trainer.advance()
        trainer.advance()
    late.restore(short.state())
    late.step = short.step
    assert late.advance().keys() == long.advance().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(late.critic.parameters(), long.critic.parameters(), strict=True)
    )
    short.advance()
    with pytest.raises(
        ValueError, match=r"steps must stay 4 once half of them are done .* at step 3, got 40"
    ):
        gan(lr_schedule="hold", steps=40).restore(short.state())


def states(trainer):
    networks = (trainer.generator, trainer.critic, trainer.average)
    return [value for network in networks for value in network.state_dict().values()]


def test_accumulation_is_the_same_batch():
    """Sums in another order: differences of rounding only, and not none, which would mean no parts."""
    whole, parts = gan(lr=1e-3), gan(lr=1e-3, accumulate=4)
    for trainer in (whole, parts):
        trainer.advance()
    pairs = list(zip(states(whole), states(parts), strict=True))
    # Adam divides by the gradient's own size, and rounding matters where that is small.
    assert all((one - other).abs().max() < 2e-4 for one, other in pairs)
    assert not all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(
        ValueError, match=r"batch must be a multiple of processes x accumulate, 1 x 3, got 16"
    ):
        gan(accumulate=3)


def test_bfloat16_trains():
    trainer = gan(lr=4e-3, critic_steps=1, batch=8, ema=0.8, precision="bfloat16")
    mean = trainer.images.mean(0)
    before = (trainer.samples().mean(0) - mean).square().mean()
    for _ in range(45):
        trainer.advance()
    assert all(value.dtype == torch.float32 for value in states(trainer))
    assert (trainer.samples().mean(0) - mean).square().mean() < before / 2


def test_compiled_passes_are_the_same():
    """Captured whole, as CUDA graphs need it; without a code generator, which would take a minute."""

    def capture(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    images = data.load("digits", split="validation").images
    settings = GanSettings(latent_size=8, width=4, critic_width=4, batch=16, critic_steps=1, lr=1e-3)
    plain, compiled = WganGp(settings, images, "hash"), WganGp(settings, images, "hash", compiler=capture)
    for _ in range(2):
        first, second = plain.advance(), compiled.advance()
    assert float(first["penalty"]) == pytest.approx(float(second["penalty"]), rel=1e-4)
    assert all((a - b).abs().max() < 2e-4 for a, b in zip(states(plain), states(compiled), strict=True))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_faces_are_trained_on(batch_norm):
    """8-bit images, a tanh, 64x64, and the average's running statistics."""
    pixels = torch.randint(256, (12, 3, 64, 64), dtype=torch.uint8)
    small = {"latent_size": 4, "width": 2, "critic_width": 2, "batch": 6, "critic_steps": 1}
    trainer = WganGp(GanSettings(model="CelebaGenerator", batch_norm=batch_norm, **small), pixels, "hash")
    assert torch.equal(trainer._images(torch.tensor([3])), pixels[3:4].float() / 255 * 2 - 1)
    before = trainer.samples(2)
    assert torch.isfinite(torch.stack(list(trainer.advance().values()))).all()
    samples = trainer.samples(2)
    assert samples.shape == (2, 3, 64, 64)
    assert not torch.equal(samples, before)
    # An average in training mode would make each sample depend on its neighbours.
    assert not trainer.average.training
    assert torch.allclose(samples, trainer.samples(2), atol=1e-6)


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
    trainer = ClassifierTrainer(settings, train, "hash")
    for _ in range(settings.steps(len(train.images))):
        trainer.advance()
    assert trainer.step == 8 * 10
    assert accuracy(trainer.model, held_out.images, held_out.labels) > 0.9
    assert not trainer.model.training


def test_adversarial_training_resists_its_attack():
    """On the digits, FGSM at 0.3: the plain classifier falls for it, the other one does much better."""
    train, held_out = data.load("digits"), data.load("digits", split="validation")
    found = []
    for epsilon in (0.0, 0.3):
        settings = ClassifierSettings(arch="E", epochs=12, adversarial=epsilon)
        trainer = ClassifierTrainer(settings, train, "hash")
        for _ in range(settings.steps(len(train.images))):
            trainer.advance()
        attacked = fgsm(trainer.model.eval(), *held_out, 0.3)
        found.append(accuracy(trainer.model, attacked, held_out.labels))
    assert found[1] > found[0] + 0.3


def test_adversarial_training_by_pgd_resists_pgd():
    """On the digits, PGD at 0.1: the classifier that saw its examples keeps more than the plain one."""
    train, held_out = data.load("digits"), data.load("digits", split="validation").first(100)
    found = []
    for epsilon in (0.0, 0.1):
        settings = ClassifierSettings(arch="E", epochs=8, adversarial=epsilon, adversarial_steps=3)
        trainer = ClassifierTrainer(settings, train, "hash")
        for _ in range(settings.steps(len(train.images))):
            trainer.advance()
        attacked = pgd(trainer.model.eval(), *held_out, 0.1, 10)
        found.append(accuracy(trainer.model, attacked, held_out.labels))
    assert found[1] > found[0] + 0.2


def test_magnet_learns_to_denoise():
    dataset = data.load("digits")
    images = dataset.images
    trainer = MagnetTrainer(MagnetSettings(width=16, code_size=64, batch=64), dataset, "hash")
    errors = [float(trainer.advance()["reconstruction_error"]) for _ in range(60)]
    # The best constant image has an error of the images' variance.
    assert errors[-1] < 0.6 * images.var(0).mean() < errors[0]


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
        (lambda: ClassifierSettings(ema=-0.1), r"ema must lie in \[0, 1\), got -0.1"),
        (
            lambda: GanSettings(lr_schedule="cosine"),
            r"lr_schedule must be one of constant, linear, hold, got 'cosine'",
        ),
        (
            lambda: GanSettings(model="Critic"),
            r"model must be one of Generator, CelebaGenerator, got 'Critic'",
        ),
        (
            lambda: GanSettings(batch_norm=True),
            r"batch_norm must go with model CelebaGenerator, got 'Generator'",
        ),
        (
            lambda: GanSettings(precision="float8"),
            r"precision must be one of float32, bfloat16, got 'float8'",
        ),
        (
            lambda: ClassifierSettings(on="noise"),
            r"on must be one of images, reconstructions, both, got 'noise'",
        ),
        (lambda: ClassifierSettings(adversarial=-1.0), r"adversarial must be at least 0, got -1.0"),
        (lambda: MagnetSettings(noise=-1.0), r"noise must be at least 0, got -1.0"),
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
    from defgan_fast.commands import build_parser, train
    from defgan_fast.training import recipes

    settings = GanSettings(steps=70, lr=3e-4, lr_schedule="linear", augment=0.5, seed=9, width=8, ema=0.9)
    words = command("gan", "digits", settings).split()[1:]
    args = build_parser().parse_args(words)
    assert train._settings(recipes.GAN["digits"], args) == settings


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
