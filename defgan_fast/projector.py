"""The defence as a module: images in, their projections onto the range of a generator out.

`Projector` decides once which path a generator takes (lowered to a plan for the kernels, or plain PyTorch), and
for each call the precision, the starting points and how the gradient flows; the work is in `ops` and `reference`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import gradients, reference
from .kernels import extension, ops
from .plan import LoweringError, Plan, latent_size_of, lower, takes_maps
from .starts import starting_points

_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GRADIENTS = ("straight_through", "unrolled", "none")
_BACKENDS = ("auto", "cpu", "cuda", "reference")


class Projection(NamedTuple):
    """Everything that a projection yields.

    Attributes:
        images: the reconstruction G(z*), [B, C, H, W], dtype of the input; carries the projector's gradient.
        latents: z*, [B, k].
        errors: mean squared error of the chosen restart, [B], float32 (float64 for float64 generators).
        restarts: index of the chosen restart, [B], int64.
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
        restarts: R, starting points of every image.
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
        _check_count("steps", steps)
        _check_count("restarts", restarts)
        if max_rows is not None:
            _check_count("max_rows", max_rows)
        check_number("lr", lr, lambda v: v > 0, "a positive number")
        check_number("momentum", momentum, lambda v: 0 <= v < 1, "in [0, 1)")
        check_number("lr_decay", lr_decay, lambda v: v > 0, "a positive number")
        check_number("decay_at", decay_at, lambda v: 0 <= v <= 1, "in [0, 1]")
        _check_seed(seed)
        _check_choice("precision", precision, ("auto", *_PRECISIONS))
        _check_choice("gradient", gradient, _GRADIENTS)
        _check_choice("backend", backend, _BACKENDS)
        self.generator = generator.eval()
        self.steps = steps
        self.restarts = restarts
        self.lr = float(lr)
        self.momentum = float(momentum)
        self.lr_decay = float(lr_decay)
        self.decay_at = float(decay_at)
        self.seed = seed
        self.precision = precision
        self.gradient = gradient
        self.backend = backend
        self.max_rows = max_rows
        self.validate = validate
        self.latent_size = latent_size_of(generator)
        self._plan, self._reason, self._range = self._lower()
        self._takes_maps = self.latent_size is not None and takes_maps(generator, self.latent_size)
        self._warned = False
        # Not a buffer: converting the module's dtype must not round them, and they are not state.
        self._starts: Tensor | None = None
        if seed is not None and self.latent_size is not None:
            self._starts = starting_points(seed, restarts, self.latent_size).to(self._device())

    def _lower(self) -> tuple[Plan | None, str, tuple[float, float] | None]:
        """The plan that the kernels run, or None and why; and the range of the generator's pixels where known."""
        if self.backend == "cuda":
            missing = ops.missing_cuda()
            if missing is not None:
                raise RuntimeError(f'backend "cuda" is not available: {missing}')
        if self.backend == "cpu" and not ops.kernels_available:
            raise RuntimeError(f'backend "cpu" is not available: {extension.status()["reason"]}')
        try:
            if self.latent_size is None:
                name = type(self.generator).__name__
                raise LoweringError(f"generator {name} does not tell its latent size")
            plan = lower(self.generator, self.latent_size)
        except LoweringError as error:
            if self.backend in ("cpu", "cuda"):
                raise
            return None, str(error), _sequential_range(self.generator)
        if self.backend == "reference":
            return None, "the reference backend was asked for", plan.output_range
        if not ops.kernels_available:
            return None, "", plan.output_range  # importing the package has warned, with the reason
        return plan, "", plan.output_range

    # --- what users see ---------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The lowered generator, None where there is no lowering."""
        return self._plan

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> their projections, same shape, dtype and device. Errors: see `project`."""
        return self.project(images).images

    def project(self, images: Tensor, z0: Tensor | None = None, seed: int | None = None) -> Projection:
        """The whole result for a batch.

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
        self._check(images, z0)
        _check_seed(seed)
        if any(module.training for module in self.generator.modules()):
            self.generator.eval()
        start = self._start(images, z0, self.seed if seed is None else seed)
        rates = reference.learning_rates(self.steps, self.lr, self.lr_decay, self.decay_at)
        if self._plan is not None and self._kernel_can_take(images):
            return self._project_with_kernels(self._plan, images, start, rates)
        return self._project_with_reference(images, start, rates)

    def precision_for(self, images: Tensor) -> str:
        """The precision that a call with these images would use: "float32", "bfloat16", "float16" or "float64"."""
        if self._is_double(images):
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
        """The backend that a call with these images would use: "cpu", "cuda" or "reference"."""
        return images.device.type if self._plan is not None and self._kernel_can_take(images) else "reference"

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

    def _project_with_kernels(
        self, plan: Plan, images: Tensor, start: Tensor, rates: list[float]
    ) -> Projection:
        parameters = [p.detach() for p in plan.tensors(self.generator)]
        max_rows = self.max_rows or 0
        validate = images.device.type == "cpu" if self.validate is None else self.validate
        latents, errors = torch.ops.defgan_fast.project(
            images.detach(),
            start.detach(),
            parameters,
            plan.text,
            rates,
            self.momentum,
            self.precision_for(images),
            max_rows,
            validate,
        )
        restarts = reference.best_restarts(errors)
        best = _pick(latents, restarts)
        decoded = torch.ops.defgan_fast.decode(best, parameters, plan.text, max_rows).to(images.dtype)

        def unrolled() -> Tensor:
            chosen = _pick_start(start, restarts)
            return gradients.unrolled(images, decoded, chosen, parameters, plan.text, rates, self.momentum)

        reconstruction = self._tie(images, decoded, unrolled)
        return Projection(reconstruction, best, _pick(errors, restarts), restarts, errors)

    def _project_with_reference(self, images: Tensor, start: Tensor, rates: list[float]) -> Projection:
        reason = self._reason
        if images.device.type == "cuda" and self._plan is not None and not self._is_double(images):
            reason = (
                f"no CUDA kernels for {images.device}: {ops.missing_cuda() or 'its architecture is too old'}"
            )
        if self.backend == "auto" and reason and not self._warned:
            self._warned = True
            warnings.warn(f"running on the reference path: {reason}", stacklevel=4)
        precision = self.precision_for(images)
        if precision == "float16" and images.device.type == "cpu":
            raise ValueError(
                'precision must be "float32" or "bfloat16" on the CPU, got "float16": use "bfloat16"'
            )
        if images.device.type == "cpu" if self.validate is None else self.validate:
            self._check_values(images, start)
        dtype = torch.float64 if precision == "float64" else torch.float32
        decoder = self._decoder(precision, images.device.type, dtype)
        targets, start = images.detach().to(dtype), start.detach().to(dtype)
        self._check_output(images, start)
        latents, errors = reference.project(
            decoder, targets, start, rates, self.momentum, self._rows_in_flight(images)
        )
        restarts = reference.best_restarts(errors)
        best = _pick(latents, restarts)
        with torch.no_grad():
            decoded = decoder(best).to(images.dtype) if len(images) else torch.empty_like(images)

        def unrolled() -> Tensor:
            chosen = _pick_start(start, restarts)
            return _Unrolled.apply(images, decoded, chosen, decoder, rates, self.momentum, dtype)

        reconstruction = self._tie(images, decoded, unrolled)
        return Projection(reconstruction, best, _pick(errors, restarts), restarts, errors)

    def _tie(self, images: Tensor, reconstruction: Tensor, unrolled: Callable[[], Tensor]) -> Tensor:
        """The reconstruction with the gradient that was chosen, where one is asked for."""
        if not (images.requires_grad and torch.is_grad_enabled()):
            return reconstruction
        if self.gradient == "straight_through":
            return gradients.straight_through(images, reconstruction)
        if self.gradient == "none":
            return gradients.no_gradient(images, reconstruction)
        return unrolled()

    def _decoder(self, precision: str, device: str, dtype: torch.dtype) -> reference.Decoder:
        """The generator with latents and images in `dtype`, its layers in `precision` (by autocast where 16 bits)."""
        own = next((p.dtype for p in self.generator.parameters() if p.is_floating_point()), dtype)
        layers = _PRECISIONS.get(precision, dtype)

        def decode(z: Tensor) -> Tensor:
            z = z.to(own)
            with torch.autocast(device, dtype=layers, enabled=layers in (torch.bfloat16, torch.float16)):
                return self.generator(z[:, :, None, None] if self._takes_maps else z).to(dtype)

        return decode

    def _rows_in_flight(self, images: Tensor) -> int | None:
        if self.max_rows is not None:
            return self.max_rows
        # Autograd keeps every activation; a generous bound of 256 floats a pixel stays under 200 MB.
        pixels = max(1, math.prod(images.shape[1:]))
        return max(1, 200_000_000 // (256 * 4 * pixels))

    # --- checks -----------------------------------------------------------------------------------------

    def _check(self, images: Any, z0: Any) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
        if images.dtype not in _DTYPES:
            raise TypeError(f"images must have dtype float32, bfloat16 or float16, got {_name(images.dtype)}")
        if images.dim() != 4:
            raise ValueError(f"images must have shape [B, C, H, W], got {list(images.shape)}")
        if self._plan is not None and tuple(images.shape[1:]) != self._plan.image_shape:
            raise ValueError(self._shape_message(self._plan.image_shape, images))
        device = self._device()
        if device is not None and images.device != device:
            raise ValueError(f"images must be on the generator's device ({device}), got {images.device}")
        if self.backend in ("cpu", "cuda") and images.device.type != self.backend:
            raise ValueError(
                f'images must be on a {self.backend} device with backend="{self.backend}", got {images.device}'
            )
        if z0 is None:
            return
        if not isinstance(z0, Tensor):
            raise TypeError(f"z0 must be a torch.Tensor, got {type(z0).__name__}")
        if not z0.dtype.is_floating_point:
            raise TypeError(f"z0 must have a floating dtype, got {_name(z0.dtype)}")
        if z0.device != images.device:
            raise ValueError(f"z0 must be on the images' device ({images.device}), got {z0.device}")
        k = "k" if self.latent_size is None else self.latent_size
        fits = z0.dim() == 2 or (z0.dim() == 3 and z0.shape[0] == images.shape[0])
        if not fits or z0.shape[-2] < 1 or (self.latent_size is not None and z0.shape[-1] != k):
            raise ValueError(
                f"z0 must have shape [R, {k}] or [{images.shape[0]}, R, {k}] with R at least 1, got {list(z0.shape)}"
            )

    def _check_values(self, images: Tensor, start: Tensor) -> None:
        if not torch.isfinite(images).all():
            raise ValueError("images must be finite")
        if not torch.isfinite(start).all():
            raise ValueError("z0 must be finite")
        bounds = self._range
        if bounds is None or images.numel() == 0:
            return
        low, high = images.min().item(), images.max().item()
        slack = 0.01 * (bounds[1] - bounds[0])
        if low < bounds[0] - slack or high > bounds[1] + slack:
            raise ValueError(
                f"images must lie in the generator's range [{bounds[0]:g}, {bounds[1]:g}], got [{low:g}, {high:g}]"
            )

    def _check_output(self, images: Tensor, start: Tensor) -> None:
        name = type(self.generator).__name__
        z = start.reshape(-1, start.shape[-1])[:1].repeat(2, 1)
        if len(z) == 0:
            return
        with torch.no_grad():
            z = z.to(next((p.dtype for p in self.generator.parameters() if p.is_floating_point()), z.dtype))
            output = self.generator(z[:, :, None, None] if self._takes_maps else z)
        if not isinstance(output, Tensor):
            raise TypeError(f"generator {name} must return a tensor, got {type(output).__name__}")
        if output.dim() != 4 or output.shape[0] != 2:
            raise ValueError(
                f"generator {name} must return images [N, C, H, W] for N latents, got {list(output.shape)} for 2"
            )
        if output.shape[1:] != images.shape[1:]:
            raise ValueError(self._shape_message(output.shape[1:], images))

    def _shape_message(self, shape: Sequence[int], images: Tensor) -> str:
        expected, name = ", ".join(map(str, shape)), type(self.generator).__name__
        return f"images must have shape [B, {expected}], as generator {name} returns them, got {list(images.shape)}"

    # --- small things -----------------------------------------------------------------------------------

    def _device(self) -> torch.device | None:
        tensors = itertools.chain(self.generator.parameters(), self.generator.buffers())
        return next((tensor.device for tensor in tensors), None)

    def _apply(self, fn: Any, recurse: bool = True) -> Projector:
        super()._apply(fn, recurse)
        if self._starts is not None:
            self._starts = self._starts.to(self._device() or self._starts.device)
        return self

    def _is_double(self, images: Tensor) -> bool:
        if images.dtype == torch.float64:
            return True
        return any(p.dtype == torch.float64 for p in self.generator.parameters())

    def _kernel_can_take(self, images: Tensor) -> bool:
        if self._is_double(images):
            return False
        device = images.device
        return device.type == "cpu" or (device.type == "cuda" and ops.cuda_kernels_run_on(device.index or 0))

    def _start(self, images: Tensor, z0: Tensor | None, seed: int | None) -> Tensor:
        if z0 is not None:
            return z0
        if self.latent_size is None:
            raise ValueError(
                f"generator {type(self.generator).__name__} does not tell its latent size: pass z0, or give it "
                "an attribute latent_size"
            )
        if seed is None:
            shape = (images.shape[0], self.restarts, self.latent_size)
            return torch.randn(shape, dtype=torch.float32, device=images.device) / math.sqrt(self.latent_size)
        starts = self._starts
        if starts is not None and seed == self.seed and starts.shape[0] == self.restarts:
            return starts
        signed = (seed + 2**63) % 2**64 - 2**63  # an op's integers have 64 bits; the points depend on no more
        return torch.ops.defgan_fast.starting_points(signed, self.restarts, self.latent_size).to(
            images.device
        )


class _Unrolled(torch.autograd.Function):
    """`gradients.unrolled` for generators that have no plan: the decoder is a Python callable."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        reconstruction: Tensor,
        z0: Tensor,
        decoder: reference.Decoder,
        rates: list[float],
        momentum: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(images, z0)
        ctx.arguments = (decoder, rates, momentum, dtype)
        return reconstruction.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        images, z0 = ctx.saved_tensors
        decoder, rates, momentum, dtype = ctx.arguments
        result = reference.unrolled_gradient(
            decoder, images.to(dtype), z0.to(dtype), rates, momentum, gradients[0].to(dtype)
        )
        return result.to(images.dtype), None, None, None, None, None, None


def _pick(values: Tensor, restarts: Tensor) -> Tensor:
    """values [B, R, ...] at restarts [B] -> [B, ...]."""
    index = restarts.view(-1, *(1,) * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


def _pick_start(start: Tensor, restarts: Tensor) -> Tensor:
    """The starting point of each image's chosen restart, from [R, k] or [B, R, k] -> [B, k]."""
    return start[restarts] if start.dim() == 2 else _pick(start, restarts)


def _sequential_range(generator: nn.Module) -> tuple[float, float] | None:
    """The interval of the pixels of a plain stack whose last layer bounds them; of any other module unknown."""
    last: nn.Module = generator
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    if isinstance(last, nn.Sigmoid):
        return 0.0, 1.0
    return (-1.0, 1.0) if isinstance(last, nn.Tanh) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_seed(seed: Any) -> None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}")


def check_number(name: str, value: Any, fits: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
