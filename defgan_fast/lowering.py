"""A generator becomes a plan: a chain of layers that the kernels can run without knowing torch.

The generator is traced with torch.fx and run once on a few random latents, which gives every shape; then the
graph must be a chain, and each node either adds a layer, changes one, or only renames dimensions. BatchNorm
right after a matrix folds into it, elsewhere it is an affine layer (folding it forward into a padded
convolution would be wrong at the borders); crops change the index rule of the convolution before them; nearest
upsampling joins the convolution after it. What comes out is checked against the module before it is used.
`csrc/plan.h` holds the text form's grammar and its other reader.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class LoweringError(ValueError):
    """The generator holds a layer that no kernel knows; the message names the generator and the layer."""


Shape = tuple[int, int, int]  # channels, height, width
Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer; parameters are indices into the plan's list, -1 where there is none. See `csrc/plan.h`."""

    kind: str  # linear, conv_transpose, conv, map, reorder
    shape_in: Shape
    shape_out: Shape
    kernel: Pair = (0, 0)
    stride: Pair = (1, 1)
    pad: Pair = (0, 0)
    upsample: Pair = (1, 1)
    activation: str = "identity"
    slope: float = 0.0
    weight: int = -1
    bias: int = -1
    norm: tuple[int, int, int, int] | None = None  # mean, variance, weight, bias
    eps: float = 0.0

    @property
    def has_matrix(self) -> bool:
        return self.kind in ("linear", "conv_transpose", "conv")

    @property
    def is_elementwise(self) -> bool:
        return (
            self.kind == "map"
            and self.upsample == (1, 1)
            and self.pad == (0, 0)
            and self.shape_in == self.shape_out
        )

    def text(self) -> str:
        def join(values: Sequence[int]) -> str:
            return "x".join(map(str, values))

        words = [self.kind, f"in={join(self.shape_in)}", f"out={join(self.shape_out)}"]
        if self.kernel != (0, 0):
            words.append(f"kernel={join(self.kernel)}")
        words += [f"stride={join(self.stride)}", f"pad={join(self.pad)}", f"upsample={join(self.upsample)}"]
        words += [f"activation={self.activation}", f"weight={self.weight}", f"bias={self.bias}"]
        if self.activation == "leaky_relu":
            words.append(f"slope={self.slope!r}")
        if self.norm is not None:
            words += [f"eps={self.eps!r}", f"norm={','.join(map(str, self.norm))}"]
        return " ".join(words)


@dataclass(frozen=True)
class Plan:
    """A lowered generator.

    Attributes:
        layers: from the latent to the image.
        image_shape: (C, H, W) of the images that the generator returns.
        parameters: dotted names of the generator's tensors, in the order of the layers' indices.
        text: the form that travels through the op.
    """

    layers: tuple[Layer, ...]
    image_shape: Shape
    parameters: tuple[str, ...]
    text: str = field(init=False)

    def __post_init__(self) -> None:
        lines = [layer.text() for layer in self.layers]
        lines.append("image out=" + "x".join(map(str, self.image_shape)))
        object.__setattr__(self, "text", "\n".join(lines))

    @property
    def latent_size(self) -> int:
        return self.layers[0].shape_in[0]

    @property
    def output_range(self) -> tuple[float, float] | None:
        """The interval of the generator's pixels where the last layer bounds them."""
        return {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}.get(self.layers[-1].activation)

    def tensors(self, generator: nn.Module) -> list[Tensor]:
        """The generator's tensors as they are now, in the order that the plan numbers them."""
        return [_resolve(generator, name) for name in self.parameters]


