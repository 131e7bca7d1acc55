"""WGAN with gradient penalty (Gulrajani et al., 2017): the generator that the defence projects onto.

Five critic steps for each generator step, Adam at 1e-4 with betas 0.5 and 0.9, penalty 10, batches of 50: the
settings of the released Defense-GAN code, except that its penalty takes the gradient's norm over one axis of
the image only, where the method asks for the norm over all of them. On top of it: an exponential moving
average of the generator's weights, which is what gets saved, an optional linear decay of the rate, an
optional deformation of the training images, and latents that may reach inwards to where projections start.

What makes a step cheaper: one pass of the critic for everything (:mod:`defgan_fast.training.critic_gradients`),
channels_last, 16-bit convolutions, and on a GPU, where batches of 50 are bound by launches, CUDA graphs by way of
torch.compile. What makes a batch larger: accumulation over parts, and several processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from defgan_fast import arguments, data, models, precisions
from defgan_fast.training import averaging, distributed
from defgan_fast.training.augment import random_affine
from defgan_fast.training.batches import Batches
from defgan_fast.training.critic_gradients import critic_gradients

GENERATORS = ("Generator", "CelebaGenerator")
LR_SCHEDULES = ("constant", "linear", "hold")


@dataclass(frozen=True)
class GanSettings:
    """Everything that decides a training run, apart from the data and the number of threads.

    ``steps`` belongs to it because the linear schedule depends on the number of steps. Each latent is a draw
    from N(0, I) times a factor uniform in [``latent_floor``, 1]. Projections start at N(0, I / k), where a
    generator trained on N(0, I) alone, the floor of 1, knows only grey fog, and fog is what an adversarial
    perturbation looks most like; a floor of k^-1/2 makes it draw digits there too.

    ``batch`` counts the images of all processes and of all ``accumulate`` parts. ``model`` is the class of the
    generator, ``batch_norm`` the CelebaGenerator's. ``precision`` is that of the convolutions; weights,
    averages and Adam stay float32.
    """

    steps: int = 200_000
    batch: int = 50
    critic_steps: int = 5
    lr: float = 1e-4
    lr_schedule: str = "constant"
    betas: tuple[float, float] = (0.5, 0.9)
    penalty: float = 10.0
    latent_size: int = 128
    latent_floor: float = 1.0
    width: int = 64
    critic_width: int = 64
    ema: float = 0.999
    augment: float = 0.0
    model: str = "Generator"
    batch_norm: bool = False
    precision: str = "float32"
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "critic_steps", "latent_size", "width", "critic_width", "accumulate"):
            arguments.count(name, getattr(self, name))
        arguments.number("lr", self.lr, above=0)
        arguments.number("ema", self.ema, least=0, below=1)
        arguments.number("latent_floor", self.latent_floor, least=0, most=1)
        arguments.number("augment", self.augment, least=0)
        arguments.choice("model", self.model, GENERATORS)
        if self.batch_norm and self.model != "CelebaGenerator":
            raise ValueError(f"batch_norm must go with model CelebaGenerator, got {self.model!r}")
        arguments.choice("precision", self.precision, precisions.ON_CPU)
        arguments.choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)

    def rate(self, step: int) -> float:
        """Returns Adam's rate in step ``step`` (from 0): constant, linear to 0, or constant until half-way first."""
        if self.lr_schedule == "constant":
            return self.lr
        left = 1 - step / self.steps
        return self.lr * (left if self.lr_schedule == "linear" else min(1.0, 2 * left))


