"""The same projection by other means: eager PyTorch, a compiled step, a CUDA graph, and a JAX loop.

Every peer runs L steps of heavy-ball descent from the same starting points and returns the final errors, as
the kernels do, and is written the way a careful user of that library would write it: rows flattened once,
weights in the layout and type that suit it, no work inside the loop that belongs outside. A 16-bit peer
runs the network in 16 bits and keeps z, the momentum and the loss in float32, as the kernels do.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import reference
from ..precisions import DTYPES, ON_CPU

MOMENTUM = 0.7
LEARNING_RATE = 10.0
LR_DECAY = 0.1
DECAY_AT = 0.8


Run = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Work:
    """One problem: project `images` [B, C, H, W] onto `generator` from `z0` [B, R, k]; all float32."""

    generator: nn.Module
    images: torch.Tensor
    z0: torch.Tensor

    @property
    def rows(self) -> int:
        """B x R."""
        return self.z0.shape[0] * self.z0.shape[1]


@dataclass(frozen=True)
class Peer:
    """A way to do the work.

    `prepare(work)` does all that is done once (conversion of the weights, compilation) and returns a function
    of the number of steps that projects and returns the final errors [B, R]; only that function is timed.
    """

    name: str
    precision: str
    prepare: Callable[[Work], Run]


class Unavailable(Exception):
    """This peer cannot do this work here; the message says why."""


def learning_rates(steps: int) -> list[float]:
    """The method's rate for each step."""
    return reference.learning_rates(steps, LEARNING_RATE, LR_DECAY, DECAY_AT)


def ours(precision: str, backend: str = "cpu") -> Peer:
    """The kernels, through the public `Projector` and all of its overhead."""

    def prepare(work: Work) -> Run:
        from .. import Projector

        projectors: dict[int, Projector] = {}

        def run(steps: int) -> torch.Tensor:
            if steps not in projectors:
                projectors[steps] = Projector(
                    work.generator,
                    steps=steps,
                    restarts=work.z0.shape[1],
                    precision=precision,
                    backend=backend,
                )
            return projectors[steps].project(work.images, z0=work.z0).all_errors

        return run

    return Peer(f"defgan_fast {backend}", precision, prepare)


def pytorch_peers(compiled: bool = True) -> list[Peer]:
    """Eager and compiled PyTorch, both memory layouts, both precisions; compiled only where a compiler is."""
    peers = []
    for precision in ON_CPU:
        for layout in ("NCHW", "channels_last"):
            peers.append(Peer(f"eager {layout}", precision, _pytorch(precision, layout, _eager_step)))
            if compiled and shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]):
                prepare = _pytorch(precision, layout, _compiled_step)
                peers.append(Peer(f"torch.compile {layout}", precision, prepare))
    return peers


def gpu_peers(compiled: bool = True) -> list[Peer]:
    """PyTorch on a GPU, each way in the precision and layout that suit it.

    float32 with TF32 in products and convolutions, where the caller has allowed it ("tf32"); float16 with
    channels_last, which is what cuDNN's tensor-core kernels want.
    """
    peers = [
        Peer("eager NCHW", "tf32", _pytorch("float32", "NCHW", _eager_step)),
        Peer("eager channels_last", "float16", _pytorch("float16", "channels_last", _eager_step)),
        Peer("CUDA graph channels_last", "float16", _graphed("float16", "channels_last")),
    ]
    if compiled:
        for mode in ("default", "reduce-overhead"):
            prepare = _pytorch("float16", "channels_last", partial(_compiled_step, mode=mode))
            peers.append(Peer(f"torch.compile {mode} channels_last", "float16", prepare))
    return peers


def jax_peers() -> list[Peer]:
    """A jitted JAX loop in float32, where JAX is installed."""
    return [Peer("jax jit", "float32", _jax)] if importlib.util.find_spec("jax") else []


