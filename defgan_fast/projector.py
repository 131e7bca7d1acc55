"""The defence as a module: images in, their projections onto the range of a generator out.

`Projector` decides once which path a generator takes (lowered to a plan for the kernels, or plain PyTorch), and
for each call the precision, the starting points and how the gradient flows; the work is in `ops` and `reference`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments, inputs, origins, reference, tuning
from .kernels import extension, ops
from .origins import Origins
from .paths import KernelPath, Path, ReferencePath, tie
from .plan import LoweringError, Plan, latent_size_of, lower, structure_of, takes_maps, tensors_of
from .plan.activations import range_of_last
from .plan.latents import LARGEST, check_takes_latents_alone, failure_with
from .settings import FAST
from .surroundings import check_training_in_parallel, warn_of_another_range


class Projection(NamedTuple):
    """Everything that a projection yields.

    Attributes:
        images: the reconstruction G(z*), [B, C, H, W], dtype of the input; carries the projector's gradient.
        latents: z*, [B, k].
        errors: mean squared error of the chosen restart, [B], float32 (float64 for float64 generators).
        restarts: index of the chosen restart, [B], int64. (`Projector.restarts` is a count.)
        all_errors: final error of every restart, [B, R]; of one that `keep` dropped the error where it stopped.
        every_image: the reconstructions of all restarts, [B, R, C, H, W], with the same gradient as `images`; None
            unless they were asked for.
    """

    images: Tensor
    latents: Tensor
    errors: Tensor
    restarts: Tensor
    all_errors: Tensor
    every_image: Tensor | None = None


class Projector(Origins):
    """Projects images onto the range of a generator (Defense-GAN, Samangouei, Kabkab, Chellappa, ICLR 2018, eq. 8).

    Args:
        generator: any `nn.Module` that maps latents [N, k] (or [N, k, 1, 1]) to images [N, C, H, W]; held, not
            copied, and put in eval mode. Without a lowering it runs on the reference path, with one warning.
        latent_size: k, for a generator that does not tell it.
        steps: L, gradient steps on the latent; 0 is allowed with `starts="nearest"`.
        restarts: R, the count of starting points of every image. (`Projection.restarts` is an index below it.)
        lr: learning rate on the mean squared error; the released code's 10 suits the shipped generators.
        momentum: of the heavy ball, in [0, 1).
        lr_decay: factor on the learning rate from step ceil(decay_at * steps) on.
        decay_at: see `lr_decay`, in [0, 1].
        seed: an int makes starting point r a function of (seed, r) alone; None draws fresh ones per image and call.
        starts: "random", the paper's N(0, I / k), or "nearest": the R of `candidates` whose images are nearest to the
            image, a function of (image, seed, candidates) alone. With `seed=None` a fresh random half of the
            candidates (those of seed 0) takes part for each image.
        start_std: standard deviation of the random draws; None: 1 / sqrt(k) for starting points, 1 for candidates.
        candidates: how many latents are drawn from N(0, I) and decoded once, or latents [N, k] of one's own, which
            are copied. Their decoded images take at most 200 MB; of larger ones fewer candidates are used, with a
            warning.
        radius: the norm to which the latent is scaled at the start and after every step, in (0, 1e18], "auto" for
            sqrt(k), None: free.
        keep: pairs (step, rows): after that many steps only that many restarts of each image, those of least error,
            go on. Steps ascend below `steps`, rows descend below `restarts`. None: all take all steps.
        precision: "auto" (what autocast says, else float32 on the CPU and float16 on CUDA), "float32", "bfloat16"
            or "float16".
        gradient: "straight_through" (identity backward), "unrolled" (through all steps) or "none" (backward raises).
        backend: "auto" (the kernels of the images' device where there are some), "cpu", "cuda" or "reference".
        max_rows: rows (image x restart) in flight at most; None keeps working memory under 200 MB.
        validate: whether values are checked (finite, in the generator's range). None: on for CPU tensors.

    Raises:
        ValueError: an argument is out of its range, a weight is not finite, or `backend` names a kernel that cannot
            take the generator.
        TypeError: `generator` is no module.
        RuntimeError: `backend` names a kernel that is not available here.

    Example:
        >>> defended = torch.nn.Sequential(Projector(load_generator("digits")), classifier)
    """

    def __init__(
        self,
        generator: nn.Module,
        *,
        latent_size: int | None = None,
        steps: int = 200,
        restarts: int = 10,
        lr: float = 10.0,
        momentum: float = 0.7,
        lr_decay: float = 0.1,
        decay_at: float = 0.8,
        seed: int | None = 0,
        starts: str = "random",
        start_std: float | None = None,
        candidates: int | Tensor = 8192,
        radius: float | str | None = None,
        keep: Sequence[tuple[int, int]] | None = None,
        precision: str = "auto",
        gradient: str = "straight_through",
        backend: str = "auto",
        max_rows: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(generator, nn.Module):
            raise TypeError(f"generator must be a torch.nn.Module, got {type(generator).__name__}")
        self.generator = generator.eval()
        check_takes_latents_alone(generator)
        inputs.check_generator(generator)
        self._set(
            steps=steps,
            restarts=restarts,
            lr=lr,
            momentum=momentum,
            lr_decay=lr_decay,
            decay_at=decay_at,
            seed=seed,
            starts=starts,
            start_std=start_std,
            candidates=candidates,
            radius=radius,
            keep=keep,
            precision=precision,
            gradient=gradient,
            backend=backend,
            max_rows=max_rows,
            validate=validate,
        )
        self._given_size = latent_size
        if latent_size is not None:
            self._given_size = arguments.count("latent_size", latent_size, most=LARGEST)
        self._warned = set()
        self._read_generator()

    @classmethod
    def fast(cls, generator: nn.Module, **overrides: Any) -> Projector:
        """Returns a projector that takes 50 row-steps an image, where the paper's settings take 2,000.

        The settings are one set for all shipped generators, chosen on validation images (`docs/descents.md`); a
        generator of one's own may need others (`tune`).

        Args:
            generator: as for the constructor.
            overrides: arguments of the constructor, which come before the chosen ones.
        """
        return cls(generator, **{**FAST, **overrides})

    @classmethod
    def tune(
        cls,
        generator: nn.Module,
        images: Tensor,
        *,
        budget: int = 150_000,
        seed: int = 0,
        verbose: bool = True,
        **fixed: Any,
    ) -> dict[str, Any]:
        """Finds settings that suit a generator, by successive halving on some clean images.

        Rates from 0.3 to 1,000, random and nearest starting points, free latents and latents on the sphere of sqrt(k),
        1 to 10 restarts and 10 to 200 steps are tried. What counts is the reconstruction error of clean images: how
        much of an attack survives must be measured ("More steps" in `docs/your-own-generator.md`).

        Args:
            generator: as for the constructor.
            images: clean ones, [N, C, H, W]; 23 of them, spread evenly, are used with the default budget.
            budget: about how many row-steps all trials take together. The default takes half a minute with a generator
                of the shipped size on two cores.
            seed: of the projectors.
            verbose: whether progress and a table of the trials are printed on stderr.
            fixed: arguments of the constructor for every trial, such as `latent_size`.

        Returns:
            The cheapest settings whose error is within 10% of the least one found: a dict for
            `Projector(generator, **settings)`.

        Raises:
            ValueError: images do not fit, or no rate leads to a finite error.
        """
        return tuning.tune(cls, generator, images, budget, seed, verbose, fixed)

    def _read_generator(self) -> None:
        """Finds out all that depends on the generator's structure and on the backend."""
        backend, missing = self.backend, None
        if backend == "cuda":
            missing = ops.missing_cuda()
        elif backend == "cpu" and not ops.kernels_available:
            missing = extension.status()["reason"]
        if missing is not None:
            raise RuntimeError(f'backend "{backend}" is not available: {missing}')
        generator = self.generator
        self.latent_size = latent_size_of(generator) if self._given_size is None else self._given_size
        if self._given_size is not None and (failure := failure_with(generator, self._given_size)):
            raise ValueError(f"latent_size must be one that the generator takes: {failure}")
        self._takes_maps = self.latent_size is not None and takes_maps(generator, self.latent_size)
        self._plan, self._reason, self._range = self._lower()
        self._read = (backend, self._is_meta(), structure_of(generator))
        # Not buffers: converting the module's dtype must not round them, and they are not state.
        self._latents, self._latents_of = None, None
        self._draw()

    def _lower(self) -> tuple[Plan | None, str, tuple[float, float] | None]:
        """Returns the plan that kernels run, or None and why; and the range of the generator's pixels where known."""
        try:
            if self.latent_size is None:
                raise LoweringError(self._no_latent_size())
            if self._is_meta():
                name = type(self.generator).__name__
                raise LoweringError(
                    f"generator {name} is on the meta device, where it has no values to check by"
                )
            plan = lower(self.generator, self.latent_size)
        except LoweringError as error:
            if self.backend in ("cpu", "cuda"):
                raise
            return None, str(error), range_of_last(self.generator)
        if self.backend == "reference":
            return None, "the reference backend was asked for", plan.output_range
        if not ops.kernels_available:
            return None, extension.status()["reason"], plan.output_range
        return plan, "", plan.output_range

    def _notice_changes(self) -> None:
        """Reads the generator anew where a layer, a setting, a hook or the backend has changed since.

        A compiled or exported graph is a snapshot by nature, and a copy of DataParallel's was made of what is asked.
        """
        if torch.compiler.is_compiling() or getattr(self, "_is_replica", False) or self._is_meta():
            return
        if self._checked != self._all_settings():
            self._check_settings()
        if self._read != (self.backend, self._is_meta(), structure_of(self.generator)):
            self._read_generator()
        else:
            self._draw()

    # --- what users see ---------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The lowered generator, None where there is no lowering."""
        return self._plan

    @property
    def why_reference(self) -> str | None:
        """Why calls take the reference path, in one clause that names the layer at fault; None where kernels run."""
        return self._why_reference(self._device() or torch.device("cpu"))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the projections of images [B, C, H, W], same shape, dtype and device; raises as `project` does."""
        return self.project(images).images

    def project(
        self, images: Tensor, z0: Tensor | None = None, seed: int | None = None, every: bool = False
    ) -> Projection:
        """Returns the whole result for a batch.

        Args:
            images: [B, C, H, W] float32, bfloat16, float16 or float64, in the generator's range; B may be 0.
            z0: starting points, [R, k] (shared by all images) or [B, R, k]; None: as `starts` and the seed say. It
                must be None with `starts="nearest"`.
            seed: instead of the projector's own for this call.
            every: whether the reconstructions of all restarts are returned, too. The straight-through gradient of an
                image is then the sum of those of its reconstructions, each by the identity.

        Returns:
            A `Projection`.

        Raises:
            TypeError: images or z0 are no tensors of a floating dtype.
            ValueError: shapes, devices or values do not fit; the message names the argument.
        """
        check_training_in_parallel(self.generator)
        self._notice_changes()
        self._check(images, z0)
        seed = arguments.seed(seed)
        if any(module.training for module in self.generator.modules()):
            self.generator.eval()
        latents = self._drawn(images, z0, self.seed if seed is None else seed)
        path = self._path(images, latents)
        start = latents
        if z0 is None and self.starts == "nearest":
            fresh = self.seed is None and seed is None
            start = self._nearest(path, images, latents, origins.fresh_draws(images) if fresh else None)
        descent = self._descent(start.shape[-1])
        latents, errors, steps = path.descend(images, start, descent)
        if self.validate is not False:
            inputs.check_errors(errors, self.generator)
        if start.dim() == 2:
            start = start.expand(images.shape[0], -1, -1)
        chosen = reference.best_restarts(errors)
        best, begun = _pick(latents, chosen), _pick(start, chosen)
        every_image = None
        if every:
            decoded = path.decode(latents.flatten(0, 1)).to(images.dtype)
            repeated = images.repeat_interleave(errors.shape[1], 0)
            taken = None if steps is None else steps.flatten()
            every_image = tie(self.gradient, path, repeated, decoded, descent, start.flatten(0, 1), taken)
            every_image = every_image.unflatten(0, errors.shape)
            reconstruction = _pick(decoded.unflatten(0, errors.shape), chosen)
        else:
            reconstruction = path.decode(best).to(images.dtype)
        taken = None if steps is None else _pick(steps, chosen)
        reconstruction = tie(self.gradient, path, images, reconstruction, descent, begun, taken)
        return Projection(reconstruction, best, _pick(errors, chosen), chosen, errors, every_image)

    def precision_for(self, images: Tensor) -> str:
        """Returns the precision that a call with these images would use: one of `precisions.ALL`, or "float64"."""
        if self._is_double():
            return "float64"
        if self.precision != "auto":
            return self.precision
        kind = images.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if dtype == torch.bfloat16:
                return "bfloat16"
            if dtype == torch.float16:
                return "float16"
        return "float16" if kind == "cuda" and self.backend_for(images) == "cuda" else "float32"

    def backend_for(self, images: Tensor) -> str:
        """Returns the backend that a call with these images would use: "cpu", "cuda" or "reference"."""
        return images.device.type if self._why_reference(images.device) is None else "reference"

    def train(self, mode: bool = True) -> Projector:
        """Sets the mode of the projector alone: the generator stays in eval mode, its statistics are frozen."""
        super().train(mode)
        self.generator.eval()
        return self

    # --- the steps of a call ----------------------------------------------------------------------------

    def _nearest(self, path: Path, images: Tensor, candidates: Tensor, draws: Tensor | None) -> Tensor:
        """Returns the starting points of each image, [B, R, k]: the candidates whose images are nearest to it."""
        used = self._fitting(images.shape[1:])
        return candidates[path.nearest(images, candidates[:used], self.restarts, draws)]

    # --- the two paths ----------------------------------------------------------------------------------

    def _path(self, images: Tensor, start: Tensor) -> Path:
        """Returns the path that a call takes, after the checks that only its start can make."""
        validate = images.device.type == "cpu" if self.validate is None else self.validate
        precision = self.precision_for(images)
        if precision == "float16" and images.device.type == "cpu":
            if self.precision == "auto":
                raise ValueError("autocast must be in bfloat16 on the CPU, got float16")
            raise ValueError(
                'precision must be "float32" or "bfloat16" on the CPU, got "float16": use "bfloat16"'
            )
        if validate:
            warn_of_another_range(images, self._range, self._warned)
        reason = self._why_reference(images.device)
        if self._plan is not None and reason is None:
            return KernelPath(self._plan, self.generator, precision, self.max_rows, validate)
        # Importing the package has warned where there are no kernels, and float64 is there to be exact.
        if (
            self.backend == "auto"
            and ops.kernels_available
            and not self._is_double()
            and "path" not in self._warned
        ):
            self._warned.add("path")
            warnings.warn(f"running on the reference path: {reason}", stacklevel=4)
        path = ReferencePath(
            self.generator,
            self._takes_maps,
            precision,
            images.shape[1:],
            images.device.type,
            self.max_rows,
            functools.partial(inputs.check_values, bounds=self._range) if validate else None,
        )
        first = start.detach().reshape(-1, start.shape[-1])[:1].repeat(2, 1)
        if len(first):
            name = type(self.generator).__name__
            with torch.no_grad():
                shape = inputs.check_output(path.outputs(first.to(path.dtype)), name)
            inputs.check_shape(images, shape, name)
        return path

    def _check(self, images: Any, z0: Any) -> None:
        expected = None if self._plan is None else self._plan.image_shape
        inputs.check_images(images, expected, type(self.generator).__name__, self._device())
        if self.backend in ("cpu", "cuda") and images.device.type != self.backend:
            raise ValueError(
                f'images must be on a {self.backend} device with backend="{self.backend}", got {images.device}'
            )
        if z0 is not None:
            if self.starts == "nearest":
                raise ValueError('z0 must be None with starts="nearest", which finds starting points itself')
            inputs.check_z0(z0, images, self.latent_size, self.restarts)

    # --- small things -----------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Projector:
        super()._apply(fn, recurse)
        self._place_latents()
        if isinstance(self.candidates, Tensor):
            self._check_settings()
        return self

    def _replicate_for_data_parallel(self) -> Projector:
        self._notice_changes()
        return super()._replicate_for_data_parallel()

    def _is_double(self) -> bool:
        return any(p.dtype == torch.float64 for p in tensors_of(self.generator))

    def _why_reference(self, device: torch.device) -> str | None:
        """Returns why calls with images on a device take the reference path, None where kernels run."""
        if self._plan is None:
            return self._reason
        if self._is_double():
            return f"generator {type(self.generator).__name__} is float64"
        if device.type == "cuda" and not ops.cuda_kernels_run_on(device.index or 0):
            return f"no CUDA kernels for {device}: {ops.missing_cuda() or 'its architecture is too old'}"
        return None if device.type in ("cpu", "cuda") else f"no kernels for {device.type} devices"


def _pick(values: Tensor, restarts: Tensor) -> Tensor:
    """Returns values [B, R, ...] at restarts [B], as [B, ...]."""
    index = restarts.view(-1, *(1,) * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)
