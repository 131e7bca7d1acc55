"""WGAN with gradient penalty (Gulrajani et al., 2017): the generator that the defence projects onto.

Five critic steps for each generator step, Adam at 1e-4 with betas 0.5 and 0.9, penalty 10, batches of 50: the
settings of the released Defense-GAN code, except that its penalty takes the gradient's norm over one axis of
the image only, where the method asks for the norm over all of them. On top of it: an exponential moving
average of the generator's weights, which is what gets saved, an optional linear decay of the rate, an
optional deformation of the training images, and latents that may reach inwards to where projections start.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch

from defgan_fast import models
from defgan_fast.training.augment import random_affine
from defgan_fast.training.batches import Batches
from defgan_fast.training.critic_gradients import critic_gradients


@dataclass(frozen=True)
class GanSettings:
    """Everything that decides a training run, apart from the data and the number of threads.

    ``steps`` belongs to it because the linear schedule depends on the number of steps. Each latent is a draw
    from N(0, I) times a factor uniform in [``latent_floor``, 1]. Projections start at N(0, I / k), where a
    generator trained on N(0, I) alone, the floor of 1, knows only grey fog, and fog is what an adversarial
    perturbation looks most like; a floor of k^-1/2 makes it draw digits there too.
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
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "critic_steps", "latent_size", "width", "critic_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        if not 0 <= self.latent_floor <= 1:
            raise ValueError(f"latent_floor must lie in [0, 1], got {self.latent_floor}")
        if self.augment < 0:
            raise ValueError(f"augment must be at least 0, got {self.augment}")
        if self.lr_schedule not in ("constant", "linear", "hold"):
            raise ValueError(f"lr_schedule must be constant, linear or hold, got {self.lr_schedule!r}")

    def rate(self, step: int) -> float:
        """Adam's rate in step ``step`` (from 0): constant, linear to 0, or constant until half-way first."""
        if self.lr_schedule == "constant":
            return self.lr
        left = 1 - step / self.steps
        return self.lr * (left if self.lr_schedule == "linear" else min(1.0, 2 * left))


class WganGp:
    """The training state and one step of it.

    Args:
        settings: see :class:`GanSettings`.
        images: [N, C, H, W] float32 training images, in the generator's range.
        data_hash: fingerprint of the images, kept with checkpoints so that none is continued on other data.
        device: where to train.
    """

    def __init__(
        self,
        settings: GanSettings,
        images: torch.Tensor,
        data_hash: str,
        device: torch.device | str = "cpu",
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
            generator = models.Generator(settings.latent_size, settings.width, shape)
            critic = models.Critic(settings.critic_width, shape)
        # Channels last is what the convolution libraries compute in; other layouts they reorder at every call.
        self.generator = generator.to(self.device, memory_format=torch.channels_last)
        self.critic = critic.to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        adam: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas}
        self.generator_optimiser = torch.optim.Adam(self.generator.parameters(), **adam)
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), **adam)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.batches = Batches(len(images), settings.batch, self.random)

    def latents(self, count: int) -> torch.Tensor:
        """[count, k] from N(0, I), each times its own factor between the floor and 1."""
        return self._draw(count, self.random).to(self.device)

    def _draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        latents = torch.randn(count, self.options.latent_size, generator=generator)
        floor = self.options.latent_floor
        return latents * (floor + (1 - floor) * torch.rand(count, 1, generator=generator))

    def advance(self) -> dict[str, torch.Tensor]:
        """``critic_steps`` updates of the critic, then one of the generator and of its average."""
        options = self.options
        for optimiser in (self.generator_optimiser, self.critic_optimiser):
            for group in optimiser.param_groups:
                group["lr"] = options.rate(self.step)
        for _ in range(options.critic_steps):
            distance, penalty = self._critic_step()
        loss = self._generator_step()
        self._average_step()
        self.step += 1
        return {"critic_distance": distance, "penalty": penalty, "generator_loss": loss}

    def _critic_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        real = self.images[self.batches.next().to(self.device)]
        real = random_affine(real, self.options.augment, self.random)
        with torch.no_grad():
            fake = self.generator(self.latents(len(real)))
        mix = torch.rand(len(real), generator=self.random).to(self.device)
        share = mix.view(-1, 1, 1, 1)
        between = share * real + (1 - share) * fake
        found = critic_gradients(self.critic, real, fake, between, self.options.penalty)
        for parameter, gradient in zip(self.critic.parameters(), found.gradients, strict=True):
            parameter.grad = gradient
        self.critic_optimiser.step()
        return found.distance, found.penalty

    def _generator_step(self) -> torch.Tensor:
        # Gradients of the critic's weights are not needed here and cost a third of the step.
        self.critic.requires_grad_(False)
        loss = -self.critic(self.generator(self.latents(self.options.batch))).mean()
        self.generator_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.generator_optimiser.step()
        self.critic.requires_grad_(True)
        return loss.detach()

    @torch.no_grad()
    def _average_step(self) -> None:
        # A short memory at first, so that the untrained weights are forgotten.
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        for average, current in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            average.lerp_(current, 1 - decay)
        for kept, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def samples(self, count: int = 64) -> torch.Tensor:
        """[count, C, H, W] images of the averaged generator, from the same latents at every call."""
        fixed = torch.Generator().manual_seed(self.options.seed)
        return self.average(self._draw(count, fixed).to(self.device)).cpu()

    def state(self) -> dict[str, Any]:
        """Weights, average, optimisers, random state and data order."""
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
        """The inverse of :meth:`state`.

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