def rows_of(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """The images [B * R, C, H, W] and starting points [B * R, k] of all rows, image by image."""
    return work.images.repeat_interleave(work.z0.shape[1], 0), work.z0.flatten(0, 1)


def row_errors(generator: nn.Module, z: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """[N, k], [N, C, H, W] -> [N]: mean squared error of each row."""
    return (generator(z) - images).square().flatten(1).mean(1)


class _Narrow(nn.Module):
    """The network in 16 bits between a float32 latent and a float32 image."""

    def __init__(self, generator: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.generator = generator.to(dtype)
        self.dtype = dtype

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.generator(z.to(self.dtype)).float()


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _eager_step(generator: nn.Module) -> Step:
    def step(
        z: torch.Tensor, velocity: torch.Tensor, images: torch.Tensor, rate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.requires_grad_()
        (gradient,) = torch.autograd.grad(row_errors(generator, z, images).sum(), z)
        velocity = velocity.mul_(MOMENTUM).add_(gradient)
        return z.detach() - rate * velocity, velocity

    return step


def _compiled_step(generator: nn.Module, mode: str = "default") -> Step:
    def step(
        z: torch.Tensor, velocity: torch.Tensor, images: torch.Tensor, rate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = torch.func.grad(lambda z: row_errors(generator, z, images).sum())(z)
        velocity = MOMENTUM * velocity + gradient
        return z - rate * velocity, velocity

    compiled = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
    if mode == "default":
        return compiled

    def graphed(
        z: torch.Tensor, velocity: torch.Tensor, images: torch.Tensor, rate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The graph writes its results where it wrote the last ones, and copies inputs that may move; these do not.
        torch._dynamo.mark_static_address(images)
        torch.compiler.cudagraph_mark_step_begin()
        z, velocity = compiled(z, velocity, images, rate)
        return z.clone(), velocity.clone()

    return graphed


def network_in(generator: nn.Module, precision: str, layout: str = "NCHW") -> nn.Module:
    """A copy of the generator that takes and returns float32 and computes in `precision`."""
    network = copy.deepcopy(generator)
    if layout == "channels_last":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network if precision == "float32" else _Narrow(network, DTYPES[precision])


def _loop(precision: str, layout: str, make_step: Callable[[nn.Module], Step], work: Work) -> Run:
    """All steps, one call of the step function each."""
    step = make_step(network_in(work.generator, precision, layout))
    images, z0 = rows_of(work)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    rates: dict[int, tuple[torch.Tensor, ...]] = {}

    def run(steps: int) -> torch.Tensor:
        if steps not in rates:
            # Tensors, so that a compiled step does not specialise on the rate
            rates[steps] = torch.tensor(learning_rates(steps), device=z0.device).unbind()
        z, velocity = z0.clone(), torch.zeros_like(z0)
        for rate in rates[steps]:
            z, velocity = step(z, velocity, images, rate)
        with torch.no_grad():
            return row_errors(work.generator, z, images).view(work.z0.shape[:2])

    return run


def _pytorch(precision: str, layout: str, make_step: Callable[[nn.Module], Step]) -> Callable[[Work], Run]:
    return lambda work: _loop(precision, layout, make_step, work)


def _graphed(precision: str, layout: str) -> Callable[[Work], Run]:
    """The eager loop with all its steps captured in one CUDA graph, so that nothing waits for Python."""

    def prepare(work: Work) -> Run:
        loop = _loop(precision, layout, _eager_step, work)
        graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

        def capture(steps: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
            loop(steps)  # outside of the capture: uploads the rates
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # cuDNN chooses its algorithms, and autograd sees this stream
                loop(min(steps, 3))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                return graph, loop(steps)

        def run(steps: int) -> torch.Tensor:
            if steps not in graphs:
                graphs.clear()  # a graph keeps its memory
                graphs[steps] = capture(steps)
            graph, errors = graphs[steps]
            graph.replay()
            return errors.clone()

        return run

    return prepare


def _jax(work: Work) -> Run:
    import jax
    import jax.numpy as jnp
    import numpy as np

    network = _jax_network(work.generator)
    images_torch, z0_torch = rows_of(work)
    images = jnp.asarray(images_torch.permute(0, 2, 3, 1).numpy())  # NHWC is what XLA's CPU kernels want
    z0 = jnp.asarray(z0_torch.numpy())

    @jax.jit
    def errors(z: Any) -> Any:
        return jnp.square(network(z) - images).mean((1, 2, 3))

    # Not lax.scan: on the CPU convolutions in its body took 1.4 times as long with JAX 0.10.2.
    @jax.jit
    def step(z: Any, velocity: Any, rate: Any) -> Any:
        velocity = MOMENTUM * velocity + jax.grad(lambda z: errors(z).sum())(z)
        return z - rate * velocity, velocity

    def run(steps: int) -> torch.Tensor:
        z, velocity = z0, jnp.zeros_like(z0)
        for rate in np.asarray(learning_rates(steps), np.float32):
            z, velocity = step(z, velocity, rate)
        return torch.from_numpy(np.array(errors(z).block_until_ready())).view(work.z0.shape[:2])

    return run


def _phase_taps(layer: nn.ConvTranspose2d, axis: int) -> tuple[int, Any]:
    """How a transposed convolution becomes one of stride 1 with an output channel for each of the s phases.

    Output o = s q + r is fed by input i through tap k = s (q - i) + r + p.

    Returns:
        How many positions before the input the first window begins, and [windows' size, s] the tap at each place
        of the window for each phase, K where there is none.
    """
    import numpy as np

    stride, size, padding = layer.stride[axis], layer.kernel_size[axis], layer.padding[axis]
    if isinstance(padding, str):
        raise Unavailable("padding given by name")
    most = (size - 1 - padding) // stride  # of q - i
    least = -((stride - 1 + padding) // stride)
    taps = stride * np.arange(most, least - 1, -1)[:, None] + np.arange(stride) + padding
    return most, np.where((taps >= 0) & (taps < size), taps, size)


def _jax_network(generator: nn.Module) -> Callable[[Any], Any]:
    """The generator as a JAX function [N, k] -> [N, H, W, C].

    Raises:
        Unavailable: a layer that this translation does not know.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    layers: list[Callable[[Any], Any]] = []

    def linear(layer: nn.Linear) -> Callable[[Any], Any]:
        weight, bias = jnp.asarray(layer.weight.t().numpy()), jnp.asarray(layer.bias.numpy())
        return lambda x: x @ weight + bias

    def unflatten(layer: nn.Unflatten) -> Callable[[Any], Any]:
        shape = tuple(layer.unflattened_size)
        return lambda x: x.reshape(x.shape[0], *shape).transpose(0, 2, 3, 1)

    def transposed(layer: nn.ConvTranspose2d) -> Callable[[Any], Any]:
        # As a convolution of stride 1 that computes each phase of the output in channels of its own, which then
        # become neighbours: XLA's convolutions of a dilated input took five times as long on the CPU.
        # A tap of zeros behind the others, for places of a window that a phase does not use.
        weight = np.pad(layer.weight.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)))
        bias = 0.0 if layer.bias is None else jnp.asarray(layer.bias.numpy())
        (before_y, taps_y), (before_x, taps_x) = (_phase_taps(layer, axis) for axis in (0, 1))
        (ty, sy), (tx, sx) = taps_y.shape, taps_x.shape
        phases = weight[:, :, taps_y[:, :, None, None], taps_x]  # [C, C', ty, sy, tx, sx]
        kernel = jnp.asarray(phases.transpose(2, 4, 0, 3, 5, 1).reshape(ty, tx, len(weight), -1))

        def forward(x: Any) -> Any:
            sizes = [
                (x.shape[1 + axis] - 1) * layer.stride[axis]
                - 2 * int(layer.padding[axis])
                + layer.kernel_size[axis]
                + layer.output_padding[axis]
                for axis in (0, 1)
            ]
            rows, columns = -(-sizes[0] // sy), -(-sizes[1] // sx)
            padding = [
                (before_y, rows + ty - 1 - x.shape[1] - before_y),
                (before_x, columns + tx - 1 - x.shape[2] - before_x),
            ]
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = y.reshape(len(x), rows, columns, sy, sx, -1).transpose(0, 1, 3, 2, 4, 5)
            return bias + y.reshape(len(x), rows * sy, columns * sx, -1)[:, : sizes[0], : sizes[1]]

        return forward

    for layer in generator.modules():
        if isinstance(layer, nn.Linear):
            layers.append(linear(layer))
        elif isinstance(layer, nn.Unflatten):
            layers.append(unflatten(layer))
        elif isinstance(layer, nn.ConvTranspose2d):
            layers.append(transposed(layer))
        elif isinstance(layer, nn.ReLU):
            layers.append(jax.nn.relu)
        elif isinstance(layer, nn.Sigmoid):
            layers.append(jax.nn.sigmoid)
        elif isinstance(layer, nn.Tanh):
            layers.append(jnp.tanh)
        elif not list(layer.children()):
            raise Unavailable(f"no JAX translation of {type(layer).__name__}")

    def network(z: Any) -> Any:
        for layer in layers:
            z = layer(z)
        return z

    return network