def parse(text: str) -> Plan:
    """The plan of a text (names of parameters are not part of it)."""
    layers: list[Layer] = []
    image: Shape | None = None
    for line in text.splitlines():
        kind, *words = line.split()
        values = dict(word.split("=", 1) for word in words)

        def pair(key: str, default: Pair, values: dict[str, str] = values) -> Pair:
            if key not in values:
                return default
            h, w = map(int, values[key].split("x"))
            return h, w

        def shape(key: str, values: dict[str, str] = values) -> Shape:
            c, h, w = map(int, values[key].split("x"))
            return c, h, w

        if kind == "image":
            image = shape("out")
            continue
        norm: tuple[int, int, int, int] | None = None
        if "norm" in values:
            mean, var, weight, bias = map(int, values["norm"].split(","))
            norm = (mean, var, weight, bias)
        layers.append(
            Layer(
                kind,
                shape("in"),
                shape("out"),
                pair("kernel", (0, 0)),
                pair("stride", (1, 1)),
                pair("pad", (0, 0)),
                pair("upsample", (1, 1)),
                values.get("activation", "identity"),
                float(values.get("slope", 0.0)),
                int(values.get("weight", -1)),
                int(values.get("bias", -1)),
                norm,
                float(values.get("eps", 0.0)),
            )
        )
    assert image is not None
    return Plan(tuple(layers), image, ())


def run(plan: Plan, tensors: Sequence[Tensor], latents: Tensor) -> Tensor:
    """The plan in plain, differentiable PyTorch: latents [N, k] -> images [N, C, H, W], in the latents' dtype."""
    x = latents.reshape(len(latents), *plan.layers[0].shape_in)

    def get(index: int) -> Tensor | None:
        return None if index < 0 else tensors[index].to(x.dtype)

    for layer in plan.layers:
        weight, bias = get(layer.weight), get(layer.bias)
        (h, w), (up_h, up_w), (pad_h, pad_w) = layer.shape_out[1:], layer.upsample, layer.pad
        if layer.kind == "linear":
            assert weight is not None
            x = F.linear(x.flatten(1), weight, bias).reshape(len(x), *layer.shape_out)
        elif layer.kind == "conv_transpose":
            assert weight is not None
            x = F.conv_transpose2d(x, weight, stride=layer.stride)
            # Output o is position o + pad of the full one; past its end there is nothing but the bias.
            x = F.pad(x, (-pad_w, w + pad_w - x.shape[3], -pad_h, h + pad_h - x.shape[2]))
            x = x if bias is None else x + bias[:, None, None]
        elif layer.kind == "conv":
            assert weight is not None
            x = x.repeat_interleave(up_h, 2).repeat_interleave(up_w, 3)
            right = layer.stride[1] * (w - 1) + layer.kernel[1] - pad_w - x.shape[3]
            below = layer.stride[0] * (h - 1) + layer.kernel[0] - pad_h - x.shape[2]
            x = F.conv2d(F.pad(x, (pad_w, right, pad_h, below)), weight, bias, stride=layer.stride)
        elif layer.kind == "map":
            rows = (torch.arange(h, device=x.device) + pad_h) // up_h
            columns = (torch.arange(w, device=x.device) + pad_w) // up_w
            x = x[:, :, rows][:, :, :, columns]
        else:
            x = x.reshape(len(x), *layer.shape_out)
        if layer.norm is not None:
            mean, var, gamma, beta = map(get, layer.norm)
            assert mean is not None
            assert var is not None
            scale = (var + layer.eps).rsqrt() * (1.0 if gamma is None else gamma)
            shift = (0.0 if beta is None else beta) - mean * scale
            per_element = mean.numel() == math.prod(layer.shape_out)
            form = layer.shape_out if per_element else (layer.shape_out[0], 1, 1)
            x = x * scale.reshape(form) + shift.reshape(form)
        x = _ACTIVATIONS[layer.activation](x, layer.slope)
    return x.reshape(len(x), *plan.image_shape)


_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "sigmoid": lambda x, slope: torch.sigmoid(x),
    "tanh": lambda x, slope: torch.tanh(x),
}


def latent_size_of(generator: nn.Module) -> int | None:
    """k, from the first layer that has weights if the generator then runs, else from `generator.latent_size`."""
    for size in _latent_candidates(generator):
        try:
            _run(generator, _probe(generator, size))
        except Exception:
            continue
        return size
    return None


