"""From an `nn.Module` to a plan.

The generator is traced with torch.fx and run once on a few random latents, which gives every shape. The graph must be
a chain; each of its nodes adds to the plan's chain, and what comes out is compared with the module before it is used:
a plan can be slow, it cannot be wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import torch_layers
from .chain import Chain
from .interpretation import interpret
from .latents import decoder_of, probe_of, takes_maps
from .layers import LoweringError, Plan, Shape


def lower(generator: nn.Module, latent_size: int) -> Plan:
    """Returns the plan of a generator in eval mode.

    Args:
        generator: maps latents [N, k] (or [N, k, 1, 1]) to images [N, C, H, W].
        latent_size: k.

    Raises:
        LoweringError: the message names the generator's class and the layer that stopped it.
    """
    try:
        return _lowered(generator, latent_size)
    except LoweringError as error:
        name = type(generator).__name__
        raise LoweringError(f"generator {name} cannot be lowered: {error}") from error


def _lowered(generator: nn.Module, latent_size: int) -> Plan:
    try:
        graph = fx.symbolic_trace(generator)
    except Exception as error:
        raise LoweringError(f"torch.fx cannot trace it ({_first_line(error)})") from error
    probe = probe_of(generator, latent_size)
    walk = _Walk(graph, latent_size)
    with torch.no_grad():
        walk.run(probe[:, :, None, None] if takes_maps(generator, latent_size) else probe)
    plan = walk.plan()
    _verify(generator, plan)
    return plan


def _verify(generator: nn.Module, plan: Plan) -> None:
    """Compares a plan with its generator in float64, where only a wrong plan can differ."""
    with torch.no_grad(), torch.inference_mode(False):
        try:
            twin = copy.deepcopy(generator).double().eval()  # a copy: the generator is not ours to convert
        except Exception as error:
            raise LoweringError(f"it cannot be copied ({error})") from error
        probe = probe_of(twin, plan.latent_size)
        expected = decoder_of(twin, plan.latent_size)(probe)
        try:
            got = interpret(plan, plan.tensors(twin), probe)
        except Exception as error:
            raise LoweringError(_first_line(error)) from error
    scale = expected.abs().max().item() + 1e-30
    if expected.shape != got.shape or not (expected - got).abs().max().item() <= 1e-9 * scale:
        raise LoweringError("it does not compute what its layers say")


class _Walk(fx.Interpreter):
    """Runs the traced generator on real latents and adds to the chain, node by node, what it does to them."""

    def __init__(self, graph: fx.GraphModule, latent_size: int) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False  # or fx adds lines of its own to our messages
        self.chain = Chain(latent_size)
        self.head: Tensor | None = None  # the tensor at the chain's end
        self.image_shape: Shape | None = None

    def plan(self) -> Plan:
        """Returns the plan of the graph that was run."""
        if self.image_shape is None:
            raise LoweringError("it returns no tensor")
        if not self.chain.layers:
            raise LoweringError("it has no layers")
        return self.chain.plan(self.image_shape)

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node, as fx calls it, and follows the chain through it."""
        before = self.head
        try:
            result = super().run_node(n)
        except Exception as error:
            raise LoweringError(f"{self._described(n)} fails: {_first_line(error)}") from error
        if n.op == "placeholder":
            if before is None:  # a further argument with a default is no tensor of the chain
                self.head = result
        elif n.op == "output":
            self._end(result)
        elif n.op != "get_attr" and isinstance(result, Tensor):  # anything else is a constant, or a size
            # In-place layers return their input: a new object keeps "is the head" meaningful.
            self.head = result = result.clone() if result is before else result
            self._follow(n, before, result)
        return result

    def _follow(self, n: fx.Node, before: Tensor | None, result: Tensor) -> None:
        """Adds a node to the chain that it must continue."""
        what = self._described(n)
        inputs = [self.env[node] for node in n.all_input_nodes]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if before is None or len(tensors) != 1 or tensors[0] is not before:
            raise LoweringError(f"{what} does not continue a chain of layers")
        if result.shape[:1] != before.shape[:1]:
            raise LoweringError(f"{what} changes the number of rows")
        module = self._module(n)
        function = n.target if module is None else None
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        call = torch_layers.Call(
            what, str(n.target), module, function, before, result, tuple(arguments), dict(keywords)
        )
        torch_layers.add(self.chain, call)

    def _end(self, result: Any) -> None:
        if not isinstance(result, Tensor) or result is not self.head:
            raise LoweringError("its output is not the end of a chain of layers")
        if result.dim() != 4:
            raise LoweringError(f"its output must have shape [N, C, H, W], got {list(result.shape)}")
        _, c, h, w = result.shape
        self.image_shape = (c, h, w)

    def _module(self, n: fx.Node) -> nn.Module | None:
        return self.fetch_attr(str(n.target)) if n.op == "call_module" else None

    def _described(self, n: fx.Node) -> str:
        """Returns how messages name a node."""
        module = self._module(n)
        if module is not None:
            return f"layer '{n.target}' ({type(module).__name__})"
        if n.op == "call_method":
            return f"method '{n.target}'"
        return f"function '{getattr(n.target, '__name__', n.target)}'"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
