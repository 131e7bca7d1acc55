"""The defence as a module: images in, their projections onto the range of a generator out.

`Projector` decides once which path a generator takes (lowered to a plan for the kernels, or plain PyTorch), and
for each call the precision, the starting points and how the gradient flows; the work is in `ops` and `reference`.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments, gradients, inputs, precisions, reference, starts
from .kernels import extension, ops
from .paths import KernelPath, Path, ReferencePath
from .plan import LoweringError, Plan, activations, latent_size_of, lower, structure_of, takes_maps
from .plan.latents import check_takes_latents_alone, failure_of

_PRECISIONS = ("auto", *precisions.ALL)
_GRADIENTS = ("straight_through", "unrolled", "none")
_BACKENDS = ("auto", "cpu", "cuda", "reference")

# Sizes beyond every use; what follows from them must not be allocated before somebody notices a slip.
MOST_STEPS = 1_000_000
MOST_RESTARTS = 65_536
MOST_ROWS = 2**31 - 1


class Projection(NamedTuple):
    """Everything that a projection yields.

    Attributes:
        images: the reconstruction G(z*), [B, C, H, W], dtype of the input; carries the projector's gradient.
        latents: z*, [B, k].
        errors: mean squared error of the chosen restart, [B], float32 (float64 for float64 generators).
        restarts: index of the chosen restart, [B], int64. (`Projector.restarts` is a count.)
        all_errors: final error of every restart, [B, R].
    """

    images: Tensor
    latents: Tensor
    errors: Tensor
    restarts: Tensor
    all_errors: Tensor


class Projector(nn.Module):
    """Projects images onto the range of a generator (Defense-GAN, Samangouei, Kabkab, Chellappa, ICLR 2018, eq. 8).

    Args:
        generator: any `nn.Module` that maps latents [N, k] (or [N, k, 1, 1]) to images [N, C, H, W]; held, not
            copied, and put in eval mode. Without a lowering it runs on the reference path, with one warning.
        steps: L, gradient steps on the latent.
        restarts: R, the count of starting points of every image. (`Projection.restarts` is an index below it.)
        lr: learning rate on the mean squared error; the released code's 10 suits the shipped generators.
        momentum: of the heavy ball, in [0, 1).
        lr_decay: factor on the learning rate from step ceil(decay_at * steps) on.
        decay_at: see `lr_decay`, in [0, 1].
        seed: an int makes starting point r a function of (seed, r) alone; None draws fresh ones per image and call.
        precision: "auto" (what autocast says, else float32 on the CPU and float16 on CUDA), "float32", "bfloat16"
            or "float16".
        gradient: "straight_through" (identity backward), "unrolled" (through all steps) or "none" (backward raises).
        backend: "auto" (the kernels of the images' device where there are some), "cpu", "cuda" or "reference".
        max_rows: rows (image x restart) in flight at most; None keeps working memory under 200 MB.
        validate: whether values are checked (finite, in the generator's range). None: on for CPU tensors.

    Raises:
        ValueError: an argument is out of its range, or `backend` names a kernel that cannot take the generator.
        TypeError: `generator` is no module.
        RuntimeError: `backend` names a kernel that is not available here.

    Example:
        >>> defended = torch.nn.Sequential(Projector(load_generator("digits")), classifier)
    """

    def __init__(
        self,
        generator: nn.Module,
        *,
        steps: int = 200,
        restarts: int = 10,
        lr: float = 10.0,
        momentum: float = 0.7,
        lr_decay: float = 0.1,
        decay_at: float = 0.8,
        seed: int | None = 0,
        precision: str = "auto",
        gradient: str = "straight_through",
        backend: str = "auto",
        max_rows: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(generator, nn.Module):
            raise TypeError(f"generator must be a torch.nn.Module, got {type(generator).__name__}")
        self.steps = arguments.count("steps", steps, most=MOST_STEPS)
        self.restarts = arguments.count("restarts", restarts, most=MOST_RESTARTS)
        self.lr = arguments.number("lr", lr, above=0)
        self.momentum = arguments.number("momentum", momentum, least=0, below=1)
        self.lr_decay = arguments.number("lr_decay", lr_decay, above=0)
        self.decay_at = arguments.number("decay_at", decay_at, least=0, most=1)
        self.seed = arguments.seed(seed)
        self.precision = arguments.choice("precision", precision, _PRECISIONS)
        self.gradient = arguments.choice("gradient", gradient, _GRADIENTS)
        self.backend = arguments.choice("backend", backend, _BACKENDS)
        self.max_rows = None if max_rows is None else arguments.count("max_rows", max_rows, most=MOST_ROWS)
        self.validate = validate
        self.generator = generator.eval()
        check_takes_latents_alone(generator)
        self._warned = False
        self._read_generator()

    def _read_generator(self) -> None:
        """Finds out all that depends on the generator's structure and on the backend."""
        backend = arguments.choice("backend", self.backend, _BACKENDS)
        missing = None
        if backend == "cuda":
            missing = ops.missing_cuda()
        elif backend == "cpu" and not ops.kernels_available:
            missing = extension.status()["reason"]
        if missing is not None:
            raise RuntimeError(f'backend "{backend}" is not available: {missing}')
        generator = self.generator
        self.latent_size = latent_size_of(generator)
        self._takes_maps = self.latent_size is not None and takes_maps(generator, self.latent_size)
        self._plan, self._reason, self._range = self._lower()
        self._read = (backend, structure_of(generator))
        # Not a buffer: converting the module's dtype must not round them, and they are not state.
        self._starts: Tensor | None = None
        self._starts_of = (self.seed, self.restarts)
        if self.seed is not None and self.latent_size is not None:
            points = starts.starting_points(self.seed, self.restarts, self.latent_size)
            self._starts = points.to(self._device())

    def _lower(self) -> tuple[Plan | None, str, tuple[float, float] | None]:
        """Returns the plan that kernels run, or None and why; and the range of the generator's pixels where known."""
        try:
            if self.latent_size is None:
                raise LoweringError(self._no_latent_size())
            plan = lower(self.generator, self.latent_size)
        except LoweringError as error:
            if self.backend in ("cpu", "cuda"):
                raise
            return None, str(error), _sequential_range(self.generator)
        if self.backend == "reference":
            return None, "the reference backend was asked for", plan.output_range
        if not ops.kernels_available:
            return None, extension.status()["reason"], plan.output_range
        return plan, "", plan.output_range

    def _no_latent_size(self) -> str:
        failure = failure_of(self.generator)
        name = type(self.generator).__name__
        return f"generator {name} does not tell its latent size{f' ({failure})' if failure else ''}"

    def _notice_changes(self) -> None:
        """Reads the generator anew where a layer, a setting, a hook or the backend has changed since.

        A compiled or exported graph is a snapshot by nature, and is not asked.
        """
        if not torch.compiler.is_compiling() and self._read != (self.backend, structure_of(self.generator)):
            self._read_generator()

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

    def project(self, images: Tensor, z0: Tensor | None = None, seed: int | None = None) -> Projection:
        """Returns the whole result for a batch.

        Args:
            images: [B, C, H, W] float32, bfloat16, float16 or float64, in the generator's range; B may be 0.
            z0: starting points, [R, k] (shared by all images) or [B, R, k]; None: from the seed.
            seed: instead of the projector's own for this call.

        Returns:
            A `Projection`.

        Raises:
            TypeError: images or z0 are no tensors of a floating dtype.
            ValueError: shapes, devices or values do not fit; the message names the argument.
        """
        self._notice_changes()
        self._check(images, z0)
        seed = arguments.seed(seed)
        if any(module.training for module in self.generator.modules()):
            self.generator.eval()
        start = self._start(images, z0, self.seed if seed is None else seed)
        rates = reference.learning_rates(self.steps, self.lr, self.lr_decay, self.decay_at)
        descent = reference.Descent(rates, self.momentum)
        path = self._path(images, start)
        latents, errors, steps = path.descend(images, start, descent)
        chosen = reference.best_restarts(errors)
        best = _pick(latents, chosen)
        reconstruction = path.decode(best).to(images.dtype)
        if images.requires_grad and torch.is_grad_enabled():
            if self.gradient == "straight_through":
                reconstruction = gradients.straight_through(images, reconstruction)
            elif self.gradient == "none":
                reconstruction = gradients.no_gradient(images, reconstruction)
            else:
                z0 = start[chosen] if start.dim() == 2 else _pick(start, chosen)
                taken = None if steps is None else _pick(steps, chosen)
                reconstruction = path.unrolled(images, reconstruction, z0, descent, taken)
        return Projection(reconstruction, best, _pick(errors, chosen), chosen, errors)

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

    def extra_repr(self) -> str:
        return (
            f"steps={self.steps}, restarts={self.restarts}, lr={self.lr}, momentum={self.momentum}, seed={self.seed}, "
            f"precision={self.precision!r}, gradient={self.gradient!r}, backend={self.backend!r}"
        )

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
        reason = self._why_reference(images.device)
        if self._plan is not None and reason is None:
            return KernelPath(self._plan, self.generator, precision, self.max_rows, validate)
        # Importing the package has warned where there are no kernels, and float64 is there to be exact.
        if self.backend == "auto" and ops.kernels_available and not self._is_double() and not self._warned:
            self._warned = True
            warnings.warn(f"running on the reference path: {reason}", stacklevel=4)
        if validate:
            inputs.check_values(images, start, self._range)
        path = ReferencePath(
            self.generator,
            self._takes_maps,
            precision,
            images.shape[1:],
            images.device.type,
            self.max_rows,
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
            inputs.check_z0(z0, images, self.latent_size, self.restarts)

    # --- small things -----------------------------------------------------------------------------------

    def _device(self) -> torch.device | None:
        tensors = itertools.chain(self.generator.parameters(), self.generator.buffers())
        return next((tensor.device for tensor in tensors), None)

    def _apply(self, fn: Any, recurse: bool = True) -> Projector:
        super()._apply(fn, recurse)
        if self._starts is not None:
            self._starts = self._starts.to(self._device() or self._starts.device)
        return self

    def _is_double(self) -> bool:
        return any(p.dtype == torch.float64 for p in self.generator.parameters())

    def _why_reference(self, device: torch.device) -> str | None:
        """Returns why calls with images on a device take the reference path, None where kernels run."""
        if self._plan is None:
            return self._reason
        if self._is_double():
            return f"generator {type(self.generator).__name__} is float64"
        if device.type == "cuda" and not ops.cuda_kernels_run_on(device.index or 0):
            return f"no CUDA kernels for {device}: {ops.missing_cuda() or 'its architecture is too old'}"
        return None if device.type in ("cpu", "cuda") else f"no kernels for {device.type} devices"

    def _start(self, images: Tensor, z0: Tensor | None, seed: int | None) -> Tensor:
        if z0 is not None:
            return z0
        if self.latent_size is None:
            raise ValueError(f"{self._no_latent_size()}: pass z0, or give it an attribute latent_size")
        if seed is None:
            return starts.fresh(images.shape[0], self.restarts, self.latent_size, images.device)
        kept = self._starts
        if kept is not None and (seed, self.restarts) == self._starts_of:
            return kept
        return starts.seeded(seed, self.restarts, self.latent_size).to(images.device)


def _pick(values: Tensor, restarts: Tensor) -> Tensor:
    """Returns values [B, R, ...] at restarts [B], as [B, ...]."""
    index = restarts.view(-1, *(1,) * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


def _sequential_range(generator: nn.Module) -> tuple[float, float] | None:
    """Returns the interval of a plain stack's pixels where its last layer bounds them, None for any other module."""
    last: nn.Module = generator
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    name = activations.OF_MODULE.get(type(last))
    return None if name is None else activations.ACTIVATIONS[name].output_range