def decoder_of(generator: nn.Module, latent_size: int) -> Callable[[Tensor], Tensor]:
    """The generator as a function of latents [N, k], whether it takes them as [N, k] or as [N, k, 1, 1]."""
    if takes_maps(generator, latent_size):
        return lambda z: generator(z[:, :, None, None])
    return generator


def takes_maps(generator: nn.Module, latent_size: int) -> bool:
    """Whether the generator takes latents as [N, k, 1, 1] (as DCGAN does) and not as [N, k]."""
    probe = _probe(generator, latent_size)
    try:
        _forward(generator, probe)
    except Exception:
        try:
            _forward(generator, probe[:, :, None, None])
        except Exception:
            return False
        return True
    return False


def lower(generator: nn.Module, latent_size: int) -> Plan:
    """Lowers a generator in eval mode.

    Args:
        generator: maps latents [N, k] (or [N, k, 1, 1]) to images [N, C, H, W].
        latent_size: k.

    Raises:
        LoweringError: names the generator's class and the layer that stopped it.
    """
    name = type(generator).__name__
    try:
        graph = fx.symbolic_trace(generator)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoweringError(
            f"generator {name} cannot be lowered: torch.fx cannot trace it ({reason})"
        ) from error
    probe = _probe(generator, latent_size)
    builder = _Builder(graph, latent_size)
    try:
        with torch.no_grad():
            builder.run(probe[:, :, None, None] if takes_maps(generator, latent_size) else probe)
        plan = builder.plan()
    except LoweringError as error:
        raise LoweringError(f"generator {name} cannot be lowered: {error}") from error
    _verify(generator, plan, name)
    return plan


def _verify(generator: nn.Module, plan: Plan, name: str) -> None:
    # In float64, so that only a wrong plan can differ; a copy, since the generator is not ours to convert.
    with torch.no_grad(), torch.inference_mode(False):
        try:
            twin = copy.deepcopy(generator).double().eval()
        except Exception as error:
            raise LoweringError(
                f"generator {name} cannot be lowered: it cannot be copied ({error})"
            ) from error
        probe = _probe(twin, plan.latent_size)
        expected = decoder_of(twin, plan.latent_size)(probe)
        try:
            got = run(plan, plan.tensors(twin), probe)
        except Exception as error:
            raise LoweringError(
                f"generator {name} cannot be lowered: {str(error).splitlines()[0]}"
            ) from error
    scale = expected.abs().max().item() + 1e-30
    if expected.shape != got.shape or not (expected - got).abs().max().item() <= 1e-9 * scale:
        raise LoweringError(f"generator {name} cannot be lowered: it does not compute what its layers say")


def _latent_candidates(generator: nn.Module) -> Iterator[int]:
    for module in generator.modules():
        if isinstance(module, nn.Linear):
            yield module.in_features
        elif isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
            yield module.in_channels
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            yield module.num_features
        else:
            continue
        break
    declared = getattr(generator, "latent_size", None)
    if isinstance(declared, int):
        yield declared