class WganGp:
    """The training state and one step of it.

    Args:
        settings: see :class:`GanSettings`.
        images: [N, C, H, W] training images: float32 in the generator's range, or uint8, which are scaled to
            it batch by batch.
        data_hash: fingerprint of the images, kept with checkpoints so that none is continued on other data.
        device: where to train.
        compiler: of the two passes, such as :func:`torch.compile`; it may change rounding, not meaning.
    """

    def __init__(
        self,
        settings: GanSettings,
        images: torch.Tensor,
        data_hash: str,
        device: torch.device | str = "cpu",
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        self.options = settings
        self.settings: dict[str, Any] = {**asdict(settings), "betas": list(settings.betas), "data": data_hash}
        if settings.lr_schedule != "linear":
            # The steps done do not depend on how many are to come, so that a run may be prolonged; with
            # "hold" until half-way, which restore() sees to.
            del self.settings["steps"]
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.step = 0
        shape = list(images.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            generator = _new_generator(settings, shape)
            critic = models.Critic(settings.critic_width, shape)
        self.generator = models.to_channels_last(generator, self.device)
        self.critic = models.to_channels_last(critic, self.device)
        self.average = averaging.copy_of(self.generator)
        adam: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas}
        self.generator_optimiser = torch.optim.Adam(self.generator.parameters(), **adam)
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), **adam)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.batches = Batches(len(images), settings.batch, self.random)
        self._parts = distributed.part(settings.batch, settings.accumulate)
        self._compiled = compiler is not None
        compiler = compiler or (lambda function: function)
        self._critic_pass = compiler(self._critic_gradients)
        self._generator_pass = compiler(self._generator_loss)

    def latents(self, count: int) -> torch.Tensor:
        """Draws [count, k] from N(0, I), each times its own factor between the floor and 1."""
        return self._draw(count, self.random).to(self.device)

    def _draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        latents = torch.randn(count, self.options.latent_size, generator=generator)
        floor = self.options.latent_floor
        return latents * (floor + (1 - floor) * torch.rand(count, 1, generator=generator))

    def advance(self) -> dict[str, torch.Tensor]:
        """Makes ``critic_steps`` updates of the critic, then one of the generator and of its average."""
        options = self.options
        for optimiser in (self.generator_optimiser, self.critic_optimiser):
            for group in optimiser.param_groups:
                group["lr"] = options.rate(self.step)
        for _ in range(options.critic_steps):
            distance, penalty = self._critic_step()
        loss = self._generator_step()
        averaging.update(self.average, self.generator, options.ema, self.step)
        self.step += 1
        return {"critic_distance": distance, "penalty": penalty, "generator_loss": loss}

    def _critic_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Random numbers for the whole batch in every process, so that their number does not matter.
        real = self._images(self.batches.next())
        real = random_affine(real, self.options.augment, self.random)
        latents = self.latents(len(real))
        mix = torch.rand(len(real), generator=self.random).to(self.device).view(-1, 1, 1, 1)
        results = []
        for part in self._parts:
            self._mark_step()
            found = self._critic_pass(real[part], latents[part], mix[part])
            # A CUDA graph writes its next results over these.
            results.append([value.clone() for value in found] if self._compiled else found)
        *gradients, distance, penalty = _mean(results)
        for parameter, gradient in zip(self.critic.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.critic_optimiser.step()
        return distance, penalty

    def _critic_gradients(
        self, real: torch.Tensor, latents: torch.Tensor, mix: torch.Tensor
    ) -> list[torch.Tensor]:
        """Returns the critic's gradients, its distance, its penalty."""
        with torch.no_grad(), self._autocast():
            fake = self.generator(latents).float()
        between = mix * real + (1 - mix) * fake
        dtype = precisions.DTYPES[self.options.precision]
        found = critic_gradients(self.critic, real, fake, between, self.options.penalty, dtype)
        return [*found.gradients, found.distance, found.penalty]

    def _generator_step(self) -> torch.Tensor:
        # Gradients of the critic's weights are not needed here and cost a third of the step.
        self.critic.requires_grad_(False)
        latents = self.latents(self.options.batch)
        self.generator_optimiser.zero_grad(set_to_none=True)
        losses = []
        for part in self._parts:
            self._mark_step()
            loss = self._generator_pass(latents[part]) / len(self._parts)
            loss.backward()
            losses.append(loss.detach().clone())
        self.critic.requires_grad_(True)
        total = torch.stack(losses).sum()
        gradients = [p.grad for p in self.generator.parameters() if p.grad is not None]
        # Running statistics of BatchNorm differ between processes, too.
        statistics = [buffer for buffer in self.generator.buffers() if buffer.is_floating_point()]
        distributed.average([*gradients, *statistics, total])
        self.generator_optimiser.step()
        return total

    def _generator_loss(self, latents: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            return -self.critic(self.generator(latents)).float().mean()

    def _images(self, chosen: torch.Tensor) -> torch.Tensor:
        """Returns the chosen images as [N, C, H, W] float32 in the generator's range."""
        images = self.images[chosen.to(self.device)]
        return images if images.is_floating_point() else data.to_range(images, self.generator.value_range)

    def _autocast(self) -> torch.autocast:
        dtype = precisions.DTYPES[self.options.precision]
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype != torch.float32)

    def _mark_step(self) -> None:
        if self._compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    @torch.no_grad()
    def samples(self, count: int = 64) -> torch.Tensor:
        """Draws [count, C, H, W] images with the averaged generator, from the same latents at every call."""
        fixed = torch.Generator().manual_seed(self.options.seed)
        return self.average(self._draw(count, fixed).to(self.device)).cpu()

    def state(self) -> dict[str, Any]:
        """Returns weights, average, optimisers, random state and data order."""
        return {
            "generator": self.generator.state_dict(),
            "average": self.average.state_dict(),
            "critic": self.critic.state_dict(),
            "generator_optimiser": self.generator_optimiser.state_dict(),
            "critic_optimiser": self.critic_optimiser.state_dict(),
            "random": self.random.get_state(),
            "batches": self.batches.state(),
            "lr": {"step": self.step, "steps": self.options.steps},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Does the inverse of :meth:`state`.

        Raises:
            ValueError: with other ``steps`` the rate would have begun to fall before the state was saved.
        """
        step, steps = state["lr"]["step"], state["lr"]["steps"]
        if self.options.lr_schedule == "hold" and steps != self.options.steps:
            shorter = min(steps, self.options.steps)
            if 2 * step > shorter:
                raise ValueError(
                    f"steps must stay {steps} once half of them are done (lr_schedule hold): the checkpoint is "
                    f"at step {step}, got {self.options.steps}"
                )
        for name in ("generator", "average", "critic", "generator_optimiser", "critic_optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.random.set_state(state["random"])
        self.batches.restore(state["batches"])


def _new_generator(settings: GanSettings, shape: list[int]) -> models.Generator | models.CelebaGenerator:
    if settings.model == "CelebaGenerator":
        return models.CelebaGenerator(settings.latent_size, settings.width, shape, settings.batch_norm)
    return models.Generator(settings.latent_size, settings.width, shape)


def _mean(results: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Returns the mean of each tensor over the parts of the batch and over the processes."""
    mean = results[0]
    if len(results) > 1:
        mean = [torch.stack(values).mean(0) for values in zip(*results, strict=True)]
    distributed.average(mean)
    return mean