def _probe(generator: nn.Module, latent_size: int) -> Tensor:
    """Three random latents of the generator's dtype and device; the caller's random state is left alone."""
    like = next((p for p in generator.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    rng = torch.Generator("cpu").manual_seed(0)
    # Explicit, since both can be set globally by the caller.
    return torch.randn(3, latent_size, generator=rng, dtype=torch.float32, device="cpu").to(like)


def _forward(generator: nn.Module, latents: Tensor) -> Any:
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        return generator(latents)


def _run(generator: nn.Module, probe: Tensor) -> Any:
    try:
        return _forward(generator, probe)
    except Exception:
        return _forward(generator, probe[:, :, None, None])


def _resolve(generator: nn.Module, name: str) -> Any:
    value: Any = generator
    for part in name.split("."):
        value = getattr(value, part)
    return value


class _Builder(fx.Interpreter):
    """Runs the traced generator on real latents and notes, node by node, what it does to the chain."""

    def __init__(self, graph: fx.GraphModule, latent_size: int) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False  # or fx adds lines of its own to our messages
        self.layers: list[Layer] = []
        self.shape: Shape = (latent_size, 1, 1)  # physical: of the last layer's output as the kernels hold it
        self.latent_size = latent_size
        self.head: Tensor | None = None  # the chain's last tensor
        self.parameters: list[str] = []
        self.image_shape: Shape | None = None

    def plan(self) -> Plan:
        if self.image_shape is None:
            raise LoweringError("it returns no tensor")
        if not self.layers:
            raise LoweringError("it has no layers")
        return Plan(tuple(self.layers), self.image_shape, tuple(self.parameters))

    # --- the walk ---------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder" and self.head is not None:
            return super().run_node(n)  # a further argument with a default: not a tensor of the chain
        inputs = [self.env[a] for a in n.all_input_nodes]
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        before = self.head
        try:
            result = super().run_node(n)
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(f"{self._name(n)} fails: {str(error).splitlines()[0]}") from error
        if n.op == "placeholder":
            self.head = result
        elif n.op == "output":
            self._finish(n, result)
        elif n.op == "get_attr" or not isinstance(result, Tensor):
            pass  # a constant, a size
        else:
            module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
            if len(tensors) != 1 or tensors[0] is not before:
                raise LoweringError(f"{_describe(n, module)} does not continue a chain of layers")
            if result.shape[:1] != tensors[0].shape[:1]:
                raise LoweringError(f"{_describe(n, module)} changes the number of rows")
            self._add(n, module, before, result)
            # In-place layers return their input: a fresh object keeps "is the head" meaningful.
            result = result.clone() if result is before else result
            self.head = result
        return result

    def _name(self, n: fx.Node) -> str:
        return _describe(n, self.fetch_attr(str(n.target)) if n.op == "call_module" else None)

    def _finish(self, n: fx.Node, result: Any) -> None:
        if not isinstance(result, Tensor) or result is not self.head:
            raise LoweringError("its output is not the end of a chain of layers")
        if result.dim() != 4:
            raise LoweringError(f"its output must have shape [N, C, H, W], got {list(result.shape)}")
        _, c, h, w = result.shape
        self.image_shape = (c, h, w)

    def _add(self, n: fx.Node, module: nn.Module | None, x: Tensor, y: Tensor) -> None:
        unsupported = LoweringError(f"{_describe(n, module)} is not supported")
        name = str(n.target)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            # Hooks may recompute weights (torch.nn.utils.weight_norm) or change tensors; no kernel runs them.
            raise LoweringError(f"{_describe(n, module)} has forward hooks, which is not supported")
        if module is not None:
            if isinstance(module, nn.Linear):
                self._linear(name, module, x, unsupported)
            elif isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
                self._convolution(n, name, module, x, y)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                self._norm(n, name, module, x)
            elif isinstance(module, nn.Upsample):
                self._upsample(n, module.mode, x, y, unsupported)
            elif isinstance(module, nn.Flatten | nn.Unflatten):
                pass  # the elements keep their order, and the kernels their layout until a layer needs another
            elif isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Identity):
                if module.training and not isinstance(module, nn.Identity):
                    raise LoweringError(f"{_describe(n, module)} is in training mode")
            elif type(module) in _ACTIVATION_MODULES:
                self._activation(_ACTIVATION_MODULES[type(module)], getattr(module, "negative_slope", 0.0), n)
            else:
                raise unsupported
            return
        target: Any = n.target
        arguments, keywords = self.fetch_args_kwargs_from_env(n)
        if target in _RESHAPES:
            return
        if target in _ACTIVATION_FUNCTIONS:
            slope = keywords.get("negative_slope", arguments[1] if len(arguments) > 1 else 0.01)
            kind = _ACTIVATION_FUNCTIONS[target]
            self._activation(kind, float(slope) if kind == "leaky_relu" else 0.0, n)
        elif target is F.interpolate:
            mode = keywords.get("mode", arguments[3] if len(arguments) > 3 else "nearest")
            self._upsample(n, mode, x, y, unsupported)
        elif target is F.dropout:
            if keywords.get("training", arguments[2] if len(arguments) > 2 else True):
                raise LoweringError(f"{_describe(n, None)} is in training mode")
        elif target is operator.getitem:
            self._crop(arguments[1], x, y, unsupported)
        else:
            raise unsupported

    # --- layers -----------------------------------------------------------------------------------------

    def _index(self, owner: str, attribute: str, value: Tensor | None) -> int:
        if value is None:
            return -1
        name = f"{owner}.{attribute}"
        if name not in self.parameters:
            self.parameters.append(name)
        return self.parameters.index(name)

    def _append(self, layer: Layer) -> None:
        self.layers.append(layer)
        self.shape = layer.shape_out

    def _linear(self, name: str, module: nn.Linear, x: Tensor, unsupported: LoweringError) -> None:
        if x.dim() != 2:
            raise unsupported
        self._append(
            Layer(
                "linear",
                self.shape,
                (module.out_features, 1, 1),
                weight=self._index(name, "weight", module.weight),
                bias=self._index(name, "bias", module.bias),
            )
        )

    def _lay_out(self, x: Tensor) -> None:
        """Makes the physical shape that of a map [N, C, H, W], by the linear layer before it where there is one."""
        _, c, h, w = x.shape
        wanted = (c, h, w)
        if self.shape == wanted:
            return
        first = len(self.layers)
        while first > 0 and self.layers[first - 1].is_elementwise:
            first -= 1
        # A norm per channel of an earlier shape holds that shape; then the elements are moved instead.
        bound = any(
            layer.norm is not None and layer.shape_out[1:] != (1, 1) for layer in self.layers[first - 1 :]
        )
        if first > 0 and self.layers[first - 1].kind == "linear" and not bound:
            linear = self.layers[first - 1]
            self.layers[first - 1] = replace(linear, shape_out=wanted)
            for i in range(first, len(self.layers)):
                self.layers[i] = replace(self.layers[i], shape_in=wanted, shape_out=wanted)
            self.shape = wanted
        else:
            self._append(Layer("reorder", self.shape, wanted))

    def _convolution(
        self, n: fx.Node, name: str, module: nn.ConvTranspose2d | nn.Conv2d, x: Tensor, y: Tensor
    ) -> None:
        def refuse(what: str) -> LoweringError:
            return LoweringError(f"{_describe(n, module)} with {what} is not supported")

        if module.groups != 1:
            raise refuse(f"groups={module.groups}")
        if module.dilation != (1, 1):
            raise refuse(f"dilation={module.dilation}")
        if module.padding_mode != "zeros":
            raise refuse(f"padding_mode={module.padding_mode!r}")
        if x.dim() != 4:
            raise refuse(f"an input of {x.dim()} dimensions")
        self._lay_out(x)
        kernel, stride = (module.kernel_size[0], module.kernel_size[1]), (module.stride[0], module.stride[1])
        padding: Any = module.padding
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
        upsample, shape_in = (1, 1), self.shape
        if isinstance(module, nn.Conv2d) and self.layers:
            before = self.layers[-1]
            pure = before.kind == "map" and before.norm is None and before.activation == "identity"
            if pure and before.pad == (0, 0) and before.upsample != (1, 1):
                upsample, shape_in = before.upsample, before.shape_in
                self.layers.pop()
        self._append(
            Layer(
                "conv" if isinstance(module, nn.Conv2d) else "conv_transpose",
                shape_in,
                (y.shape[1], y.shape[2], y.shape[3]),
                kernel,
                stride,
                (padding[0], padding[1]),
                upsample,
                weight=self._index(name, "weight", module.weight),
                bias=self._index(name, "bias", module.bias),
            )
        )

    def _norm(self, n: fx.Node, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> None:
        if module.running_mean is None or module.training:
            raise LoweringError(
                f"{_describe(n, module)} without running statistics or in training mode is not supported"
            )
        if x.dim() == 4:
            self._lay_out(x)
        elif x.dim() != 2:
            raise LoweringError(f"{_describe(n, module)} on {x.dim()} dimensions is not supported")
        norm = (
            self._index(name, "running_mean", module.running_mean),
            self._index(name, "running_var", module.running_var),
            self._index(name, "weight", module.weight),
            self._index(name, "bias", module.bias),
        )
        before = self.layers[-1] if self.layers else None
        foldable = (
            before is not None
            and before.has_matrix
            and before.norm is None
            and before.activation == "identity"
        )
        # Per element (BatchNorm1d over features that the kernels hold in space) only a linear layer can take it.
        spatial = x.dim() == 2 and self.shape[1:] != (1, 1)
        if before is not None and foldable and not (spatial and before.kind != "linear"):
            self.layers[-1] = replace(before, norm=norm, eps=float(module.eps))
        else:
            self._append(Layer("map", self.shape, self.shape, norm=norm, eps=float(module.eps)))

    def _activation(self, kind: str, slope: float, n: fx.Node) -> None:
        if not slope >= 0:
            raise LoweringError(
                f"{self._name(n)} with negative_slope={slope} is not supported: it must be at least 0"
            )
        if not self.layers or self.layers[-1].activation != "identity" or self.layers[-1].kind == "reorder":
            self._append(Layer("map", self.shape, self.shape))
        self.layers[-1] = replace(self.layers[-1], activation=kind, slope=slope)

    def _upsample(self, n: fx.Node, mode: str, x: Tensor, y: Tensor, unsupported: LoweringError) -> None:
        if mode not in ("nearest", "nearest-exact"):
            raise LoweringError(f"{self._name(n)} with mode={mode!r} is not supported")
        if x.dim() != 4:
            raise unsupported
        if y.shape[2] % x.shape[2] or y.shape[3] % x.shape[3]:
            raise unsupported
        self._lay_out(x)
        factor = (y.shape[2] // x.shape[2], y.shape[3] // x.shape[3])
        if factor != (1, 1):
            self._append(Layer("map", self.shape, (y.shape[1], y.shape[2], y.shape[3]), upsample=factor))

    def _crop(self, index: Any, x: Tensor, y: Tensor, unsupported: LoweringError) -> None:
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = index[:at] + (slice(None),) * (x.dim() - len(index) + 1) + index[at + 1 :]
        if x.dim() != 4 or y.dim() != 4 or not all(isinstance(i, slice) for i in index):
            raise unsupported
        ranges = [s.indices(size) for s, size in zip(index, x.shape, strict=False)]
        ranges += [(0, size, 1) for size in x.shape[len(ranges) :]]
        whole = all(r == (0, size, 1) for r, size in zip(ranges[:2], x.shape, strict=False))
        if not whole or any(step != 1 for _, _, step in ranges) or y.numel() == 0:
            raise unsupported
        self._lay_out(x)
        top, left = ranges[2][0], ranges[3][0]
        shape: Shape = (y.shape[1], y.shape[2], y.shape[3])
        if shape == self.shape:
            return
        before = self.layers[-1] if self.layers else None
        if (
            before is None
            or before.kind not in ("conv", "conv_transpose", "map")
            or (before.kind == "map" and before.is_elementwise)
        ):
            self._append(Layer("map", self.shape, shape, pad=(top, left)))
            return
        pad = before.pad
        if before.kind == "conv":  # i = stride * (o + start) + tap - pad
            pad = (pad[0] - before.stride[0] * top, pad[1] - before.stride[1] * left)
        else:
            pad = (pad[0] + top, pad[1] + left)
        self.layers[-1] = replace(before, shape_out=shape, pad=pad)
        self.shape = shape


_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.leaky_relu: "leaky_relu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    "tanh": "tanh",
    "tanh_": "tanh",
}
_RESHAPES: set[Any] = {
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    torch.unflatten,
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "contiguous",
}


def _describe(n: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return f"layer '{n.target}' ({type(module).__name__})"
    if n.op == "call_method":
        return f"method '{n.target}'"
    return f"function '{getattr(n.target, '__name__', n.target)}'"
